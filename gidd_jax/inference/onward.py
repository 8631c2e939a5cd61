"""Texts longer than the context: when it is full, its last half goes on."""

from collections.abc import Callable, Sequence

import numpy as np

from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.inference.framing import decoded
from gidd_jax.inference.prompts import Rows, Text, continuations, join_pieces, token_ids
from gidd_jax.inference.samples import Samples

Draw = Callable[[Rows, int], Samples]


def continued(
    draw: Draw,
    tokenizer: Tokenizer,
    prompts: Sequence[Text],
    context: int,
    new_tokens: int | None,
    *,
    begin: bool,
    end_id: int | None,
    block_length: int,
) -> Samples:
    """Return continuations of the prompts up to the context, or by `new_tokens` tokens.

    draw: (rows, number of the window) -> their samples. By blocks (of block_length; 0: none) texts
    go on beyond the context: when it is full, the last half of it, from a multiple of block_length
    on, begins the next window. end_id: a text ends there, padding follows; None: it goes on. Raises
    InputError for prompts that are empty or fill the context, and blocks of more than half of it.
    """
    ids = token_ids(tokenizer, prompts, "prompt")
    if new_tokens is None or not block_length or _longest(ids) + begin + new_tokens <= context:
        return draw(continuations(tokenizer, prompts, context, new_tokens, begin=begin), 0)
    continuations(tokenizer, prompts, context, 1, begin=begin)  # refuses prompts
    if 2 * block_length > context:
        raise InputError(
            f"block_length = {block_length}: to go on beyond the context it must be at most half "
            f"of it, {context // 2}"
        )
    first = join_pieces(tokenizer, [[prompt, 1] for prompt in ids], begin=begin)
    texts = [row[: n - 1] for row, n in zip(first.ids, first.lengths, strict=True)]
    starts = [len(text) for text in texts]
    noted = [(np.zeros(n, np.float32), np.zeros(n, np.int32)) for n in starts]
    stopped, calls, made, window = np.zeros(len(texts), np.int64), 0, 0, 0

    def left(number: int) -> int:
        has_end = end_id is not None and np.any(texts[number][starts[number] :] == end_id)
        return 0 if has_end else starts[number] + new_tokens - len(texts[number])

    while any(left(number) for number in range(len(texts))):
        tails = [_tail(text, context, block_length) for text in texts]
        # Texts that are done draw a token that nobody reads: so rows keep their numbers.
        counts = [min(max(left(n), 1), context - len(tail)) for n, tail in enumerate(tails)]
        rows = join_pieces(
            tokenizer, [[t, c] for t, c in zip(tails, counts, strict=True)], begin=False
        )
        part = draw(rows, window)
        longest = int(part.stopped_at.max())
        for number, (tail, count) in enumerate(zip(tails, counts, strict=True)):
            if not left(number):
                continue
            new = slice(len(tail), len(tail) + count)
            drawn_at = part.drawn_at[number, new]
            texts[number] = np.concatenate([texts[number], part.ids[number, new]])
            noted[number] = (
                np.concatenate([noted[number][0], part.log_probs[number, new]]),
                np.concatenate([noted[number][1], np.where(drawn_at > 0, drawn_at + made, 0)]),
            )
            stopped[number] = made + part.stopped_at[number]
        calls, made, window = calls + part.network_calls, made + longest, window + 1

    width = max(start + new_tokens for start in starts)
    out = np.full((len(texts), width), tokenizer.pad_id, np.int32)
    log_probs, drawn_at = np.zeros(out.shape, np.float32), np.zeros(out.shape, np.int32)
    for number, text in enumerate(texts):
        out[number, : len(text)] = text
        log_probs[number, : len(text)], drawn_at[number, : len(text)] = noted[number]
    lengths = np.array([len(text) for text in texts], np.int32)
    whole = Rows(out, np.zeros(out.shape, bool), lengths)
    return Samples(out, decoded(out, whole, tokenizer), log_probs, drawn_at, calls, stopped)


def seed_of(seed: int, window: int) -> int:
    """Return the seed of a window: the first one's is that of a text within the context."""
    if window == 0:
        return seed
    return int(np.random.SeedSequence([seed, window]).generate_state(1)[0] >> 1)


def _longest(ids: Sequence[np.ndarray]) -> int:
    return max(map(len, ids), default=0)


def _tail(text: np.ndarray, context: int, block_length: int) -> np.ndarray:
    """Return what a window holds of a text: all, or if that fills it the last half."""
    if len(text) < context:
        return text
    cut = len(text) - context // 2
    return text[-(-cut // block_length) * block_length :]
