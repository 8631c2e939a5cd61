"""Rows at inference as the model saw rows in training, whatever a text's length.

A model that was trained on padded rows has never seen one that simply ends: a text shorter than the
context is followed by the token that ends it and by padding that the network sees. A model trained
on packed rows saw full ones alone: its short rows end where the text ends, and hidden padding
brings them to one of a few widths, so that prompts of many lengths share compiled programs. What
was added is not returned. To rows without a frame, which are full, nothing is added.
"""

from collections.abc import Sequence

import numpy as np

from gidd_jax.data.rows import NO_FRAME
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.inference.prompts import Rows, end_id
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.sampling.trace import Changes, Trace, join_changes, make_trace

LEAST = 64  # tokens: for less a program of its own takes longer to compile than it saves
SCHEDULED = ("first_hitting",)  # methods whose schedule depends on the number of tokens
PADDED = (
    "padded",
    "crop",
    "answers",
)  # modes of training whose rows end with padding, see data.rows


def framed(rows: Rows, tokenizer: Tokenizer, mode: str, context: int, *, ends: bool = True) -> Rows:
    """Return the rows as rows of `mode` are.

    ends: a row that is shorter than the context is a whole text, which the end token follows.
    Raises InputError for rows of another length where training had no frame to fill them up with.
    """
    if mode == NO_FRAME:
        for number, length in enumerate(rows.lengths, start=1):
            if length != context:
                raise InputError(
                    f"row {number} has {length} tokens: a model of rows without a frame "
                    f"(data.frame=none) knows rows of {context} tokens alone"
                )
    if mode not in PADDED:
        return rows
    wide = widened(rows, tokenizer, context)
    place = np.arange(context)[None]
    ids = np.where(place < rows.lengths[:, None], wide.ids, tokenizer.pad_id)
    if ends:
        ids = np.where(place == rows.lengths[:, None], end_id(tokenizer), ids)
    return Rows(ids.astype(np.int32), wide.free, np.full(len(ids), context, np.int32))


def widened(rows: Rows, tokenizer: Tokenizer, width: int) -> Rows:
    """Return the rows with hidden padding up to a width."""
    widths = [(0, 0), (0, width - rows.ids.shape[1])]
    ids = np.pad(rows.ids, widths, constant_values=tokenizer.pad_id)
    return Rows(ids, np.pad(rows.free, widths), rows.lengths)


def shared_width(size: int, most: int) -> int:
    """Return the least of most, half of it, ... that holds `size` tokens and is no less than LEAST.

    Halves of the context, not powers of two: a prompt and what follows it often fill that, and
    rounding should seldom change from one prompt to the next.
    """
    while -(-most // 2) >= max(size, LEAST):
        most = -(-most // 2)
    return most


def scheduled_tokens(options: SamplerOptions, rows: Rows) -> int:
    """Return how many tokens a row a schedule is made for: rounded up, so that programs are shared.

    Where the schedule does not depend on it, any number of tokens shares one program; by blocks it
    is made for all, and ends with the last block that a row has.
    """
    width = rows.ids.shape[1]
    depends = options.method in SCHEDULED and options.block_length == 0
    return shared_width(int(rows.free.sum(-1).max()), width) if depends else width


def following_tokens(rows: Rows) -> int:
    """Return the most tokens from a row's first one to generate on, rounded up as above."""
    follow = rows.lengths - rows.free.argmax(-1)
    return shared_width(int(follow.max()), rows.ids.shape[1])


def unframed(ids: np.ndarray, rows: Rows, tokenizer: Tokenizer) -> np.ndarray:
    """Return ids of framed rows in the shape of the rows they were made of, padded as these are."""
    width = rows.ids.shape[1]
    inside = np.arange(width)[None] < rows.lengths[:, None]
    return np.where(inside, ids[:, :width], tokenizer.pad_id).astype(ids.dtype)


def decoded(ids: np.ndarray, rows: Rows, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of ids [N, L] as long as their rows, without special tokens."""
    lengths = zip(ids, rows.lengths, strict=True)
    return [tokenizer.decode(row[:length], skip_special_tokens=True) for row, length in lengths]


def revised(
    texts: Sequence[str] | np.ndarray | Rows, rows: Rows, ids: np.ndarray, tokenizer: Tokenizer
) -> list[str]:
    """Return the texts with ids [N, L] in place of those of the rows; the rest stays."""
    if isinstance(texts, np.ndarray | Rows):
        return decoded(ids, rows, tokenizer)
    of_text = zip(texts, rows.free, strict=True)
    return [
        tokenizer.revise(text, rows.ids[number, free], ids[number, free])
        for number, (text, free) in enumerate(of_text)
    ]


def trace_of(
    parts: list[Changes], rows: Rows, given: np.ndarray, texts: list[str], tokenizer: Tokenizer
) -> Trace:
    """Return the trace of batches of framed rows, in the shape of the rows they were made of."""
    changes = join_changes(parts, len(rows.ids))
    changes = changes._replace(start=unframed(changes.start, rows, tokenizer))
    return make_trace(changes, given, rows.lengths, texts, tokenizer)
