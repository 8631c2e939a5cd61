"""Long texts in parts: the tokenizers library needs some 230 bytes of memory for a byte of text.

A text is cut only where its tokenizer cuts it anyway, so that the ids of the parts are its ids.
"""

import itertools
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gidd_jax.errors import InputError

PART = 1 << 20  # characters: a text is cut from this length on
LOT = 4 << 20  # characters that are encoded together
MOST = 8 << 20  # characters of what cannot be cut: 2 GB of memory
_CONTEXT = 512  # characters on either side of a cut that must give the same ids with and without it
_TRIES = 64
_CUT = re.compile(r"(?<=\S)\s|(?<=\w)[^\w\s]")


class Part(NamedTuple):
    """A part of the text of this number (from 0)."""

    number: int
    text: str


def lots(texts: Sequence[str], splits: Callable[[str, str], bool]) -> Iterator[list[Part]]:
    """Yield the texts in lots of at most LOT characters or one part, long texts in several parts.

    splits(left, right) tells whether a tokenizer gives left + right the ids of both. Raises
    InputError for a text in which it nowhere says so for MOST characters.
    """
    lot: list[Part] = []
    size = 0
    for number, text in enumerate(texts):
        for part in divide(text, splits):
            if len(part) > MOST:
                raise InputError(
                    f"text {number + 1} of {len(texts)}, {reprlib.repr(text)}, has {len(text):,} "
                    f"characters, and this tokenizer takes it only whole: divide it into documents "
                    f"of at most {MOST:,} characters"
                )
            if lot and size + len(part) > LOT:
                yield lot
                lot, size = [], 0
            lot.append(Part(number, part))
            size += len(part)
    if lot:
        yield lot


def divide(text: str, splits: Callable[[str, str], bool]) -> list[str]:
    """Return parts of about PART characters that together are the text; the last may be longer."""
    parts, start = [], 0
    while len(text) - start > PART:
        cut = next((i for i in _candidates(text, start) if _fits(text, i, splits)), None)
        if cut is None:
            break
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


def _fits(text: str, cut: int, splits: Callable[[str, str], bool]) -> bool:
    return splits(text[max(cut - _CONTEXT, 0) : cut], text[cut : cut + _CONTEXT])


def _candidates(text: str, start: int) -> Iterator[int]:
    """Where words end in the second half of the next PART characters, some of the last ones."""
    for end in range(start + PART, start + PART // 2, -(PART // 16)):
        begin = end - PART // 16
        found = [begin + match.start() for match in _CUT.finditer(text[begin:end])]
        yield from itertools.islice(reversed(found), _TRIES)
