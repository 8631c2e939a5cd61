"""Pre-tokenised corpora: ArrayRecord shards and their manifest."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gidd_jax.data.files import stays_in_folder
from gidd_jax.data.rows import ids_dtype
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError

MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
PLAN = "plan.json"  # what prepare_data set out to make
SPLITS = ("train", "validation")
_FORMAT = 1
_HEADER = np.dtype("<u4")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard file: its size in bytes, its counts and the SHA-256 of its contents.

    `tokens` counts BOS and EOS; `bytes` are the UTF-8 bytes of the documents' texts.
    """

    file: str
    size: int
    sha256: str
    documents: int
    records: int
    tokens: int
    bytes: int

    def __post_init__(self):
        counts = (self.size, self.documents, self.records, self.tokens, self.bytes)
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError("a count that is none")
        if not isinstance(self.sha256, str) or not stays_in_folder(self.file):
            raise ValueError("a shard that is no file of the folder")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds and how it was made."""

    path: str
    validation: str
    tokenizer: str
    fingerprint: str
    vocab_size: int
    mode: str
    seq_len: int
    splits: dict[str, list[Shard]]

    def __post_init__(self):
        words = (self.path, self.validation, self.tokenizer, self.fingerprint, self.mode)
        sizes = (self.vocab_size, self.seq_len)
        if not all(isinstance(w, str) for w in words) or any(type(n) is not int for n in sizes):
            raise TypeError("a value of another kind")
        if any(not self.totals(split)["records"] for split in SPLITS):
            raise ValueError("a split without records")

    def write(self, folder: Path) -> None:
        """Write manifest.json."""
        content = {"format": _FORMAT, **dataclasses.asdict(self)}
        content["totals"] = {split: self.totals(split) for split in SPLITS}
        temporary = folder / (MANIFEST + ".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(folder / MANIFEST)

    def totals(self, split: str) -> dict[str, int]:
        """Counts of one split summed over its shards."""
        names = ("documents", "records", "tokens", "bytes")
        return {n: sum(getattr(s, n) for s in self.splits[split]) for n in names}

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read manifest.json; raises InputError when it is missing or cannot be understood."""
        file = folder / MANIFEST
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            content.pop("totals")
            version = content.pop("format")
            splits = {s: [Shard(**d) for d in content["splits"][s]] for s in SPLITS}
            manifest = cls(**{**content, "splits": splits})
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} holds no {MANIFEST}: run gidd_jax.prepare_data to its end"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{file} is damaged ({error}): prepare the data again") from error
        if version != _FORMAT:
            raise InputError(f"{file} has format {version}, not {_FORMAT}: prepare the data again")
        return manifest


class ShardRecords:
    """Random-access records of the shards of one split: ids, and bytes by `num_bytes`.

    num_documents: those that the records were cut from.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], vocab_size: int):
        import grain

        self._files = [str(folder / s.file) for s in shards]
        self._ends = np.cumsum([s.records for s in shards])
        self.num_documents = sum(s.documents for s in shards)
        self._dtype = np.dtype(ids_dtype(vocab_size)).newbyteorder("<")
        try:
            source: Any = grain.sources.ArrayRecordDataSource(self._files)
            num_records = len(source)
        except Exception as error:  # a file whose header or footer does not parse
            raise InputError(f"damaged shard in {folder} ({error}): {_remedy(folder)}") from error
        self._source = source
        if num_records != int(self._ends[-1]):
            raise InputError(
                f"the shards in {folder} hold {num_records} records, "
                f"the manifest says {self._ends[-1]}: {_remedy(folder)}"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        return self._decode(index)[1]

    def num_bytes(self, index: int) -> int:
        """UTF-8 bytes that the tokens of a record stand for."""
        return self._decode(index)[0]

    def _decode(self, index: int) -> tuple[int, np.ndarray]:
        try:
            record = self._source[index]
        except Exception as error:  # a checksum that does not match
            file = Path(self._files[int(np.searchsorted(self._ends, index, side="right"))])
            raise InputError(f"shard {file} is damaged: {_remedy(file.parent)}") from error
        header = np.frombuffer(record, _HEADER, 1)
        return int(header[0]), np.frombuffer(record, self._dtype, offset=_HEADER.itemsize)


def encode_record(ids: np.ndarray, num_bytes: int, vocab_size: int) -> bytes:
    """A record: number of bytes as a little-endian uint32, then the ids as uint16 or uint32."""
    dtype = np.dtype(ids_dtype(vocab_size)).newbyteorder("<")
    return np.array([num_bytes], _HEADER).tobytes() + ids.astype(dtype).tobytes()


def is_shard_folder(path: str) -> bool:
    """Whether a data path is a folder that prepare_data wrote or was writing."""
    return any((Path(path).expanduser() / n).is_file() for n in (MANIFEST, PLAN))


def open_shards(
    path: str, tokenizer: Tokenizer, mode: str, seq_len: int
) -> tuple[ShardRecords, ShardRecords]:
    """Training and validation records of a folder.

    Raises InputError when they were made with another tokenizer, mode or seq_len, or when a shard
    is missing or has another size than it had.
    """
    folder = Path(path).expanduser()
    manifest = Manifest.read(folder)
    for name, made, wanted in (
        ("mode", manifest.mode, mode),
        ("seq_len", manifest.seq_len, seq_len),
        ("vocab_size", manifest.vocab_size, tokenizer.vocab_size),
    ):
        if made != wanted:
            raise InputError(
                f"the shards in {folder} were made with {name} {made}, this run has {wanted}: "
                f"set it to {made} or prepare the data again"
            )
    if not tokenizer.has_fingerprint(manifest.fingerprint):
        raise InputError(
            f"the shards in {folder} were made with tokenizer {manifest.tokenizer!r} as it was "
            f"then, this run's {tokenizer.name!r} gives other ids: use "
            f"{folder / TOKENIZER_FOLDER} or prepare the data again"
        )
    for shard in (s for split in SPLITS for s in manifest.splits[split]):
        check_size(folder, shard)
    train, validation = (
        ShardRecords(folder, manifest.splits[split], manifest.vocab_size) for split in SPLITS
    )
    return train, validation


def check_size(folder: Path, shard: Shard) -> None:
    """Raise InputError when a shard is missing or has another size than it had."""
    file = folder / shard.file
    if not file.is_file():
        raise InputError(f"shard {file} is missing: {_remedy(folder)}")
    if file.stat().st_size != shard.size:
        size = file.stat().st_size
        raise InputError(
            f"shard {file} is damaged: {size} bytes instead of {shard.size}: {_remedy(folder)}"
        )


def verify(folder: Path) -> Manifest:
    """Hash every shard against the manifest; raises InputError that names the first bad one."""
    manifest = Manifest.read(folder)
    for shard in (s for split in SPLITS for s in manifest.splits[split]):
        check_size(folder, shard)
        if sha256(folder / shard.file) != shard.sha256:
            raise InputError(f"shard {folder / shard.file} is damaged: {_remedy(folder)}")
    return manifest


def sha256(file: Path) -> str:
    """SHA-256 of a file's contents."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remedy(folder: Path) -> str:
    return (
        f"delete it and run gidd_jax.prepare_data with --out={folder} as before; "
        "it makes only what is missing"
    )
