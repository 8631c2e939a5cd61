"""Corpora of ids in arrays: rows that are as they are, and which of their positions are given.

A .npy holds ids int [N, L], a .npz `ids` and, if some positions are given, `given` bool [N, L]. A
.uint16.bin or .uint32.bin is one long run of little-endian ids, cut into windows of the context.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from gidd_jax.data.corpus import Chain, check_split, dataset_of, held_out_by, list_files
from gidd_jax.data.files import ARRAY_SUFFIXES
from gidd_jax.data.rows import NO_FRAME, Records, are_illegal, legal_ids
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError, first_line
from gidd_jax.mixture import split_mixture
from gidd_jax.settings import DataSettings, Settings

_BIN_TYPES = {".uint16.bin": np.dtype("<u2"), ".uint32.bin": np.dtype("<u4")}
_NAMES = ("ids", "given")  # of the arrays in a .npz
_CHECKED_ROWS = 1 << 14  # at a time
NO_TEXT = -1  # in place of the bytes that a row stands for: it is of an array, and stands for none


class ArrayRows(NamedTuple):
    """Rows of ids, and which of their positions are given (None: nowhere)."""

    ids: Records
    given: Records | None = None

    def pick(self, indices: np.ndarray) -> "ArrayRows":
        """The rows at the indices int64 [num_rows]."""
        given = None if self.given is None else _Picked(self.given, indices)
        return ArrayRows(_Picked(self.ids, indices), given)


class _Picked:
    def __init__(self, records: Records, indices: np.ndarray):
        self._records = records
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._records[int(self._indices[index])]


class _NoMarks:
    """Which positions of records are given where none is."""

    def __init__(self, records: Records | Sequence[np.ndarray]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.zeros(len(self._records[index]), bool)


def marks_of(records: Records | Sequence[np.ndarray], given: Records | None) -> Records:
    """Which positions of the records are given, also where none is."""
    return _NoMarks(records) if given is None else given


def is_of_arrays(path: str) -> bool:
    """Tell whether a data path, no mixture, names arrays; raises InputError beside texts."""
    if dataset_of(path) is not None:
        return False
    return any(file.name.endswith(ARRAY_SUFFIXES) for file in list_files(path))


def open_splits(
    paths: Sequence[str], settings: DataSettings, tokenizer: Tokenizer, seq_len: int
) -> tuple[ArrayRows, ArrayRows]:
    """Training and validation rows of the parts of a mixture, by the rule data.validation.

    Raises InputError when a file is no array of rows of `seq_len` ids of the tokenizer.
    """
    _check_frame(settings)
    parts = [_split(path, settings, tokenizer, seq_len) for path in paths]
    # Files that the rule names are the same for each part.
    held_out = parts[:1] if settings.validation.startswith("path:") else parts
    return joined([train for train, _ in parts]), joined([some for _, some in held_out])


def open_whole(path: str, settings: DataSettings, tokenizer: Tokenizer, seq_len: int) -> ArrayRows:
    """All rows of a data path, end to end; raises InputError as `open_splits`."""
    _check_frame(settings)
    return _read_files(list_files(path), tokenizer, seq_len)


def joined(parts: Sequence[ArrayRows]) -> ArrayRows:
    """Rows of several arrays, end to end."""
    if len(parts) == 1:
        return parts[0]
    ids = Chain([part.ids for part in parts])
    if all(part.given is None for part in parts):
        return ArrayRows(ids)
    return ArrayRows(ids, Chain([marks_of(*part) for part in parts]))


def with_marks(settings: Settings) -> Settings:
    """Return the settings with data.marked as the arrays of data.path say.

    Raises InputError when it is set and no position is given, when the validation's files alone
    mark some, or when a file cannot be read.
    """
    data = settings.data
    paths = [part.path for part in split_mixture(data.path)]
    marked = data.row_mode == NO_FRAME and any(map(_has_marks, paths))
    if data.marked and not marked:
        raise InputError(
            f"data.marked = True: no array of data.path={data.path} marks given positions: set it "
            "to False, or put `given` beside `ids`"
        )
    rule, _, held_out = data.validation.partition(":")
    is_told = data.row_mode != NO_FRAME or marked or data.has_givens
    if rule == "path" and not is_told and _has_marks(held_out):
        raise InputError(
            f"data.validation={data.validation} marks given positions, and no array of "
            f"data.path={data.path} does: set data.givens above 0, so that training gives some, "
            "or put `given` beside its `ids`"
        )
    return dataclasses.replace(settings, data=dataclasses.replace(data, marked=marked))


def _check_frame(settings: DataSettings) -> None:
    if settings.row_mode != NO_FRAME:
        raise InputError(
            f"data.path={settings.path} holds arrays of ids, whose rows have no frame: set "
            "data.frame=none"
        )


def _has_marks(path: str) -> bool:
    return any("given" in _names(file) for file in _files_of_arrays(path))


def _files_of_arrays(path: str) -> list[Path]:
    # A folder of shards holds no array, nor text.
    found = Path(path).expanduser()
    is_other = dataset_of(path) is not None or (found.is_dir() and not _has_arrays(found))
    return [] if is_other else [f for f in list_files(path) if f.name.endswith(ARRAY_SUFFIXES)]


def _has_arrays(folder: Path) -> bool:
    return any(file.name.endswith(ARRAY_SUFFIXES) for file in folder.rglob("*"))


def _split(
    path: str, settings: DataSettings, tokenizer: Tokenizer, seq_len: int
) -> tuple[ArrayRows, ArrayRows]:
    rule, _, argument = settings.validation.partition(":")
    if rule == "path":
        files = list_files(argument)
        held_out = {file.resolve() for file in files}
        rest = [file for file in list_files(path) if file.resolve() not in held_out]
        if not rest:
            raise InputError(
                f"validation {settings.validation!r} takes every file of data path {path!r}"
            )
        return _read_files(rest, tokenizer, seq_len), _read_files(files, tokenizer, seq_len)
    rows = _read_files(list_files(path), tokenizer, seq_len)

    def contents() -> Iterator[bytes]:
        numbers = tqdm(range(len(rows.ids)), "Hashing rows", disable=None, leave=False)
        return (np.asarray(rows.ids[number], "<i8").tobytes() for number in numbers)

    mask = held_out_by(settings.validation, path, len(rows.ids), contents)
    check_split(int((~mask).sum()), int(mask.sum()), path, settings.validation, "row")
    return rows.pick(np.flatnonzero(~mask)), rows.pick(np.flatnonzero(mask))


def _read_files(files: Iterable[Path], tokenizer: Tokenizer, seq_len: int) -> ArrayRows:
    parts = []
    for file in files:
        arrays = _read_bin(file, seq_len) if file.name.endswith(".bin") else _read_numpy(file)
        ids, given = arrays["ids"], arrays.get("given")
        _check_ids(file, ids, tokenizer, seq_len)
        if given is not None:
            _check_given(file, ids, given)
        parts.append(ArrayRows(ids, given))
    return joined(parts)


def _read_bin(file: Path, seq_len: int) -> dict[str, Any]:
    """The windows of one long run of ids; what is left after the last whole one is left out."""
    kind = next((dtype for end, dtype in _BIN_TYPES.items() if file.name.endswith(end)), None)
    if kind is None:
        raise InputError(
            f"{file}: its name must say what its ids are: rename it to .uint16.bin or .uint32.bin"
        )
    size = file.stat().st_size
    if size % kind.itemsize:
        raise InputError(
            f"{file} has {size} bytes, no whole number of {kind.name} ids: name it after what it is"
        )
    count = size // kind.itemsize // seq_len
    if not count:
        raise InputError(
            f"{file} holds {size // kind.itemsize} ids, less than one row of model.max_seq_len = "
            f"{seq_len}"
        )
    rest = size // kind.itemsize - count * seq_len
    if rest:
        logging.info("%s: its last %d ids fill no row, and are left out", file, rest)
    return {"ids": np.memmap(file, kind, "r", shape=(count, seq_len))}


def _read_numpy(file: Path) -> dict[str, Any]:
    try:
        found: Any = np.load(file, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"ids": found}
        with found:
            unknown = [name for name in found if name not in _NAMES]
            if unknown or "ids" not in found:
                raise InputError(
                    f"{file} holds {', '.join(found) or 'nothing'}: must be `ids` int [N, L] and, "
                    "if positions are given, `given` bool [N, L]"
                )
            return {name: found[name] for name in found}
    except InputError:
        raise
    except Exception as error:  # NumPy's, zipfile's and zlib's own, and sizes beyond the memory
        raise _not_an_array(file, error) from error


def _names(file: Path) -> list[str]:
    """The names of the arrays in a .npz; none for other files."""
    if not file.name.endswith(".npz"):
        return []
    try:
        found: Any = np.load(file, allow_pickle=False)
        with found:
            return list(found)
    except Exception as error:  # as above
        raise _not_an_array(file, error) from error


def _not_an_array(file: Path, error: Exception) -> InputError:
    # In the words of np.load, and of its memory maps; the first goes on with unsafe advice.
    if any(words in str(error) for words in ("Object arrays", "Python objects")):
        return InputError(
            f"{file} holds Python objects, such as rows of unequal length: must be ids int [N, L]"
        )
    return InputError(f"{file} is no file of arrays, or damaged: {first_line(error)}")


def _check_ids(file: Path, ids: np.ndarray, tokenizer: Tokenizer, seq_len: int) -> None:
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{file} holds {ids.dtype} {list(ids.shape)}: must be ids, integers [N, L]"
        )
    if not len(ids):
        raise InputError(f"{file} holds no row")
    if ids.shape[1] != seq_len:
        raise InputError(
            f"{file} has rows of {ids.shape[1]} ids, model.max_seq_len is {seq_len}: rows without "
            "a frame are as long as the context: set it to that"
        )
    for start in range(0, len(ids), _CHECKED_ROWS):
        part = np.asarray(ids[start : start + _CHECKED_ROWS])
        bad = are_illegal(part, tokenizer)
        if bad.any():
            row, place = np.argwhere(bad)[0]
            raise InputError(
                f"{file}: row {start + row} holds {part[row, place]}: ids of tokenizer "
                f"{tokenizer.name!r} are {legal_ids(tokenizer)}"
            )


def _check_given(file: Path, ids: np.ndarray, given: np.ndarray) -> None:
    if given.dtype != np.bool_ or given.shape != ids.shape:
        raise InputError(
            f"{file}: `given` is {given.dtype} {list(given.shape)}: must be bool "
            f"{list(ids.shape)}, as `ids`"
        )
    full = np.flatnonzero(given.all(axis=1))
    if len(full):
        raise InputError(f"{file}: every position of row {full[0]} is given: leave some free")
