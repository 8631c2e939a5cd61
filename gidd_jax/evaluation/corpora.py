"""How well a model predicts corpora: their rows, the score of each row, and the figures."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from gidd_jax.checkpoints.checkpoint import find_checkpoint
from gidd_jax.cli import load_config
from gidd_jax.data import rows, shards
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
from gidd_jax.data.pipeline import Records, tokenise_all
from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.evaluation.text_metrics import Estimate, ratio_estimate
from gidd_jax.inference.gidd import Gidd
from gidd_jax.likelihood import (
    RowBounds,
    autoregressive_row_bounds,
    integrand_profile,
    original_estimate,
    perplexity,
    row_bounds,
    sample_times,
)
from gidd_jax.mixture import split_mixture
from gidd_jax.parallel.sharding import (
    BATCH_AXES,
    batch_sharding,
    gather_batches,
    make_mesh,
    own_batches,
    replicated,
)
from gidd_jax.process import InterpolatingProcess
from gidd_jax.settings import DataSettings, Settings


class CorpusRows(NamedTuple):
    """Rows of at most the context: ids, and for each row [N] the number of the document it begins
    in, and the UTF-8 bytes that its scored tokens stand for.

    num_documents is None for shards whose rows are parts of documents or join some: they do not
    say which, and each row has a number of its own.
    """

    ids: Records | list[np.ndarray]
    documents: np.ndarray
    num_bytes: np.ndarray
    num_documents: int | None

    @property
    def notes(self) -> dict[str, str]:
        """Why there is no number of documents, or no error, where there is none."""
        words = []
        if self.num_documents is None:
            words.append("shards do not say where documents begin: the bootstrap is over rows")
        if np.all(self.documents == self.documents[0]):
            words.append("one alone is scored: no figure has an error or an interval")
        return {"documents": "; ".join(words)} if words else {}


class Scores(NamedTuple):
    """What scoring gave: bounds of the rows [N], their times [S, N], the rows of a batch, and how
    long it took, with compilation."""

    bounds: RowBounds
    times: np.ndarray
    batch_size: int
    seconds: float


def run_data_settings(checkpoint: str | Path) -> DataSettings | None:
    """Return the data settings of the run that wrote a checkpoint; None for imported models."""
    try:
        found = find_checkpoint(checkpoint)
    except InputError:
        return None
    return Settings.from_saved(found.config()).data


def zero_shot_settings(run: DataSettings | None, path: str) -> DataSettings:
    """Return the settings of a corpus that is not the run's own; all of every document counts."""
    base = run or Settings.from_config(load_config("base")).data
    if shards.is_shard_folder(path):
        return dataclasses.replace(base, path=path)
    mode = "packed" if run is not None and run.mode == "packed" else "crop"
    return dataclasses.replace(base, path=path, mode=mode)


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
    those of texts first. `max_documents` takes a fixed random sample. Raises InputError when there
    is no such corpus or split, or no token to score.
    """
    paths = [part.path for part in split_mixture(settings.path)]
    if not is_own and paths != [settings.path]:
        raise InputError(
            f"--data={settings.path}: weights say how often a corpus is trained on, and each is "
            "scored once: leave them out"
        )
    folders = [path for path in paths if shards.is_shard_folder(path)]
    texts = [path for path in paths if path not in folders]
    find = _own_documents if is_own else _all_documents
    documents = find(settings, texts, split) if texts else None
    if documents is not None and len(documents) == 0:
        raise InputError(f"data path {settings.path!r} holds no text")
    held_out = [_shard_records(settings, folder, split, model) for folder in folders]
    sizes = [0 if documents is None else len(documents), *map(len, held_out)]
    sample = _sample_indices(sum(sizes), max_documents)
    chosen = np.split(sample, np.searchsorted(sample, np.cumsum(sizes)[:-1]))
    starts = np.cumsum([0, *sizes])
    parts = []
    if documents is not None and len(chosen[0]):
        is_all = len(chosen[0]) == len(documents)
        some = documents if is_all else Subset(documents, chosen[0])
        parts.append(_text_rows(settings, some, split or "all", model))
    for records, own, start in zip(held_out, chosen[1:], starts[1:-1], strict=True):
        if len(own):
            is_one_each = settings.mode != "packed" and records.num_documents == len(records)
            parts.append(_shard_rows(records, own - start, is_one_each))
    joined = _joined(parts)
    unscored = 1 if model.process is None else 0  # of an autoregressive row
    if all(len(joined.ids[i]) <= unscored for i in range(len(joined.ids))):
        raise InputError(f"data path {settings.path!r} has no token to score: give longer texts")
    return joined


def _text_rows(settings: DataSettings, documents: Documents, split: str, model: Gidd) -> CorpusRows:
    # An autoregressive model cannot score the first token of a row: nor do its bytes count.
    first = 1 if model.process is None else 0
    tokenised = tokenise_all(documents, model.tokenizer, settings, split)
    windows = rows.cut(tokenised, settings.mode, model.max_seq_len)
    scored = rows.Windows(windows.ids, windows.starts + first, windows.ends)
    # A packed row may hold several documents, and a document several rows: rows that begin in one
    # document depend on each other, and are resampled together.
    numbers = np.searchsorted(tokenised.offsets, windows.starts, side="right") - 1
    return CorpusRows(windows, numbers, scored.sums(tokenised.num_bytes), len(documents))


def _shard_records(
    settings: DataSettings, folder: str, split: str | None, model: Gidd
) -> shards.ShardRecords:
    if split != "validation":
        raise InputError(
            f"--split={split}: of the shards in {folder} only the validation split is cut "
            "into rows; give the texts with --data"
        )
    return shards.open_shards(folder, model.tokenizer, settings.mode, model.max_seq_len)[1]


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
    return CorpusRows(
        Chain([part.ids for part in parts]),
        np.concatenate([p.documents + start for p, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.num_bytes for part in parts]),
        None if None in counts else sum(filter(None, counts)),
    )


def _own_documents(settings: DataSettings, paths: list[str], split: str | None) -> Documents:
    if split not in ("train", "validation"):
        raise InputError(
            f"--split={split}: the run's own corpus has the splits train and validation"
        )
    corpus = open_parts(paths, settings.validation, settings.text_key, settings.txt_documents)
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


def score_rows(
    model: Gidd,
    corpus: CorpusRows,
    *,
    num_samples_t: int,
    batch_size: int,
    seed: int,
    label: str,
) -> Scores:
    """Score every row, in batches that the processes share and split over their devices.

    What a row draws depends on the seed and its number, not on the batch size or the devices.
    """
    start = time.perf_counter()
    num_rows = len(corpus.ids)
    mesh = make_mesh(-1, 1, 1, devices=jax.local_devices())
    size = -(-min(batch_size, num_rows) // mesh.size) * mesh.size
    params = jax.device_put(model.params, replicated(mesh))
    by_row = batch_sharding(mesh)
    by_draw = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    keys = jax.random.split(jax.random.key(seed), 3)
    times, original = _times(model.process, keys[0], num_samples_t, num_rows)
    parts = []
    own = own_batches(-(-num_rows // size))
    for number in tqdm(own, label, disable=None, unit="batch", leave=False):
        numbers = np.arange(number * size, (number + 1) * size)
        real = np.minimum(numbers, num_rows - 1)  # the last batch is filled up, and cut below
        batch = [
            rows.pad(corpus.ids[int(i)], model.max_seq_len, model.tokenizer.pad_id) for i in real
        ]
        tokens, mask = (np.stack([row[key] for row in batch]) for key in ("tokens", "mask"))
        row_arrays = (row_keys(keys[1], jnp.asarray(numbers)), original[real], tokens, mask)
        part = _score(
            params,
            jax.device_put(times[:, real], by_draw),
            *jax.device_put(row_arrays, by_row),
            network=model.network,
            process=model.process,
            keep_padding_columns=model.keep_padding_columns,
        )
        parts.append(jax.tree.map(np.asarray, part))
    parts = gather_batches(parts)
    bounds = jax.tree.map(lambda *a: np.concatenate(a, axis=-1)[..., :num_rows], *parts)
    return Scores(bounds, times, size, time.perf_counter() - start)


def _times(
    process: InterpolatingProcess | None, key: jax.Array, num_samples: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Times [S, N] of the bound and [N] of the original's figure; S = 0 for exact models."""
    if process is None:
        return np.zeros((0, num_rows), np.float32), np.zeros(num_rows, np.float32)
    bound_key, original_key = jax.random.split(key)
    times = sample_times(process, bound_key, num_samples, num_rows)
    return np.asarray(times), np.asarray(sample_times(process, original_key, 1, num_rows)[0])


@functools.partial(jax.jit, static_argnames=("network", "process", "keep_padding_columns"))
def _score(
    params: Any,
    times: jax.Array,
    keys: jax.Array,
    original_times: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    network: Any,
    process: InterpolatingProcess | None,
    keep_padding_columns: bool,
) -> RowBounds:
    def apply(*inputs: jax.Array) -> jax.Array:
        return network.apply({"params": params}, *inputs)

    if process is None:
        return autoregressive_row_bounds(apply, tokens, mask)
    return row_bounds(
        process,
        apply,
        keys,
        times,
        original_times,
        tokens,
        mask,
        keep_padding_columns=keep_padding_columns,
    )


def corpus_figures(
    process: InterpolatingProcess | None,
    corpus: CorpusRows,
    scores: Scores,
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the figures of a scored corpus, ready for JSON; `evaluate` says what they mean.

    A figure that the corpus does not determine is not finite, with a line in `notes` that says why.
    Raises InputError when the model's output is not a number.
    """
    bounds = scores.bounds
    if np.isnan(bounds.total).any():
        raise InputError(
            "the network's output is not a number: its parameters are damaged, "
            "use an older checkpoint"
        )
    nats, tokens = bounds.total.astype(np.float64), int(bounds.tokens.sum())
    numbers = np.unique(corpus.documents, return_inverse=True)[1]
    by_document = [np.bincount(numbers, v) for v in (nats, bounds.tokens, corpus.num_bytes)]
    nelbo = ratio_estimate(by_document[0], by_document[1], num_resamples, seed)
    bits = ratio_estimate(by_document[0] / np.log(2), by_document[2], num_resamples, seed)
    terms = {
        name: float(getattr(bounds, name).sum(dtype=np.float64) / tokens)
        for name in ("reconstruction", "middle", "prior")
    }
    return {
        "documents": corpus.num_documents,
        "rows": len(nats),
        "tokens": tokens,
        "bytes": int(corpus.num_bytes.sum()),
        **_named("nelbo", nelbo),
        **(terms if process is not None else {}),
        "perplexity": perplexity(nelbo.value),
        "perplexity_interval": nelbo.interval and [perplexity(v) for v in nelbo.interval],
        **_named("bits_per_byte", bits),
        **(_sampled_figures(process, scores) if process is not None else {}),
        "seconds": round(scores.seconds, 3),
    } | _notes(nelbo.value, corpus)


def _notes(nelbo: float, corpus: CorpusRows) -> dict[str, Any]:
    """Why figures of a corpus are not finite, by their names; nothing where all are."""
    notes = corpus.notes
    if not np.isfinite(nelbo):
        notes["nelbo"] = (
            "infinite: the texts hold tokens to which the model gives no probability, such as "
            "special ones of its tokenizer"
        )
    elif not np.isfinite(perplexity(nelbo)):
        notes["perplexity"] = f"exp({nelbo:.4g}) is too large for a number"
    if not corpus.num_bytes.sum():
        notes["bits_per_byte"] = "the scored tokens stand for no byte of text"
    return {"notes": notes} if notes else {}


def _sampled_figures(process: InterpolatingProcess, scores: Scores) -> dict[str, Any]:
    """The original's figure and the profile over t."""
    original, integrand, tokens = (
        np.asarray(a)
        for a in (scores.bounds.original, scores.bounds.integrand, scores.bounds.tokens)
    )
    cuts = range(scores.batch_size, len(tokens), scores.batch_size)
    elbo = original_estimate(np.split(original.astype(np.float64), cuts), np.split(tokens, cuts))
    profile = integrand_profile(process, scores.times, integrand, tokens)
    mean = [None if np.isnan(v) else float(v) for v in profile.mean]
    return {
        "original": {"elbo": elbo, "perplexity": perplexity(elbo)},
        "profile": {
            "edges": profile.edges.tolist(),
            "integrand": mean,
            "tokens": profile.tokens.tolist(),
        },
    }


def _named(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_standard_error": estimate.standard_error}
