"""Texts that commands are given: one reader, and the check of texts that come from elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gidd_jax.data.array_files import read_arrays, unpack_texts
from gidd_jax.data.files import check_file, open_text_file, read_whole
from gidd_jax.errors import InputError


class Texts(NamedTuple):
    """Texts of a file, and what samples were drawn with where the file says so."""

    texts: list[str]
    precision: str | None = None


def read_texts(path: str | Path, flag: str) -> Texts:
    """Read a file of samples (.npz), or of texts as a corpus is read, a .txt line by line.

    Raises InputError, which names `flag`, when it is no such file or holds no text.
    """
    file = Path(path).expanduser()
    try:
        if file.suffix == ".npz":
            return _read_samples(file)
        documents = open_text_file(file, "text", "line")
        texts = [documents[i] for i in range(len(documents))]
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    if not texts:
        raise InputError(f"{flag}: {path} holds no text")
    return Texts(texts)


def read_text(path: str | Path, flag: str) -> str:
    """Read the one text of a file; raises InputError like `read_texts`."""
    try:
        return read_whole(Path(path).expanduser())
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error


def check_texts(texts: Sequence[object], name: str) -> None:
    """Raise InputError that names the first text that has no UTF-8, and what it is instead."""
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            # Python's way of passing on a byte of the command line that is no UTF-8.
            is_byte = 0xDC80 <= code <= 0xDCFF
            what = f"byte {code - 0xDC00:#x}" if is_byte else f"half of a surrogate pair {code:#x}"
            raise InputError(
                f"{name} {number} is no UTF-8 text: {what} at character {error.start + 1}"
            ) from error


def _read_samples(file: Path) -> Texts:
    check_file(file)
    names = ("texts", "texts_ends", "sampling_precision")
    found = read_arrays(file, names, "file of samples")
    texts = unpack_texts(found, "texts")
    if texts is None:
        raise InputError(f"{file} holds no texts [N]: write it with gidd_jax.sample --out")
    if not texts:
        raise InputError(f"{file} holds no text")
    precision = found.get("sampling_precision")
    return Texts(texts, None if precision is None else str(precision))
