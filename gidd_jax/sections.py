"""Sections of plain values with what is legal for each: what settings are made of."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, NamedTuple

from gidd_jax.cli import nearest
from gidd_jax.errors import InputError


class Legal(NamedTuple):
    """A test of a value and the words that say what passes it."""

    test: Callable[[Any], bool]
    words: str


def legal(test: Callable[[Any], bool], words: str) -> Any:
    """Return a field whose values pass the test."""
    return field(metadata={"legal": Legal(test, words)})


def one_of(*values: str) -> Any:
    """A field with one of these values."""
    return legal(lambda value: value in values, " | ".join(value or "''" for value in values))


def at_least(low: float) -> Any:
    """A number that is `low` or more."""
    return legal(lambda value: value >= low, f">= {low:g}")


def above(low: float) -> Any:
    """A number above `low`."""
    return legal(lambda value: value > low, f"> {low:g}")


def fraction() -> Any:
    """A number in [0, 1)."""
    return legal(lambda value: 0 <= value < 1, "in [0, 1)")


def share() -> Any:
    """A number in [0, 1]."""
    return legal(lambda value: 0 <= value <= 1, "in [0, 1]")


def not_empty() -> Any:
    """A text that is not empty."""
    return legal(lambda value: value != "", "not empty")


def axis() -> Any:
    """The size of an axis of the mesh, or -1."""
    return legal(lambda value: value >= 1 or value == -1, ">= 1, or -1 for the rest of the devices")


def matches(pattern: str, words: str) -> Any:
    """A text that fits the pattern; words: what does."""
    return legal(lambda value: re.fullmatch(pattern, value) is not None, words)


class Section:
    """Checks types and legal values of a frozen dataclass of plain values."""

    @classmethod
    def section_name(cls) -> str:
        return cls.__name__.removesuffix("Settings").lower()

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            name = f"{self.section_name()}.{item.name}"
            value = of_kind(name, getattr(self, item.name), item.type)
            wanted = item.metadata.get("legal")
            if wanted is not None and not wanted.test(value):
                raise InputError(f"{name} = {value!r}: must be {wanted.words}")
            object.__setattr__(self, item.name, value)


def of_kind(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`: an int serves as a float, nothing else is converted."""
    if kind is float and type(value) is int and abs(value) < 1 << 1000:
        value = float(value)
    if type(value) is not kind:
        words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        raise InputError(f"{name} = {value!r}: must be {words.get(kind, 'a tuple')}")
    return value


def check_keys(prefix: str, values: Mapping[str, Any], legal: set[str]) -> None:
    """Raise InputError unless the values have exactly the legal keys."""
    for key in values:
        if key not in legal:
            raise InputError(f"unknown config key {prefix}{key}: {nearest(key, legal)}")
    for key in sorted(legal):
        if key not in values:
            raise InputError(f"config key {prefix}{key} is missing: configs/base.py has them all")


def split_own_process(name: str) -> tuple[str, str] | None:
    """Return FILE.py and CLASS of 'FILE.py:CLASS'; None for what is no such name."""
    match = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", name)
    return (match[1], match[2]) if match and name.isprintable() else None
