"""The rows of a corpus, whatever it is made of: texts, shards, or arrays of ids."""

import dataclasses
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gidd_jax.data import arrays, rows, shards
from gidd_jax.data.answers import AnswerTexts, answer_rows
from gidd_jax.data.corpus import Chain, CorpusSplits, Documents, iterate, open_parts
from gidd_jax.data.rows import ANSWERS, NO_FRAME, Records
from gidd_jax.data.symbols import CHARS, characters_file, write_characters
from gidd_jax.data.tokenizer import Tokenizer, load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.mixture import split_mixture

if TYPE_CHECKING:
    from gidd_jax.settings import DataSettings

# Text up to this size is tokenised once, at the start, and held in memory as ids.
MAX_TEXT_BYTES = 256 << 20
_ENCODE_BYTES = 4 << 20  # text handed to the tokenizer at a time


class Source(NamedTuple):
    """One part of a mixture: its share, its rows, and which of their tokens are given, if any."""

    weight: float
    records: Records
    given: Records | None = None


class Validation(NamedTuple):
    """Rows of a validation split: ids, the UTF-8 bytes each stands for (`arrays.NO_TEXT` where it
    is no text), and which tokens are given, if any."""

    records: Records
    num_bytes: Sequence[int] | np.ndarray
    given: Records | None = None


class TokenisedOnTheFly:
    """Framed documents, each tokenised when it is read; in mode 'padded' cut to `seq_len`."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer, mode: str, seq_len: int):
        self._documents = documents
        self._tokenizer = tokenizer
        self._mode = mode
        self._limit = seq_len if mode == "padded" else None

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> np.ndarray:
        (ids,) = self._tokenizer.encode([self._documents[index]])
        return rows.frame(ids, self._tokenizer, self._mode)[0][: self._limit]


def train_sources(settings: "DataSettings", tokenizer: Tokenizer, seq_len: int) -> list[Source]:
    """Rows of the training split of each part of a mixture, or of the one corpus.

    Raises InputError when the data does not fit the settings.
    """
    rows.check_mode(settings.row_mode)
    return [
        _train_source(settings, weight, path, tokenizer, seq_len)
        for weight, path in split_mixture(settings.path)
    ]


def _train_source(
    settings: "DataSettings", weight: float, path: str, tokenizer: Tokenizer, seq_len: int
) -> Source:
    mode = settings.row_mode
    if mode == ANSWERS and shards.is_shard_folder(path):
        raise _no_shards(path)
    if shards.is_shard_folder(path):
        return Source(weight, shards.open_shards(path, tokenizer, mode, seq_len)[0])
    if arrays.is_of_arrays(path):
        train = arrays.open_splits([path], settings, tokenizer, seq_len)[0]
        return Source(weight, train.ids, train.given)
    documents = _open(settings, [path]).train
    if mode == ANSWERS:
        found = answer_rows(
            _in_memory(documents, settings, "training"), tokenizer, seq_len, "training"
        )
        return Source(weight, found.ids, found.given)
    is_large = documents.num_bytes > MAX_TEXT_BYTES
    if is_large and mode not in ("packed", NO_FRAME) and documents.is_random_access:
        # What cannot be read shows now, not after the steps that lead there.
        deque(iterate(documents, "Checking the training split"), maxlen=0)
        return Source(weight, TokenisedOnTheFly(documents, tokenizer, mode, seq_len))
    tokenised = tokenise_all(documents, tokenizer, settings, "training")
    if mode == "crop":
        return Source(weight, tokenised.whole())
    return Source(weight, rows.cut(tokenised, mode, seq_len))


def validation_source(settings: "DataSettings", tokenizer: Tokenizer, seq_len: int) -> Validation:
    """Rows of the validation split of all parts, those of texts first.

    Raises InputError when the data does not fit the settings.
    """
    mode = settings.row_mode
    rows.check_mode(mode)
    paths = [part.path for part in split_mixture(settings.path)]
    of_shards = [path for path in paths if shards.is_shard_folder(path)]
    if mode == ANSWERS and of_shards:
        raise _no_shards(of_shards[0])
    of_arrays = [path for path in paths if path not in of_shards and arrays.is_of_arrays(path)]
    texts = [path for path in paths if path not in of_shards and path not in of_arrays]
    found: list[Validation] = []
    if texts:
        held_out = _open(settings, texts).validation
    if texts and mode == ANSWERS:
        part = answer_rows(
            _in_memory(held_out, settings, "validation"), tokenizer, seq_len, "validation"
        )
        found.append(Validation(part.ids, part.num_bytes, part.given))
    elif texts:
        tokenised = tokenise_all(held_out, tokenizer, settings, "validation")
        windows = rows.cut(tokenised, mode, seq_len)
        found.append(Validation(windows, windows.sums(tokenised.num_bytes)))
    if of_arrays:
        ids, given = arrays.open_splits(of_arrays, settings, tokenizer, seq_len)[1]
        found.append(Validation(ids, np.full(len(ids), arrays.NO_TEXT), given))
    for path in of_shards:
        records = shards.open_shards(path, tokenizer, mode, seq_len)[1]
        found.append(Validation(records, [records.num_bytes(i) for i in range(len(records))]))
    if len(found) == 1:
        return found[0]
    marks = None
    if any(part.given is not None for part in found):
        marks = Chain([arrays.marks_of(part.records, part.given) for part in found])
    return Validation(
        Chain([part.records for part in found]),
        np.concatenate([part.num_bytes for part in found]),
        marks,
    )


def run_tokenizer(settings: "DataSettings", *, write: bool = True) -> Tokenizer:
    """The tokenizer of a run; a missing file of characters is written from the texts of the run.

    Rows of answers are filled up with the token that ends them: it then is the one that pads.

    write False: the tokenizer is what it would be, and the file stays missing. Raises InputError as
    `load_tokenizer` does.
    """

    def documents() -> list[Documents]:
        paths = [part.path for part in split_mixture(settings.path)]
        others = [path for path in paths if shards.is_shard_folder(path)]
        others += [path for path in paths if path not in others and arrays.is_of_arrays(path)]
        texts = [path for path in paths if path not in others]
        if not texts:
            return []
        corpus = _open(settings, texts)
        splits = [corpus.train, corpus.validation]
        return [AnswerTexts(s) for s in splits] if settings.row_mode == ANSWERS else splits

    tokenizer = tokenizer_for(settings.tokenizer, settings.row_mode, documents, write=write)
    if settings.row_mode != ANSWERS or tokenizer.eos_id is None:
        return tokenizer
    return dataclasses.replace(tokenizer, pad_id=tokenizer.eos_id)


def tokenizer_for(
    name: str, mode: str, documents: Callable[[], Sequence[Documents]], *, write: bool = True
) -> Tokenizer:
    """The tokenizer for rows of a mode; a missing file of characters is written from documents.

    write as in `run_tokenizer`. Raises InputError as `load_tokenizer` does.
    """
    ends = mode != NO_FRAME
    if name.startswith(CHARS) and not characters_file(name).exists():
        found = documents()
        texts = (text for part in found for text in iterate(part, "Collecting characters"))
        if found and write:
            write_characters(characters_file(name), texts)
        elif found:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / characters_file(name).name
                write_characters(file, texts)
                return load_tokenizer(f"{CHARS}{file}", ends=ends)
    return load_tokenizer(name, ends=ends)


def _open(settings: "DataSettings", paths: Sequence[str]) -> CorpusSplits:
    return open_parts(paths, settings.validation, settings.record_key, settings.txt_documents)


def tokenise_all(
    documents: Documents, tokenizer: Tokenizer, settings: "DataSettings", split: str
) -> rows.TokenisedDocuments:
    """Tokenise a split into memory; raises InputError when it is too large for that."""
    documents = _in_memory(documents, settings, split)
    parts, texts, size = [], [], 0
    for text in iterate(documents, f"Tokenising the {split} split"):
        texts.append(text)
        size += len(text)
        if size >= _ENCODE_BYTES:
            parts.append(rows.tokenise(texts, tokenizer, settings.row_mode))
            texts, size = [], 0
    if texts:
        parts.append(rows.tokenise(texts, tokenizer, settings.row_mode))
    return rows.join(parts)


def _no_shards(path: str) -> InputError:
    return InputError(
        f"data path {path!r} holds shards, which do not say what is a prompt: give the records, "
        ".jsonl or .parquet, with data.mode=answers"
    )


def _in_memory(documents: Documents, settings: "DataSettings", split: str) -> Documents:
    """Return documents that are few enough to be tokenised at the start; raises InputError."""
    if documents.num_bytes > MAX_TEXT_BYTES:
        remedy = "tokenise it once with python -m gidd_jax.prepare_data and set data.path to "
        remedy += "its output"
        if settings.row_mode == ANSWERS:
            remedy = "give fewer records"
        raise InputError(
            f"the {split} split of {settings.path!r} has {documents.num_bytes >> 20} MiB of text, "
            f"more than the {MAX_TEXT_BYTES >> 20} MiB that are tokenised at the start: "
            f"{remedy}"
        )
    return documents
