"""From a corpus to batches of token ids: training batches without end, validation batches once.

The position in the training data is a function of the number of rows that all processes together
have consumed, so that a run resumes exactly on another number of hosts or workers.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from gidd_jax.cli import settle_absl_flags
from gidd_jax.data import fingerprint, rows, shards
from gidd_jax.data.corpus import Chain, CorpusSplits, Documents, iterate, open_parts
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.mixture import split_mixture

if TYPE_CHECKING:
    from gidd_jax.settings import DataSettings

# Text up to this size is tokenised once, at the start, and held in memory as ids.
MAX_TEXT_BYTES = 256 << 20
# The unigram baseline counts at most this many training tokens.
MAX_UNIGRAM_TOKENS = 20_000_000
# The share of padding is that of at most this many rows of a part.
MAX_MEASURED_ROWS = 256
_ENCODE_BYTES = 4 << 20  # text handed to the tokenizer at a time
_NUM_ROWS = 1 << 48
_STATE_KEY, _CORPUS_KEY = "global_next_index", "corpus"


class Records(Protocol):
    """A random-access sequence of ids [num_tokens]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...


class TrainBatches:
    """Endless training batches {'tokens': int32 [B / hosts, L], 'mask': bool [B / hosts, L]}.

    The batches of all processes, concatenated in their order, are the same for any number of
    processes. Every epoch covers all records in a new order; of a mixture each part has epochs of
    its own, and the weights are its share of the rows, up to 1 % of the smallest (grain's mix).
    Raises InputError when the data does not fit the settings.
    """

    def __init__(
        self,
        settings: "DataSettings",
        tokenizer: Tokenizer,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        local_batch_size(global_batch_size, process_count)
        self._sources = _train_sources(settings, tokenizer, seq_len)
        made_of = (settings.path, settings.validation, settings.text_key)
        self._corpus = fingerprint.fingerprint(*made_of)
        is_lazy = any(isinstance(s.records, _TokenisedOnTheFly) for s in self._sources)
        self._num_workers = settings.num_workers if is_lazy else 0
        self._is_cropped = settings.mode == "crop"
        self._seq_len = seq_len
        self._pad_id = tokenizer.pad_id
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._process = (process_index, process_count)
        self._iterator: Any = None
        self._next_index = 0

    @property
    def num_records(self) -> int:
        """Number of rows in an epoch of all parts: documents, or windows in mode 'packed'."""
        return sum(len(source.records) for source in self._sources)

    def padding_share(self) -> float:
        """Share of the positions of training rows that hold padding; of large parts estimated."""
        share, total = 0.0, sum(source.weight for source in self._sources)
        for weight, records in self._sources:
            order = np.random.default_rng(0).permutation(len(records))[:MAX_MEASURED_ROWS]
            lengths = [min(len(records[int(i)]), self._seq_len) for i in order]
            share += weight / total * (1 - np.mean(lengths) / self._seq_len)
        return float(share)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._iterate_from(self._next_index)
        batch = next(self._iterator)
        self._next_index += self._global_batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Position as JSON, the same on every process: rows consumed by all of them together.

        With it goes what the corpus was, which `set_state` compares.
        """
        return {_STATE_KEY: self._next_index, _CORPUS_KEY: self._corpus}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position that `get_state` gave, whatever the number of processes then.

        Raises InputError, which names them, when files of the corpus have changed since then. A
        position without the corpus is one that an older version saved.
        """
        index = state.get(_STATE_KEY) if isinstance(state, dict) else None
        if type(index) is not int or index < 0:
            raise InputError(f"data position {state!r} is not of the form {{{_STATE_KEY!r}: rows}}")
        if _CORPUS_KEY in state:
            fingerprint.check_same(state[_CORPUS_KEY], self._corpus)
        self.close()
        self._next_index = index

    def close(self) -> None:
        """Stop the threads and processes that read ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _iterate_from(self, index: int) -> Any:
        import grain

        process_index, process_count = self._process
        parts = [self._endless(s.records, number) for number, s in enumerate(self._sources)]
        dataset = parts[0]
        if len(parts) > 1:
            dataset = grain.MapDataset.mix(parts, [source.weight for source in self._sources])
        dataset = dataset.map(_Pad(self._seq_len, self._pad_id))
        dataset = dataset[index:].batch(self._global_batch_size // process_count)
        # A process takes adjacent rows of the global batch, as a sharded jax.Array does.
        dataset = dataset[process_index::process_count]
        iterator = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        if self._num_workers:
            settle_absl_flags()  # grain hands them to its workers
            iterator = iterator.mp_prefetch(
                grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=2)
            )
        return iter(iterator)

    def _endless(self, records: "Records", number: int) -> Any:
        """The rows of one part, epoch after epoch, each in its order."""
        import grain

        # Parts of one size must not have one order, nor the same crops.
        dataset = grain.MapDataset.source(records).seed(self._seed + number).shuffle()
        # Without an end for all purposes; grain's endless repeat overflows with batches of one.
        dataset = dataset.repeat(_NUM_ROWS // len(records) + 1)
        if self._is_cropped:  # before the slices: the crop depends on the global index alone
            dataset = dataset.random_map(_Crop(self._seq_len))
        return dataset


class ValidationBatches:
    """The validation rows as batches of the same form, the same in every pass.

    The last batch is filled up with rows whose mask is False throughout. `num_tokens` and
    `num_bytes` count, over all processes, what the batches hold: the loss in bits per byte is
    (nats summed over the mask) / (num_bytes * ln 2).
    """

    def __init__(
        self,
        records: Records,
        record_bytes: Sequence[int] | np.ndarray,
        seq_len: int,
        pad_id: int,
        global_batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        max_batches: int | None = None,
    ):
        self._local = local_batch_size(global_batch_size, process_count)
        # A fixed order, so that the first batches are a fair sample of the whole split.
        order = np.random.default_rng(0).permutation(len(records))
        if max_batches is not None:
            order = order[: max_batches * global_batch_size]
        self._records = [records[int(i)] for i in order]
        self._seq_len = seq_len
        self._pad_id = pad_id
        self._global_batch_size = global_batch_size
        self._process_index = process_index
        self.num_tokens = sum(len(r) for r in self._records)
        self.num_bytes = int(sum(record_bytes[int(i)] for i in order))

    def __len__(self) -> int:
        return math.ceil(len(self._records) / self._global_batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        nothing = np.zeros(0, np.int32)
        for batch in range(len(self)):
            start = batch * self._global_batch_size + self._process_index * self._local
            chosen = self._records[start : start + self._local]
            chosen = chosen + [nothing] * (self._local - len(chosen))
            padded = [rows.pad(ids, self._seq_len, self._pad_id) for ids in chosen]
            yield {key: np.stack([row[key] for row in padded]) for key in ("tokens", "mask")}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs under the mask, int64 [vocab_size]."""
        return _count_tokens(self._records, vocab_size)


def validation_batches(
    settings: "DataSettings",
    tokenizer: Tokenizer,
    seq_len: int,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    max_batches: int | None = None,
) -> ValidationBatches:
    """Batches of the validation split; `max_batches` takes a fixed sample of it."""
    records, num_bytes = _validation_records(settings, tokenizer, seq_len)
    return ValidationBatches(
        records,
        num_bytes,
        seq_len,
        tokenizer.pad_id,
        global_batch_size,
        process_index,
        process_count,
        max_batches,
    )


def unigram_bits_per_byte(
    settings: "DataSettings", tokenizer: Tokenizer, seq_len: int, validation: ValidationBatches
) -> float:
    """Bits per byte of the unigram model on the tokens and bytes of `validation`; NaN for no byte.

    Its probabilities are the frequencies in the training rows plus one, over the vocabulary; the
    rows of a mixture count alike.
    """
    counts = np.ones(tokenizer.vocab_size, np.int64)
    for source in _train_sources(settings, tokenizer, seq_len):
        counts += _count_tokens(source.records, tokenizer.vocab_size, MAX_UNIGRAM_TOKENS)
    bits = -np.log2(counts / counts.sum())
    scored = validation.token_counts(tokenizer.vocab_size)
    if not validation.num_bytes:
        return math.nan
    return float((bits * scored).sum() / validation.num_bytes)


def local_batch_size(global_batch_size: int, process_count: int) -> int:
    """Rows of one process; raises InputError when the global batch does not divide."""
    if global_batch_size < 1 or global_batch_size % process_count:
        raise InputError(
            f"batch size {global_batch_size} is not a positive multiple of "
            f"the number of processes, {process_count}"
        )
    return global_batch_size // process_count


class _Crop:
    def __init__(self, seq_len: int):
        self._seq_len = seq_len

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rows.crop(ids, self._seq_len, rng)


class _Pad:
    def __init__(self, seq_len: int, pad_id: int):
        self._seq_len = seq_len
        self._pad_id = pad_id

    def __call__(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return rows.pad(ids, self._seq_len, self._pad_id)


class _TokenisedOnTheFly:
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


class _Source(NamedTuple):
    weight: float
    records: Records


def _train_sources(settings: "DataSettings", tokenizer: Tokenizer, seq_len: int) -> list[_Source]:
    """Records of the training split of each part of a mixture, or of the one corpus."""
    rows.check_mode(settings.mode)
    return [
        _Source(weight, _train_records(settings, path, tokenizer, seq_len))
        for weight, path in split_mixture(settings.path)
    ]


def _train_records(
    settings: "DataSettings", path: str, tokenizer: Tokenizer, seq_len: int
) -> Records:
    if shards.is_shard_folder(path):
        return shards.open_shards(path, tokenizer, settings.mode, seq_len)[0]
    documents = _open(settings, [path]).train
    is_large = documents.num_bytes > MAX_TEXT_BYTES
    if is_large and settings.mode != "packed" and documents.is_random_access:
        # What cannot be read shows now, not after the steps that lead there.
        deque(iterate(documents, "Checking the training split"), maxlen=0)
        return _TokenisedOnTheFly(documents, tokenizer, settings.mode, seq_len)
    tokenised = tokenise_all(documents, tokenizer, settings, "training")
    if settings.mode == "crop":
        return tokenised.whole()
    return rows.cut(tokenised, settings.mode, seq_len)


def _validation_records(
    settings: "DataSettings", tokenizer: Tokenizer, seq_len: int
) -> tuple[Records, Sequence[int] | np.ndarray]:
    """Rows of the validation split of all parts and the UTF-8 bytes each stands for."""
    rows.check_mode(settings.mode)
    paths = [part.path for part in split_mixture(settings.path)]
    texts = [path for path in paths if not shards.is_shard_folder(path)]
    found: list[tuple[Records, Sequence[int] | np.ndarray]] = []
    if texts:
        held_out = _open(settings, texts).validation
        tokenised = tokenise_all(held_out, tokenizer, settings, "validation")
        windows = rows.cut(tokenised, settings.mode, seq_len)
        found.append((windows, windows.sums(tokenised.num_bytes)))
    for path in (p for p in paths if p not in texts):
        records = shards.open_shards(path, tokenizer, settings.mode, seq_len)[1]
        found.append((records, [records.num_bytes(i) for i in range(len(records))]))
    if len(found) == 1:
        return found[0]
    return Chain([records for records, _ in found]), np.concatenate([size for _, size in found])


def _open(settings: "DataSettings", paths: Sequence[str]) -> CorpusSplits:
    return open_parts(paths, settings.validation, settings.text_key, settings.txt_documents)


def tokenise_all(
    documents: Documents, tokenizer: Tokenizer, settings: "DataSettings", split: str
) -> rows.TokenisedDocuments:
    """Tokenise a split into memory; raises InputError when it is too large for that."""
    if documents.num_bytes > MAX_TEXT_BYTES:
        raise InputError(
            f"the {split} split of {settings.path!r} has {documents.num_bytes >> 20} MiB of text, "
            f"more than the {MAX_TEXT_BYTES >> 20} MiB that are tokenised at the start: "
            "tokenise it once with python -m gidd_jax.prepare_data and set data.path to its output"
        )
    parts, texts, size = [], [], 0
    for text in iterate(documents, f"Tokenising the {split} split"):
        texts.append(text)
        size += len(text)
        if size >= _ENCODE_BYTES:
            parts.append(rows.tokenise(texts, tokenizer, settings.mode))
            texts, size = [], 0
    if texts:
        parts.append(rows.tokenise(texts, tokenizer, settings.mode))
    return rows.join(parts)


def _count_tokens(
    records: Records | Sequence[np.ndarray], vocab_size: int, limit: int | None = None
) -> np.ndarray:
    """Occurrences of each id, int64 [vocab_size], until `limit` tokens have been counted."""
    counts = np.zeros(vocab_size, np.int64)
    lot: list[np.ndarray] = []
    # A fixed random order, so that a limit takes a fair sample.
    for i in np.random.default_rng(0).permutation(len(records)):
        lot.append(records[int(i)])
        if len(lot) == 1024:
            counts += np.bincount(np.concatenate(lot), minlength=vocab_size)
            lot = []
            if limit is not None and counts.sum() >= limit:
                break
    if lot:
        counts += np.bincount(np.concatenate(lot), minlength=vocab_size)
    return counts
