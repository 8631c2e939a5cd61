"""The rows of corpora that models are scored on, as their runs would cut them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gidd_jax.checkpoints.checkpoint import find_checkpoint
from gidd_jax.cli import load_config
from gidd_jax.data import arrays, rows, shards
from gidd_jax.data.answers import answer_rows
from gidd_jax.data.corpus import (
    DATASETS,
    Chain,
    Concatenation,
    Documents,
    Subset,
    dataset_of,
    list_files,
    open_parts,
)
from gidd_jax.data.files import open_text_file
from gidd_jax.data.rows import Records
from gidd_jax.data.sources import tokenise_all
from gidd_jax.data.tokenizer_files import EMBEDDED
from gidd_jax.errors import InputError
from gidd_jax.inference.gidd import Gidd
from gidd_jax.mixture import split_list, split_mixture
from gidd_jax.settings import DataSettings, Settings


class CorpusRows(NamedTuple):
    """Rows of at most the context: ids, and for each row [N] the number of the document it begins
    in, and the UTF-8 bytes that its scored tokens stand for (`arrays.NO_TEXT` where they are no
    text); given: which of its tokens are known, and not scored (None: none).

    num_documents is None for shards whose rows are parts of documents or join some: they do not
    say which, and each row has a number of its own.
    """

    ids: Records | Sequence[np.ndarray]
    documents: np.ndarray
    num_bytes: np.ndarray
    num_documents: int | None
    given: Records | None = None

    def padded(self, number: int, seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
        """Row `number` as `rows.pad` returns it, always with 'given', bool [seq_len]."""
        ids = self.ids[number]
        given = np.zeros(len(ids), bool) if self.given is None else self.given[number]
        return rows.pad(ids, seq_len, pad_id, given)

    @property
    def text_bytes(self) -> np.ndarray:
        """What figures per byte divide by, [N]: 0 for all where some rows are no text, whose nats
        have no bytes."""
        is_text = self.num_bytes != arrays.NO_TEXT
        return self.num_bytes if is_text.all() else np.zeros_like(self.num_bytes)

    @property
    def why_no_bits(self) -> str | None:
        """Why there is no figure per byte; None where there is one."""
        is_text = self.num_bytes != arrays.NO_TEXT
        if is_text.any() and not is_text.all():
            return "some of the scored rows are arrays of ids, which stand for no byte of text"
        if self.text_bytes.sum():
            return None
        return "the scored tokens stand for no byte of text"

    @property
    def notes(self) -> dict[str, str]:
        """Why there is no number of documents, or no error, where there is none."""
        words = []
        if self.num_documents is None:
            words.append("shards do not say where documents begin: the bootstrap is over rows")
        if np.all(self.documents == self.documents[0]):
            words.append("one alone is scored: no figure has an error or an interval")
        return {"documents": "; ".join(words)} if words else {}


def run_data_settings(checkpoint: str | Path) -> DataSettings | None:
    """Return the data settings of the run that wrote a checkpoint; None for imported models.

    The run behind the model of the package is that of its config.
    """
    if str(checkpoint) == EMBEDDED:
        return Settings.from_config(load_config(EMBEDDED)).data
    try:
        found = find_checkpoint(checkpoint)
    except InputError:
        return None
    return Settings.from_saved(found.config()).data


def zero_shot_settings(run: DataSettings | None, path: str, row_mode: str = "crop") -> DataSettings:
    """Return the settings of a corpus that is not the run's own; all of every document counts.

    row_mode: how the model's rows are framed, where no run says so; shards are then read as they
    were cut.
    """
    of_shards = shards.is_shard_folder(path)
    if run is None:
        base = Settings.from_config(load_config("base")).data
        cut = shards.Manifest.read(Path(path).expanduser()).mode if of_shards else row_mode
        cut = "crop" if cut == rows.ANSWERS else cut  # other corpora are texts
        way = {"frame": "none"} if cut == rows.NO_FRAME else {"frame": "ends", "mode": cut}
        run = dataclasses.replace(base, **way)
    if of_shards:
        return dataclasses.replace(run, path=path)
    mode = "packed" if run.mode == "packed" else "crop"
    return dataclasses.replace(run, path=path, mode=mode)


def split_of(path: str, split: str | None, *, is_own: bool) -> str | None:
    """Return the split that is read of a corpus: None of files that are not the run's own."""
    if is_own or shards.is_shard_folder(path) or dataset_of(path) is not None:
        return split or "validation"
    return None


def splits_of(paths: list[str], split: str | None, *, is_own: bool) -> list[str | None]:
    """Return the split of each corpus; raises InputError for a `split` that none of them has."""
    found = [split_of(path, split, is_own=is_own) for path in paths]
    if split is not None and not any(found):
        raise InputError(
            f"--split={split}: files are read whole: leave it out, it is for the run's own corpus "
            "and for datasets (tfds:NAME, hf:OWNER/NAME)"
        )
    return found


def open_corpora(
    model: Gidd,
    checkpoint: str,
    data: str | None,
    split: str | None,
    *,
    max_documents: int | None,
    text_key: str | None,
    txt_documents: str | None,
) -> list[tuple[str, str | None, CorpusRows]]:
    """Return the name, split and rows of every corpus of `data`, separated by commas.

    data None: that of the run `checkpoint`; text_key, txt_documents: None are the run's. Raises
    InputError when one of them cannot be had.
    """
    run_settings = run_data_settings(checkpoint)
    if data:
        paths = split_list(data)
        settings = [zero_shot_settings(run_settings, path, model.row_mode) for path in paths]
    elif run_settings is not None:
        settings = [run_settings]
    else:
        raise InputError(f"{checkpoint} names no corpus of its own: give one with --data")
    changes = {"text_key": text_key, "txt_documents": txt_documents}
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = [dataclasses.replace(one, **changes) for one in settings]
    splits = splits_of([one.path for one in settings], split, is_own=not data)
    return [
        (one.path, part, open_rows(one, part, model, is_own=not data, max_documents=max_documents))
        for one, part in zip(settings, splits, strict=True)
    ]


def open_corpus(
    model: Gidd, checkpoint: str, data: str | None, split: str | None, *, max_documents: int
) -> tuple[str, str | None, CorpusRows]:
    """Return the name, split and rows of one corpus, as `open_corpora`; InputError for several."""
    count = len(split_list(data)) if data else 1
    if count > 1:
        raise InputError(f"--data={data} names {count} corpora: give one")
    (found,) = open_corpora(
        model,
        checkpoint,
        data,
        split,
        max_documents=max_documents,
        text_key=None,
        txt_documents=None,
    )
    return found


def open_rows(
    settings: DataSettings,
    split: str | None,
    model: Gidd,
    *,
    is_own: bool,
    max_documents: int | None = None,
) -> CorpusRows:
    """Read and tokenise a corpus with the model's tokenizer, and cut it into rows.

    is_own: `split` is 'train' or 'validation' by the run's rule, cut as its validation is;
    otherwise every document of files, or the split of that name of a dataset. Of shards the rows
    of the validation split count, as many as `max_documents`; rows of a mixture follow each other,
    those of texts first, then those of arrays. `max_documents` takes a fixed random sample. Raises
    InputError when there is no such corpus or split, or no token to score.
    """
    paths = [part.path for part in split_mixture(settings.path)]
    if not is_own and paths != [settings.path]:
        raise InputError(
            f"--data={settings.path}: weights say how often a corpus is trained on, and each is "
            "scored once: leave them out"
        )
    folders = [path for path in paths if shards.is_shard_folder(path)]
    others = [path for path in paths if path not in folders]
    of_arrays = [path for path in others if arrays.is_of_arrays(path)]
    texts = [path for path in others if path not in of_arrays]
    find = _own_documents if is_own else _all_documents
    documents = find(settings, texts, split) if texts else None
    if documents is not None and len(documents) == 0:
        raise InputError(f"data path {settings.path!r} holds no text")
    found = _array_rows(settings, of_arrays, split, model, is_own=is_own)
    held_out = [_shard_records(settings, folder, split, model) for folder in folders]
    sizes = [0 if documents is None else len(documents), len(found.ids), *map(len, held_out)]
    sample = _sample_indices(sum(sizes), max_documents)
    chosen = np.split(sample, np.searchsorted(sample, np.cumsum(sizes)[:-1]))
    starts = np.cumsum([0, *sizes])
    parts = []
    if documents is not None and len(chosen[0]):
        is_all = len(chosen[0]) == len(documents)
        some = documents if is_all else Subset(documents, chosen[0])
        parts.append(_text_rows(settings, some, split or "all", model))
    if len(chosen[1]):
        ids, given = found.pick(chosen[1] - starts[1])
        numbers = np.arange(len(ids))
        no_text = np.full(len(ids), arrays.NO_TEXT)
        parts.append(CorpusRows(ids, numbers, no_text, len(ids), given))
    for records, own, start in zip(held_out, chosen[2:], starts[2:-1], strict=True):
        if len(own):
            is_joined = settings.row_mode in ("packed", rows.NO_FRAME)
            is_one_each = not is_joined and records.num_documents == len(records)
            parts.append(_shard_rows(records, own - start, is_one_each))
    joined = _joined(parts)
    unscored = 1 if model.process is None else 0  # of an autoregressive row
    if all(len(joined.ids[i]) <= unscored for i in range(len(joined.ids))):
        raise InputError(f"data path {settings.path!r} has no token to score: give longer texts")
    return joined


def _text_rows(settings: DataSettings, documents: Documents, split: str, model: Gidd) -> CorpusRows:
    if settings.row_mode == rows.ANSWERS:
        found = answer_rows(documents, model.tokenizer, model.max_seq_len, split)
        numbers = np.arange(len(found.ids))
        return CorpusRows(found.ids, numbers, found.num_bytes, len(documents), found.given)
    # An autoregressive model cannot score the first token of a row: nor do its bytes count.
    first = 1 if model.process is None else 0
    tokenised = tokenise_all(documents, model.tokenizer, settings, split)
    windows = rows.cut(tokenised, settings.row_mode, model.max_seq_len)
    scored = rows.Windows(windows.ids, windows.starts + first, windows.ends)
    # A packed row may hold several documents, and a document several rows: rows that begin in one
    # document depend on each other, and are resampled together.
    numbers = np.searchsorted(tokenised.offsets, windows.starts, side="right") - 1
    return CorpusRows(windows, numbers, scored.sums(tokenised.num_bytes), len(documents))


def _array_rows(
    settings: DataSettings, paths: list[str], split: str | None, model: Gidd, *, is_own: bool
) -> arrays.ArrayRows:
    whole = settings, model.tokenizer, model.max_seq_len
    if not paths:
        return arrays.ArrayRows(Chain([]))
    if not is_own:
        return arrays.joined([arrays.open_whole(path, *whole) for path in paths])
    train, validation = arrays.open_splits(paths, *whole)
    return train if split == "train" else validation


def _shard_records(
    settings: DataSettings, folder: str, split: str | None, model: Gidd
) -> shards.ShardRecords:
    if split != "validation":
        raise InputError(
            f"--split={split}: of the shards in {folder} only the validation split is cut "
            "into rows; give the texts with --data"
        )
    return shards.open_shards(folder, model.tokenizer, settings.row_mode, model.max_seq_len)[1]


def _shard_rows(records: shards.ShardRecords, chosen: np.ndarray, is_one_each: bool) -> CorpusRows:
    num_bytes = np.array([records.num_bytes(int(i)) for i in chosen], np.int64)
    ids = [records[int(i)] for i in chosen]
    return CorpusRows(ids, np.arange(len(ids)), num_bytes, len(ids) if is_one_each else None)


def _joined(parts: list[CorpusRows]) -> CorpusRows:
    """The rows of several corpora, end to end; documents are numbered on."""
    if len(parts) == 1:
        return parts[0]
    counts = [part.num_documents for part in parts]
    starts = np.cumsum([0, *(int(part.documents.max()) + 1 for part in parts)])
    given = None
    if any(part.given is not None for part in parts):
        given = Chain([arrays.marks_of(part.ids, part.given) for part in parts])
    return CorpusRows(
        Chain([part.ids for part in parts]),
        np.concatenate([p.documents + start for p, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.num_bytes for part in parts]),
        None if None in counts else sum(filter(None, counts)),
        given,
    )


def _own_documents(settings: DataSettings, paths: list[str], split: str | None) -> Documents:
    if split not in ("train", "validation"):
        raise InputError(
            f"--split={split}: the run's own corpus has the splits train and validation"
        )
    corpus = open_parts(paths, settings.validation, settings.record_key, settings.txt_documents)
    return corpus.train if split == "train" else corpus.validation


def _all_documents(settings: DataSettings, paths: list[str], split: str | None) -> Documents:
    parts: list[Documents] = []
    for path in paths:
        dataset = dataset_of(path)
        if dataset is not None:
            kind, name = dataset
            parts.append(DATASETS[kind](name, split or "validation", settings.text_key))
        else:
            parts += [
                open_text_file(file, settings.text_key, settings.txt_documents)
                for file in list_files(path)
            ]
    return Concatenation(parts)


def _sample_indices(count: int, max_count: int | None) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(count)[:max_count])
