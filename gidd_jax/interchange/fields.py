"""The values of config files that others wrote, checked as they are read."""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gidd_jax.errors import InputError

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Fields:
    """The values of a config file, checked as they are read."""

    file: Path
    values: Mapping[str, Any]

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def section(self, key: str) -> "Fields":
        return Fields(self.file, self._typed(key, None, Mapping, "a section of keys"))

    def text(self, key: str) -> str:
        return self._typed(key, None, str, "a string")

    def flag(self, key: str, default: bool) -> bool:
        return self._typed(key, default, bool, "true or false")

    def number(self, key: str, default: float | None = None) -> float:
        try:
            return float(self._typed(key, default, (int, float), "a number"))
        except OverflowError as error:
            raise self.error(f"{key} is too large") from error

    def size(self, key: str, default: int | None = None) -> int:
        value = self._typed(key, default, int, "an integer")
        if not 1 <= value < 1 << 31:
            raise self.error(f"{key} = {reprlib.repr(value)}: must be at least 1, and below 2^31")
        return value

    def _typed(self, key: str, default: Any, kinds: Any, words: str) -> Any:
        value = self.values[key] if self.has(key) else default
        if value is None:
            raise self.error(f"{key} is missing: add it")
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            # Shortened: aliases of YAML can stand for more than the memory holds.
            raise self.error(f"{key} = {reprlib.repr(value)}: must be {words}")
        return value

    def error(self, message: str) -> InputError:
        return InputError(f"{self.file}: {message}")


def checked(file: Path, make: Callable[[], Made]) -> Made:
    """Return make(), with the name of the file before what its InputError says."""
    try:
        return make()
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
