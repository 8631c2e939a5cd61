"""From texts to rows of tokens: what is given, what is to be generated, and where a row ends."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gidd_jax.data.rows import are_illegal, legal_ids
from gidd_jax.data.texts import check_texts
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.sampling.options import SamplerOptions

Text = str | Sequence[int] | np.ndarray  # a text, or its token ids
FREE = -1  # in an array of ids: to be generated
Piece = str | int  # a text, or a number of tokens to generate


class Rows(NamedTuple):
    """Rows of several lengths: ids int32 [N, L], free bool [N, L] where a token is to be
    generated, lengths int32 [N]; from its length on a row is padding."""

    ids: np.ndarray
    free: np.ndarray
    lengths: np.ndarray

    @property
    def is_ragged(self) -> bool:
        return bool(np.any(self.lengths != self.ids.shape[1]))


def token_ids(tokenizer: Tokenizer, texts: Sequence[Text], name: str = "text") -> list[np.ndarray]:
    """Return the token ids of each text, int32 [num_tokens]; those given as ids stay as they are.

    Raises InputError for ids that the tokenizer does not have, and for texts that have no UTF-8;
    `name` is what one of the texts is called.
    """
    check_texts(texts, name)
    encoded = iter(tokenizer.encode([text for text in texts if isinstance(text, str)]))
    found = []
    for number, text in enumerate(texts, start=1):
        ids = next(encoded) if isinstance(text, str) else np.asarray(text, np.int32)
        if ids.ndim != 1 or np.any((ids < 0) | (ids >= tokenizer.vocab_size)):
            raise InputError(
                f"{name} {number} is no list of token ids from 0 to {tokenizer.vocab_size - 1}"
            )
        found.append(ids)
    return found


def empty_rows(tokenizer: Tokenizer, count: int, length: int, *, begin: bool) -> Rows:
    """Return rows with nothing given; begin: but the token that begins a text."""
    ids = np.full((count, length), tokenizer.pad_id, np.int32)
    free = np.ones((count, length), bool)
    if begin:
        ids[:, 0], free[:, 0] = begin_id(tokenizer), False
    return Rows(ids, free, np.full(count, length, np.int32))


def continuations(
    tokenizer: Tokenizer,
    prompts: Sequence[Text],
    length: int,
    new_tokens: int | None,
    *,
    begin: bool = True,
) -> Rows:
    """Return rows that begin with the prompts and go on to `length`, or for `new_tokens` tokens.

    begin: after the token that begins a text. Raises InputError for a prompt that is empty or
    leaves no room.
    """
    rows, front = [], int(begin)
    for number, (prompt, ids) in enumerate(
        zip(prompts, token_ids(tokenizer, prompts, "prompt"), strict=True), start=1
    ):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty: give some text, or no prompts at all")
        count = length - front - len(ids) if new_tokens is None else new_tokens
        if count < 1 or front + len(ids) + count > length:
            beside = "with the one that begins a text and " if begin else "with "
            raise InputError(
                f"prompt {number} has {len(ids)} tokens: {beside}"
                f"{max(count, 1)} to generate it exceeds the length {length}"
            )
        rows.append([ids, count])
    return join_pieces(tokenizer, rows, begin=begin)


def infillings(
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[Piece]] | np.ndarray,
    length: int,
    *,
    begin: bool = True,
) -> Rows:
    """Return rows of pieces: the texts are given, a number stands for so many tokens to generate.

    Of token ids int [N, L] those that are FREE are to be generated. begin: pieces follow the token
    that begins a text. Raises InputError for a row without a gap, an impossible piece, or one
    longer than `length`.
    """
    if isinstance(texts, np.ndarray):
        return _gaps_of_ids(tokenizer, texts, length)
    rows, front = [], int(begin)
    for number, pieces in enumerate(texts, start=1):
        if isinstance(pieces, str) or not any(isinstance(piece, int) for piece in pieces):
            raise InputError(
                f"text {number} has nothing to fill in: give a list such as "
                '["It was ", 5, " of times"], numbers of tokens among texts'
            )
        for piece in pieces:
            if not isinstance(piece, str) and not (isinstance(piece, int) and piece > 0):
                raise InputError(f"text {number}: a piece is a text or a number above 0: {piece!r}")
        check_texts(pieces, f"text {number}, piece")
        encoded = iter(tokenizer.encode([p for p in pieces if isinstance(p, str)]))
        row = [next(encoded) if isinstance(p, str) else p for p in pieces]
        size = front + sum(p if isinstance(p, int) else len(p) for p in row)
        if size > length:
            beside = " and the token that begins a text" if begin else ""
            raise InputError(
                f"text {number} has {size} tokens with its gaps{beside}: "
                f"the longest possible is {length}"
            )
        rows.append(row)
    return join_pieces(tokenizer, rows, begin=begin)


def _gaps_of_ids(tokenizer: Tokenizer, ids: np.ndarray, length: int) -> Rows:
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not 0 < ids.shape[1] <= length:
        raise InputError(
            f"texts are {ids.dtype} {list(ids.shape)}: must be lists of pieces, or ids int [N, L] "
            f"of at most {length} positions"
        )
    free = ids == FREE
    for number, (row, gaps) in enumerate(zip(ids, free, strict=True), start=1):
        if not gaps.any():
            raise InputError(f"text {number} has nothing to fill in: put {FREE} where it has")
        bad = row[~gaps & are_illegal(row, tokenizer)]
        if len(bad):
            raise InputError(
                f"text {number} holds {bad[0]}: ids are {legal_ids(tokenizer)}, or {FREE} for what "
                "is to be generated"
            )
    lengths = np.full(len(ids), ids.shape[1], np.int32)
    return Rows(np.where(free, tokenizer.pad_id, ids).astype(np.int32), free, lengths)


def whole_texts(
    tokenizer: Tokenizer,
    texts: Sequence[str] | np.ndarray,
    length: int,
    *,
    begin: bool = True,
) -> Rows:
    """Return rows that may be changed everywhere, but for the token that begins a text.

    begin: whether there is one. Of token ids int [N, L] every token may be changed. Raises
    InputError for texts that are empty, ids that are none, and for what is longer than `length`.
    """
    if isinstance(texts, np.ndarray):
        if texts.ndim != 2 or texts.dtype.kind not in "iu":
            raise InputError(
                f"texts are {texts.dtype} {list(texts.shape)}: must be texts, or ids int [N, L]"
            )
        count, columns = texts.shape
        if columns > length:
            raise InputError(f"sequences of {columns} tokens exceed the context {length}")
        bad = are_illegal(texts, tokenizer)
        if bad.any():
            row, place = np.argwhere(bad)[0]
            raise InputError(
                f"text {row + 1} holds {texts[row, place]}: ids are {legal_ids(tokenizer)}"
            )
        lengths = np.full(count, columns, np.int32)
        return Rows(texts.astype(np.int32), np.ones(texts.shape, bool), lengths)
    rows = token_ids(tokenizer, texts)
    most, words = length - begin, _room(begin)
    for number, ids in enumerate(rows, start=1):
        if not 0 < len(ids) <= most:
            raise InputError(f"text {number} has {len(ids)} tokens: give 1 to {most}, {words}")
    given = join_pieces(tokenizer, [[ids] for ids in rows], begin=begin)
    within = np.arange(given.ids.shape[1]) < given.lengths[:, None]
    within[:, : int(begin)] = False
    return given._replace(free=within)


def scored_texts(
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    prompts: Sequence[Text] | None,
    length: int,
    *,
    begin: bool = True,
) -> Rows:
    """Return rows of a prompt (if any) and a text; free are the tokens of the text.

    begin: after the token that begins a text. Raises InputError for texts that are empty or, with
    their prompt, longer than `length`.
    """
    if prompts is not None and len(prompts) != len(texts):
        raise InputError(f"{len(prompts)} prompts for {len(texts)} texts: give one each")
    given = token_ids(tokenizer, prompts or [""] * len(texts), "prompt")
    pairs = list(zip(given, token_ids(tokenizer, texts), strict=True))
    for number, (prompt, ids) in enumerate(pairs, start=1):
        if not len(ids) or len(prompt) + len(ids) > length - begin:
            after = f" after the {len(prompt)} of its prompt" if len(prompt) else ""
            raise InputError(
                f"text {number} has {len(ids)} tokens{after}: give at least 1, and at most "
                f"{length - begin} with the prompt, {_room(begin)}"
            )
    rows = join_pieces(tokenizer, pairs, begin=begin)
    ends = np.array([begin + len(prompt) for prompt, _ in pairs])
    position = np.arange(rows.ids.shape[1])[None]
    return rows._replace(free=(position >= ends[:, None]) & (position < rows.lengths[:, None]))


def _room(begin: bool) -> str:
    return "the context less the token that begins a text" if begin else "the context"


def by_width(rows: Rows) -> Iterator[tuple[np.ndarray, Rows]]:
    """Yield the rows in groups of a similar length, each with less padding: (numbers, rows).

    Widths are powers of two from 16 on (and that of `rows`), so that few programs are compiled.
    """
    full = rows.ids.shape[1]
    powers = [max(16, 1 << (int(length) - 1).bit_length()) for length in rows.lengths]
    widths = np.minimum(powers, full)
    for width in np.unique(widths):
        numbers = np.flatnonzero(widths == width)
        yield (
            numbers,
            Rows(rows.ids[numbers, :width], rows.free[numbers, :width], rows.lengths[numbers]),
        )


def join_pieces(
    tokenizer: Tokenizer, rows: Sequence[Sequence[np.ndarray | int]], *, begin: bool
) -> Rows:
    """Return one row for each list of pieces; begin: after the token that begins a text."""
    front = np.array([begin_id(tokenizer)] if begin else [], np.int32)
    ids, free = [], []
    for pieces in rows:
        sizes = [p if isinstance(p, int) else len(p) for p in pieces]
        parts = [np.full(p, tokenizer.pad_id) if isinstance(p, int) else p for p in pieces]
        ids.append(np.concatenate([front, *parts]))
        gaps = [isinstance(p, int) for p in pieces]
        free.append(np.concatenate([np.zeros(len(front), bool), np.repeat(gaps, sizes)]))
    lengths = np.array([len(row) for row in ids], np.int32)
    shape = (len(ids), int(lengths.max()))
    rows_out = Rows(np.full(shape, tokenizer.pad_id, np.int32), np.zeros(shape, bool), lengths)
    for number, length in enumerate(lengths):
        rows_out.ids[number, :length] = ids[number]
        rows_out.free[number, :length] = free[number]
    return rows_out


def begin_id(tokenizer: Tokenizer) -> int:
    """Return the token that begins a text; raises InputError where there is none."""
    return end_id(tokenizer) if tokenizer.bos_id is None else tokenizer.bos_id


def end_id(tokenizer: Tokenizer) -> int:
    """Return the token that ends a text; raises InputError where there is none."""
    if tokenizer.eos_id is None:
        raise InputError(f"tokenizer {tokenizer.name!r} has no token that ends a text")
    return tokenizer.eos_id


def check_some(texts: Sequence[Any] | np.ndarray, name: str) -> None:
    """Raise InputError unless `texts` (of the argument `name`) are a list with something in it."""
    if isinstance(texts, str):
        raise InputError(f"{name} must be a list of texts, not one text")
    if len(texts) == 0:
        raise InputError(f"{name} is empty: give at least one")


def check_guidance(rows: Rows, options: SamplerOptions, *, begin: bool = True) -> None:
    """Raise InputError when guidance has nothing to weigh: no text is given in any of the rows."""
    if options.guidance == 1:
        return
    place = np.arange(rows.ids.shape[1])[None]
    after_begin = (place >= int(begin)) & (place < rows.lengths[:, None])
    if not (after_begin & ~rows.free).any():
        raise InputError("guidance weighs prompts: give some text, or leave it at 1")
