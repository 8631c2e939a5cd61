"""Documents of one local file, found by byte offsets or row groups, not held in memory."""

import array
import gzip
import json
import lzma
import mmap
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gidd_jax.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
ARRAY_SUFFIXES = (".npy", ".npz", ".bin")  # of ids, see `data.arrays`
TXT_DOCUMENTS = ("file", "line", "blank_line")
_LEGAL = ", ".join(SUFFIXES)
# A compressed file has no random access: it is unpacked into memory, up to this many bytes.
MAX_UNPACKED_BYTES = 1 << 30

_BOM = b"\xef\xbb\xbf"
_SEPARATORS = {
    "line": rb"[\r\n]+",
    # To the end of the last blank line: what indents the next document belongs to it.
    "blank_line": rb"\r?\n[ \t]*\r?\n(?:\s*\n)?",
}
_UNPACKERS = {".gz": "gunzip", ".xz": "unxz", ".zst": "unzstd", ".bz2": "bunzip2", ".zip": "unzip"}


class FileDocuments:
    """Documents of a .txt or .jsonl file: byte spans int64 [num_documents, 2] into the file."""

    is_random_access = True

    def __init__(self, file: Path, separator: bytes | None, text_key: str | None):
        self._file = file
        self._text_key = text_key
        self._buffer = _read_buffer(file)
        self._size = len(self._buffer)
        if separator != _SEPARATORS["line"] and _has_only_cr(self._buffer):
            raise InputError(
                f"{file} ends its lines with CR alone, as old Macs did: convert it, with "
                "tr '\\r' '\\n'"
            )
        self._spans = _spans(self._buffer, separator)
        self.num_bytes = int((self._spans[:, 1] - self._spans[:, 0]).sum())
        if len(self) and text_key is not None:
            self[0]  # a wrong text key shows at the door, not in a worker

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        begin, end = (int(v) for v in self._spans[index])
        raw = self._buffer[begin:end]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            position = begin + error.start
            raise InputError(f"{self._file}: byte {position} is not UTF-8; convert it") from error
        return text if self._text_key is None else self._parse(text, index)

    def _parse(self, line: str, index: int) -> str:
        where = f"{self._file}: JSON document {index + 1}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON: {error}") from error
        return text_of(record, self._text_key or "", where)

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        if isinstance(self._buffer, mmap.mmap):
            del state["_buffer"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if "_buffer" not in state:
            self._buffer = _read_buffer(self._file)
            if len(self._buffer) != self._size:
                raise InputError(
                    f"{self._file} had {self._size} bytes when it was opened and has "
                    f"{len(self._buffer)} now: copy what other programs still write to"
                )


class ParquetDocuments:
    """Documents of a .parquet file; one row group is held in memory at a time.

    text_key: the column of the texts; None: documents are whole rows, as JSON.
    """

    is_random_access = False

    def __init__(self, file: Path, text_key: str | None):
        import pyarrow
        import pyarrow.parquet

        self._file = file
        self._text_key = text_key
        self._cached: tuple[int, list] = (-1, [])
        try:
            metadata = pyarrow.parquet.read_metadata(file)
            names = metadata.schema.to_arrow_schema().names
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{file} is not a Parquet file: {error}") from error
        if text_key is not None and text_key not in names:
            raise InputError(f"{file} has no column {text_key!r}; it has: {', '.join(names)}")
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        self._ends = np.cumsum([g.num_rows for g in groups], dtype=np.int64)
        self.num_bytes = sum(g.total_byte_size for g in groups) if metadata.num_rows else 0

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> str:
        group = int(np.searchsorted(self._ends, index, side="right"))
        cached_group, rows = self._cached
        if cached_group != group:
            rows = self._read_group(group)
            self._cached = (group, rows)
        row = rows[index - (int(self._ends[group - 1]) if group else 0)]
        if self._text_key is None:
            return json.dumps(row, ensure_ascii=False, default=str)
        return text_of({self._text_key: row}, self._text_key, f"{self._file}: row {index + 1}")

    def _read_group(self, group: int) -> list:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._file) as parquet:
                if self._text_key is None:
                    return parquet.read_row_group(group).to_pylist()
                return parquet.read_row_group(group, [self._text_key])[self._text_key].to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{self._file}: row group {group} is damaged: {error}") from error


def open_text_file(
    file: Path, text_key: str | None, txt_documents: str
) -> FileDocuments | ParquetDocuments:
    """Open one file by its suffix; `txt_documents` says what a document of a .txt file is.

    text_key None: documents are whole records, as JSON; a .txt has none.
    """
    if txt_documents not in TXT_DOCUMENTS:
        raise InputError(
            f"txt_documents {txt_documents!r}: legal values: {', '.join(TXT_DOCUMENTS)}"
        )
    check_file(file)
    if file.name.endswith(".parquet"):
        return ParquetDocuments(file, text_key)
    if file.name.endswith(".txt") and text_key is None:
        raise InputError(f"{file} holds no records: give .jsonl or .parquet")
    if file.name.endswith(".txt"):
        return FileDocuments(file, _SEPARATORS.get(txt_documents), None)
    if file.name.endswith(SUFFIXES):
        return FileDocuments(file, rb"\n", text_key)
    if file.name.endswith(ARRAY_SUFFIXES):
        raise InputError(f"{file} is an array of ids: give texts, or arrays alone in data.path")
    unpacker = _UNPACKERS.get(file.suffix.lower())
    fix = f"unpack it first, with {unpacker}" if unpacker else f"legal suffixes: {_LEGAL}"
    raise InputError(f"{file}: unknown kind of file; {fix}")


def read_whole(file: Path) -> str:
    """The text of one file, whatever its suffix, read as `txt_documents` "file" reads it.

    Raises InputError when there is no such file, it is no UTF-8 or holds no text.
    """
    check_file(file)
    documents = FileDocuments(file, None, None)
    if not len(documents):
        raise InputError(f"{file} holds no text")
    return documents[0]


def check_file(file: Path) -> None:
    """Raise InputError unless it is a plain file: what is read from a pipe is gone afterwards."""
    if not file.exists():
        raise InputError(f"no such file: {file}")
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "a pipe or device"
        raise InputError(f"{file} is {kind}: give a file, written to the end")


def stays_in_folder(name: object) -> bool:
    """Tell whether an entry of a manifest or an index is a plain file name, not a path."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def text_of(record: object, text_key: str, where: str) -> str:
    """The text of a record; raises InputError that begins with `where` if it has none."""
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where} has no {text_key!r}; it has: {keys}. Set the text key")
    text = record[text_key]
    if not isinstance(text, str):
        raise InputError(f"{where}: {text_key!r} is {type(text).__name__}, not a text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: {text_key!r} holds half of a surrogate pair") from error
    return text


def _read_buffer(file: Path) -> mmap.mmap | bytes:
    """The file's bytes: mapped where they are stored as they are, unpacked where compressed."""
    openers: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        if file.suffix not in openers:
            if file.stat().st_size == 0:
                return b""  # an empty file cannot be mapped
            with open(file, "rb") as stream:
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        with openers[file.suffix](file, "rb") as stream:
            data = stream.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if len(data) > MAX_UNPACKED_BYTES:
        limit = f"{MAX_UNPACKED_BYTES >> 20} MiB"
        raise InputError(f"{file} unpacks to more than {limit}: decompress it to .jsonl first")
    return data


def _has_only_cr(buffer: mmap.mmap | bytes) -> bool:
    return buffer.find(b"\n") < 0 and re.search(rb"\r[ \t]*\S", buffer) is not None


def _spans(buffer: mmap.mmap | bytes, separator: bytes | None) -> np.ndarray:
    """Begin and end of each piece between separators that is not blank, int64 [n, 2]."""
    blank = re.compile(rb"\s*")
    spans = array.array("q")

    def keep(begin: int, end: int) -> None:
        match = blank.match(buffer, begin, end)
        if match is None or match.end() < end:
            spans.extend((begin, end))

    start = len(_BOM) if buffer[: len(_BOM)] == _BOM else 0
    if separator is not None:
        for found in re.finditer(separator, buffer):
            keep(start, found.start())
            start = found.end()
    keep(start, len(buffer))
    return np.frombuffer(spans, np.int64).reshape(-1, 2) if spans else np.zeros((0, 2), np.int64)
