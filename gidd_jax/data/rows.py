"""From token ids of documents to rows of seq_len tokens: framing, windows, crops and padding.

Modes of framed rows are three. 'crop': a random window of a document, padded where the document is
shorter. 'padded': the beginning of a document, padded. 'packed': windows of all documents end to
end. Rows without a frame ('none') are such windows, too, with nothing around the documents. Rows of
'answers' are made of prompts and answers (see `answers`).
"""

import math
from itertools import pairwise
from typing import Protocol

import numpy as np

from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError

NO_FRAME = "none"
ANSWERS = "answers"
TEXT_MODES = ("crop", "packed", "padded")
MODES = (*TEXT_MODES, ANSWERS)


class Records(Protocol):
    """A random-access sequence of arrays [num_tokens], such as ids."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...


def check_mode(mode: str, name: str = "data mode") -> None:
    """Raise InputError that begins with `name` unless `mode` is one of MODES, or NO_FRAME."""
    legal = (*MODES, NO_FRAME)
    if mode not in legal:
        raise InputError(f"{name} {mode!r}: legal values: {', '.join(legal)}")


def are_illegal(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Tell which ids (of any shape) a row cannot hold: no tokens, and the mask."""
    return (ids < 0) | (ids >= tokenizer.vocab_size) | (ids == tokenizer.mask_id)


def legal_ids(tokenizer: Tokenizer) -> str:
    """Say in words which ids a row can hold."""
    if tokenizer.mask_id == tokenizer.vocab_size - 1:
        return f"0 to {tokenizer.mask_id - 1}"
    return f"0 to {tokenizer.vocab_size - 1} but for the mask, {tokenizer.mask_id}"


def ids_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that stores the ids."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def frame(ids: np.ndarray, tokenizer: Tokenizer, mode: str) -> tuple[np.ndarray, int]:
    """Put BOS and EOS around a document; returns it with the number of tokens put in front.

    Where one token is both, as in GPT-2, packed documents are separated by one of it, not two. Mode
    'none' puts nothing around it. Raises InputError for a tokenizer that has nothing to put there.
    """
    if mode == NO_FRAME:
        return ids.astype(ids_dtype(tokenizer.vocab_size)), 0
    if tokenizer.eos_id is None:
        raise InputError(
            f"tokenizer {tokenizer.name!r} has no token that ends a text: set data.frame=none"
        )
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if mode == "packed" and tokenizer.bos_id == tokenizer.eos_id:
        front = []
    framed = np.empty(len(front) + len(ids) + 1, ids_dtype(tokenizer.vocab_size))
    framed[: len(front)] = front
    framed[len(front) : -1] = ids
    framed[-1] = tokenizer.eos_id
    return framed, len(front)


def window_starts(num_tokens: int, seq_len: int) -> np.ndarray:
    """Where windows of `seq_len` start so that they cover all tokens, int64 [num_windows].

    The last window ends with the last token, so it may repeat tokens of the one before: a window
    with padding is something a model that was trained on full ones has never seen.
    """
    starts = np.arange(0, max(num_tokens - seq_len, 0) + 1, seq_len)
    if num_tokens > seq_len and num_tokens % seq_len:
        starts = np.append(starts, num_tokens - seq_len)
    return starts


def crop(ids: np.ndarray, seq_len: int, rng: np.random.Generator) -> np.ndarray:
    """A random window of at most `seq_len` tokens; every window is equally likely."""
    # The original draws from [0, n - L) and so can never show the last token, the EOS.
    start = int(rng.integers(0, max(len(ids) - seq_len, 0) + 1))
    return ids[start : start + seq_len]


def pad(
    ids: np.ndarray, seq_len: int, pad_id: int, given: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """A row {'tokens': int32 [seq_len], 'mask': bool [seq_len]}; mask is False on the padding.

    given bool [num_tokens]: which tokens are given; the row says so under 'given', bool [seq_len].
    """
    tokens = np.full(seq_len, pad_id, np.int32)
    tokens[: len(ids)] = ids
    row = {"tokens": tokens, "mask": np.arange(seq_len) < len(ids)}
    return row if given is None else row | {"given": np.pad(given, (0, seq_len - len(given)))}


def with_empty_tokens(
    ids: np.ndarray, seq_len: int, pad_id: int, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Put padding tokens at random places of a row, as many as make up a share of it in [0, share].

    What then is beyond seq_len is cut. The share is drawn for each row (arXiv 2512.10858).
    """
    count = num_empty(len(ids), share * rng.random())
    length = min(len(ids) + count, seq_len)
    return insert_empty(ids, rng.permutation(length)[:count], length, pad_id)


def num_empty(num_tokens: int, share: float) -> int:
    """How many tokens beside num_tokens others make up a share of all, rounded up."""
    return math.ceil(num_tokens * share / (1 - share))


def insert_empty(ids: np.ndarray, places: np.ndarray, length: int, pad_id: int) -> np.ndarray:
    """A row of `length` with padding tokens at some places, and the first of ids at the others."""
    # The paper's code makes a buffer of a length that can be too short, and then has the last token
    # of the row at its position 0.
    row = np.full(length, pad_id, ids.dtype)
    others = np.ones(length, bool)
    others[places] = False
    row[others] = ids[: others.sum()]
    return row


class TokenisedDocuments:
    """Framed documents in one array: ids [num_tokens], document i at offsets[i]:offsets[i + 1].

    `num_bytes` int32 [num_tokens] says how many UTF-8 bytes each token stands for.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray, num_bytes: np.ndarray):
        self.ids = ids
        self.offsets = offsets
        self.num_bytes = num_bytes

    def whole(self) -> "Windows":
        """One window per document, however long."""
        return Windows(self.ids, self.offsets[:-1], self.offsets[1:])


class Windows:
    """Slices of an array of ids [num_tokens], as records."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray):
        self.ids = ids
        self.starts = starts
        self.ends = ends

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.ends[index]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over each window of values [num_tokens], int64 [num_windows]."""
        totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return totals[self.ends] - totals[self.starts]


def cut(documents: TokenisedDocuments, mode: str, seq_len: int) -> Windows:
    """The rows that stand for documents, in order and without chance.

    packed, none: windows over all documents end to end; crop: windows over each document;
    padded: the beginning of each document. Raises InputError where rows without a frame, which have
    no padding, would be shorter than `seq_len`.
    """
    is_joined = mode in ("packed", NO_FRAME)
    if mode == NO_FRAME and len(documents.ids) < seq_len:
        raise InputError(
            f"rows without a frame are full: {len(documents.ids)} tokens make none of {seq_len}: "
            "give longer texts, or lower the length of a row"
        )
    bounds = documents.offsets[[0, -1]] if is_joined else documents.offsets
    if mode == "padded":
        starts, limits = bounds[:-1], bounds[1:]
    else:
        pieces = [b + window_starts(e - b, seq_len) for b, e in pairwise(bounds)]
        starts = np.concatenate(pieces)
        limits = np.repeat(bounds[1:], [len(p) for p in pieces])
    return Windows(documents.ids, starts, np.minimum(starts + seq_len, limits))


def tokenise(texts: list[str], tokenizer: Tokenizer, mode: str) -> TokenisedDocuments:
    """Encode and frame documents, in parallel threads.

    The bytes of a document sum to its length: where the tokenizer keeps nothing of it, they count
    with its EOS, which then is all that says them.
    """
    framed, num_bytes = [], []
    for text, (ids, token_bytes) in zip(texts, tokenizer.encode_with_bytes(texts), strict=True):
        document, num_front = frame(ids, tokenizer, mode)
        framed.append(document)
        num_back = len(document) - num_front - len(ids)
        num_bytes.append(np.pad(token_bytes, (num_front, num_back)))
        if len(ids) == 0 and num_back:
            num_bytes[-1][-1] = len(text.encode())
    offsets = np.cumsum([0, *(len(f) for f in framed)])
    return TokenisedDocuments(np.concatenate(framed), offsets, np.concatenate(num_bytes))


def join(parts: list[TokenisedDocuments]) -> TokenisedDocuments:
    """Several lots of documents as one."""
    starts = np.cumsum([0, *(len(p.ids) for p in parts)])
    offsets = [p.offsets[1:] + start for p, start in zip(parts, starts, strict=False)]
    return TokenisedDocuments(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([[0], *offsets]),
        np.concatenate([p.num_bytes for p in parts]),
    )
