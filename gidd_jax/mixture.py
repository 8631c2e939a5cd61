"""Corpora that are mixed by weights, such as '0.7:wiki.txt,0.3:books/'."""

import os
from typing import NamedTuple

from gidd_jax.errors import InputError

_SMALLEST, _LARGEST = 1e-6, 1e6


class Part(NamedTuple):
    """One corpus of a mixture; weights are relative shares of the training rows."""

    weight: float
    path: str


def split_mixture(path: str) -> list[Part]:
    """Return the parts of a data path; one part of weight 1 where it names no weights.

    A weight is a number and a colon before a file, folder, glob, folder of shards, 'tfds:NAME' or
    'hf:OWNER/NAME'.
    What exists under a name is meant by it, whatever colons and commas are in there.
    Raises InputError when only some parts have weights, or one does not lie in [1e-6, 1e6].
    """
    pieces = [_weighted(piece) for piece in split_list(path)]
    if all(weight is None for weight, _ in pieces):
        return [Part(1.0, path)]
    parts = []
    for weight, corpus in pieces:
        if weight is None or not corpus:
            raise InputError(
                f"data path {path!r}: every part of a mixture needs a weight and a path, as in "
                f"'0.7:wiki.txt,0.3:books/'; {corpus!r} has none. A folder or glob is one part"
            )
        if not _SMALLEST <= weight <= _LARGEST:
            raise InputError(
                f"data path {path!r}: the weight of {corpus!r} must lie in "
                f"[{_SMALLEST:g}, {_LARGEST:g}]"
            )
        parts.append(Part(weight, corpus))
    return parts


def split_list(path: str) -> list[str]:
    """Return the parts of a comma list; a comma in the name of what exists separates nothing."""
    pieces = path.split(",")
    parts = []
    while pieces:
        lengths = range(len(pieces), 1, -1) if not exists(_weighted(pieces[0])[1]) else ()
        joined = (n for n in lengths if exists(_weighted(",".join(pieces[:n]))[1]))
        length = len(pieces) if exists(path) else next(joined, 1)
        parts.append(",".join(pieces[:length]))
        del pieces[:length]
        path = ""
    return parts


def exists(name: str) -> bool:
    """Tell whether there is a file or folder of that name."""
    return name != "" and os.path.exists(os.path.expanduser(name))


def _weighted(piece: str) -> tuple[float | None, str]:
    """The number before the first colon, None where there is none, and what it is the weight of."""
    head, colon, corpus = piece.partition(":")
    if not colon or exists(piece):
        return None, piece
    try:
        return float(head), corpus
    except ValueError:
        return None, piece
