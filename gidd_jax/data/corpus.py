"""Text corpora as random-access documents, and the split into training and validation."""

import dataclasses
import functools
import glob
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from absl import logging
from tqdm import tqdm

from gidd_jax.data.files import (
    ARRAY_SUFFIXES,
    SUFFIXES,
    FileDocuments,
    ParquetDocuments,
    check_file,
    open_text_file,
)
from gidd_jax.data.hugging_face import HuggingFaceDocuments
from gidd_jax.data.tfds import TfdsDocuments
from gidd_jax.errors import InputError
from gidd_jax.mixture import exists, split_list, split_mixture

T = TypeVar("T")
EMBEDDED = "embedded"
_MAX_NAMED = 3  # files that a message names
_SPLIT_HELP = "legal values: 'last:COUNT', 'hash:FRACTION', 'path:FILES', 'split:NAME' (tfds, hf)"


class Documents(Protocol):
    """A random-access sequence of texts.

    `num_bytes` is its size in bytes (an upper bound where markup surrounds the texts);
    `is_random_access` is False where reading in any order but the stored one is slow.
    """

    num_bytes: int
    is_random_access: bool

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class CorpusSplits:
    """The training and the validation documents of a corpus; no document is in both."""

    train: Documents
    validation: Documents


class Chain(Generic[T]):
    """Several random-access sequences, one after the other."""

    def __init__(self, parts: Sequence[Any]):
        self._parts = list(parts)
        self._ends = np.cumsum([len(p) for p in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> T:
        part = int(np.searchsorted(self._ends, index, side="right"))
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]


class Concatenation(Chain[str]):
    """Several sequences of documents, one after the other."""

    def __init__(self, parts: Sequence[Documents]):
        super().__init__(parts)
        self.num_bytes = sum(p.num_bytes for p in parts)
        self.is_random_access = all(p.is_random_access for p in parts)


class Subset:
    """The documents at the given indices, int64 [num_documents]."""

    def __init__(self, documents: Documents, indices: np.ndarray):
        self._documents = documents
        self._indices = indices
        self.num_bytes = documents.num_bytes * len(indices) // max(len(documents), 1)
        self.is_random_access = documents.is_random_access

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> str:
        return self._documents[int(self._indices[index])]


class DatasetDocuments(Documents, Protocol):
    """Documents of a dataset; `version` says in words which one, wherever it is stored."""

    version: str


# Collections of datasets by the prefix of their names: name, split and text key to documents.
DATASETS: dict[str, Callable[[str, str, str], DatasetDocuments]] = {
    "tfds": TfdsDocuments,
    "hf": HuggingFaceDocuments,
}


def open_corpus(path: str, validation: str, text_key: str, txt_documents: str) -> CorpusSplits:
    """Open `path` and split it by the rule `validation`.

    `path` is 'embedded', a file, folder or glob of .txt, .jsonl, .jsonl.gz, .jsonl.xz and .parquet,
    a comma list of those, 'tfds:NAME' or 'hf:OWNER/NAME' (a folder for a prepared one). The rule is
    one of 'last:COUNT', 'hash:FRACTION' (of document contents), 'path:FILES', 'split:NAME'.
    Of a mixture it is applied to each part, and the splits are those of all parts, end to end.
    Raises InputError when something is missing, empty or unreadable.
    """
    paths = [part.path for part in split_mixture(path)]
    return open_parts(paths, validation, text_key, txt_documents)


def open_parts(
    paths: Sequence[str], validation: str, text_key: str | None, txt_documents: str
) -> CorpusSplits:
    """Open the parts of a mixture, as `open_corpus` does, without their weights.

    text_key None: documents are whole records, as JSON.
    """
    parts = [_open_part(path, validation, text_key, txt_documents) for path in paths]
    if len(parts) == 1:
        return parts[0]
    # Files that the rule names are the same for each part.
    held_out = parts[:1] if validation.startswith("path:") else parts
    return CorpusSplits(
        Concatenation([part.train for part in parts]),
        Concatenation([part.validation for part in held_out]),
    )


def _open_part(
    path: str, validation: str, text_key: str | None, txt_documents: str
) -> CorpusSplits:
    dataset = dataset_of(path)
    if dataset is not None:
        if text_key is None:
            raise InputError(f"data path {path!r}: records are read from .jsonl and .parquet alone")
        return _open_dataset(*dataset, validation, text_key)
    rule, _, argument = validation.partition(":")
    files = list_files(path)
    if rule == "path":
        held_out = list_files(argument)
        files = [f for f in files if f.resolve() not in {h.resolve() for h in held_out}]
        if not files:
            raise InputError(f"validation {validation!r} takes every file of data path {path!r}")
        train = _open_files(files, text_key, txt_documents)
        return _checked(train, _open_files(held_out, text_key, txt_documents), path, validation)
    return _split_by_document(_open_files(files, text_key, txt_documents), path, validation)


def _open_dataset(kind: str, name: str, validation: str, text_key: str) -> CorpusSplits:
    open_split, path = DATASETS[kind], f"{kind}:{name}"
    rule, _, argument = validation.partition(":")
    if rule == "path":
        raise InputError(f"validation {validation!r} does not fit a {kind} corpus; {_SPLIT_HELP}")
    if rule != "split":
        return _split_by_document(open_split(name, "train", text_key), path, validation)
    if argument.split("[")[0] == "train":
        raise InputError(
            f"validation {validation!r} is part of the training split: "
            "name another split, or use 'last:COUNT' or 'hash:FRACTION'"
        )
    train, held_out = (open_split(name, split, text_key) for split in ("train", argument))
    return _checked(train, held_out, path, validation)


def dataset_of(path: str) -> tuple[str, str] | None:
    """The collection in DATASETS and the name of a dataset; None where `path` means files."""
    kind, colon, name = path.partition(":")
    return (kind, name) if colon and kind in DATASETS and not exists(path) else None


def list_files(path: str) -> list[Path]:
    """Files of a comma list of files, folders and globs, each folder in sorted order."""
    return list(named_files(path).values())


def named_files(path: str) -> dict[str, Path]:
    """The files of `list_files` by names that do not say where the folders of `path` lie."""
    if path == EMBEDDED:
        file = Path(str(resources.files("gidd_jax") / "assets/austen.jsonl"))
        return {file.name: file}
    names: dict[Path, str] = {}
    for part in split_list(path):
        if not part:
            raise InputError(f"data path {path!r} has an empty part")
        folder, found, skipped = _find_files(Path(part).expanduser())
        if not found:
            kinds = ", ".join(SUFFIXES + ARRAY_SUFFIXES)
            others = f"; it holds {_few(skipped)}" if skipped else ""
            raise InputError(f"data path {part!r} does not exist or holds no {kinds}{others}")
        if skipped:
            of_arrays = found[0].name.endswith(ARRAY_SUFFIXES)
            kinds = ", ".join(ARRAY_SUFFIXES if of_arrays else SUFFIXES)
            _warn_once(f"data path {part!r}: skipped {_few(skipped)}, not {kinds}")
        for file in found:
            names.setdefault(file, file.relative_to(folder).as_posix())
    if len({file.name.endswith(ARRAY_SUFFIXES) for file in names}) > 1:
        raise InputError(
            f"data path {path!r} holds both arrays of ids and texts: give one of them, or a mixture"
        )
    files: dict[str, Path] = {}
    seen: Counter[str] = Counter()
    for file, name in names.items():
        seen[name] += 1
        files[name if seen[name] == 1 else f"{name} ({seen[name]})"] = file
    return files


def _find_files(location: Path) -> tuple[Path, list[Path], list[str]]:
    """The folder that a file, folder or glob begins in, its files in sorted order, and the names
    of others in a folder."""
    if location.is_dir():
        seen = [f for f in sorted(location.rglob("*")) if not (f.name[0] == "." or f.is_dir())]
        kinds = SUFFIXES + ARRAY_SUFFIXES
        found = [f for f in seen if f.name.endswith(kinds)]
        for file in found:
            check_file(file)
        others = [f.name for f in seen if not f.name.endswith(kinds)]
        return location, found, others
    if location.exists():
        check_file(location)
        return location.parent, [location], []
    fixed = Path()
    for name in location.parts:
        if set("*?[") & set(name) and not (fixed / name).exists():
            break
        fixed /= name
    pattern = Path(*location.parts[len(fixed.parts) :])
    names = glob.glob(str(pattern), root_dir=fixed, recursive=True) if pattern.parts else []
    found = [fixed / name for name in sorted(names) if not (fixed / name).is_dir()]
    for file in found:
        check_file(file)
    return fixed, found, []


def _few(names: Sequence[str]) -> str:
    """How many files, and the first of their names."""
    more = ", ..." if len(names) > _MAX_NAMED else ""
    count = f"{len(names)} other file" + ("s" if len(names) > 1 else "")
    return f"{count} ({', '.join(names[:_MAX_NAMED])}{more})"


@functools.cache  # a run lists its files several times
def _warn_once(message: str) -> None:
    logging.warning("%s", message)


def iterate(documents: Documents, label: str) -> Iterator[str]:
    """All documents in order, with a progress bar when the output is a terminal."""
    # disable=None: no bar when the output is not a terminal.
    for index in tqdm(range(len(documents)), label, disable=None, unit="doc", leave=False):
        yield documents[index]


def _open_files(files: Sequence[Path], text_key: str | None, txt_documents: str) -> Documents:
    parts: list[FileDocuments | ParquetDocuments] = []
    for file in tqdm(files, "Indexing files", disable=None, unit="file", leave=False):
        parts.append(open_text_file(file, text_key, txt_documents))
    return Concatenation(parts)


def _split_by_document(documents: Documents, path: str, validation: str) -> CorpusSplits:
    def contents() -> Iterator[bytes]:
        return (text.encode() for text in iterate(documents, "Hashing documents"))

    held_out = held_out_by(validation, path, len(documents), contents)
    train = Subset(documents, np.flatnonzero(~held_out))
    return _checked(train, Subset(documents, np.flatnonzero(held_out)), path, validation)


def held_out_by(
    validation: str, path: str, count: int, contents: Callable[[], Iterable[bytes]]
) -> np.ndarray:
    """Which of `count` documents or rows the rule 'last:COUNT' or 'hash:FRACTION' holds out, bool.

    contents: the bytes that are hashed. Raises InputError for another rule.
    """
    rule, _, argument = validation.partition(":")
    make_mask: dict[str, Callable[[], np.ndarray]] = {
        "last": lambda: _last(count, _count(argument, validation)),
        "hash": lambda: _hashed(count, contents(), _fraction(argument, validation)),
    }
    if rule not in make_mask:
        raise InputError(
            f"validation {validation!r} does not fit data path {path!r}; {_SPLIT_HELP}"
        )
    return make_mask[rule]()


def _last(num_documents: int, count: int) -> np.ndarray:
    return np.arange(num_documents) >= num_documents - count


def _hashed(count: int, contents: Iterable[bytes], fraction: float) -> np.ndarray:
    """Bool [count]; equal contents fall on the same side, whatever their order."""
    held_out = np.zeros(count, bool)
    for i, content in enumerate(contents):
        digest = hashlib.blake2b(content, digest_size=8).digest()
        held_out[i] = int.from_bytes(digest, "big") < fraction * 2**64
    return held_out


def _count(argument: str, validation: str) -> int:
    if not re.fullmatch(r"[1-9][\d_]*", argument):
        raise InputError(f"validation {validation!r}: COUNT must be a positive integer")
    return int(argument)


def _fraction(argument: str, validation: str) -> float:
    try:
        fraction = float(argument)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction < 1:
        raise InputError(f"validation {validation!r}: FRACTION must lie between 0 and 1")
    return fraction


def _checked(train: Documents, held_out: Documents, path: str, validation: str) -> CorpusSplits:
    if len(train) + len(held_out) == 0 or train.num_bytes + held_out.num_bytes == 0:
        raise InputError(f"data path {path!r} holds no text")
    check_split(len(train), len(held_out), path, validation, "document")
    return CorpusSplits(train, held_out)


def check_split(train: int, held_out: int, path: str, validation: str, kind: str) -> None:
    """Raise InputError when one of two splits has nothing of the `kind`: documents or rows."""
    for name, count in (("training", train), ("validation", held_out)):
        if count == 0:
            raise InputError(
                f"validation {validation!r} leaves no {name} {kind} of the "
                f"{train + held_out} in {path!r}: choose another rule; {_SPLIT_HELP}"
            )
