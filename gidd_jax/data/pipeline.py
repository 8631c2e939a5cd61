"""From a corpus to batches of token ids: training batches without end, validation batches once.

The position in the training data is a function of the number of rows that all processes together
have consumed, so that a run resumes exactly on another number of hosts or workers.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gidd_jax.cli import settle_absl_flags
from gidd_jax.data import fingerprint, rows
from gidd_jax.data.arrays import NO_TEXT
from gidd_jax.data.rows import Records
from gidd_jax.data.sources import Source, TokenisedOnTheFly, train_sources, validation_source
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError

if TYPE_CHECKING:
    from gidd_jax.settings import DataSettings

# The unigram baseline counts at most this many training tokens.
MAX_UNIGRAM_TOKENS = 20_000_000
# The share of padding is that of at most this many rows of a part.
MAX_MEASURED_ROWS = 256
_NUM_ROWS = 1 << 48
_STATE_KEY, _CORPUS_KEY = "global_next_index", "corpus"


class TrainBatches:
    """Endless training batches {'tokens': int32 [B / hosts, L], 'mask': bool [B / hosts, L]}.

    Where arrays mark given positions, a batch holds them as 'given', bool [B / hosts, L], too.
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
        self._sources = train_sources(settings, tokenizer, seq_len)
        made_of = (settings.path, settings.validation, settings.text_key)
        self._corpus = fingerprint.fingerprint(*made_of)
        is_lazy = any(isinstance(s.records, TokenisedOnTheFly) for s in self._sources)
        self._num_workers = settings.num_workers if is_lazy else 0
        self._is_cropped = settings.row_mode == "crop"
        self._empty_share = settings.empty_tokens
        if self._empty_share > 0 and tokenizer.pad_id == tokenizer.eos_id:
            raise InputError(
                f"data.empty_tokens = {settings.empty_tokens}: tokenizer {tokenizer.name!r} pads "
                "with the token that ends a text: set it to 0, or give the tokenizer a pad_token"
            )
        self._has_givens = any(source.given is not None for source in self._sources)
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
        for weight, records, _ in self._sources:
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
        parts = [self._endless(source, number) for number, source in enumerate(self._sources)]
        dataset = parts[0]
        if len(parts) > 1:
            dataset = grain.MapDataset.mix(parts, [source.weight for source in self._sources])
        dataset = dataset.map(_Pad(self._seq_len, self._pad_id, self._has_givens))
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

    def _endless(self, source: Source, number: int) -> Any:
        """The rows of one part, epoch after epoch, each in its order."""
        import grain

        records: Any = source.records
        if source.given is not None:
            records = _Marked(source.records, source.given)
        # Parts of one size must not have one order, nor the same crops.
        dataset = grain.MapDataset.source(records).seed(self._seed + number).shuffle()
        # Without an end for all purposes; grain's endless repeat overflows with batches of one.
        dataset = dataset.repeat(_NUM_ROWS // len(records) + 1)
        if self._is_cropped:  # before the slices: the crop depends on the global index alone
            dataset = dataset.random_map(_Crop(self._seq_len))
        if self._empty_share > 0:
            empty = _InsertEmpty(self._seq_len, self._pad_id, self._empty_share)
            dataset = dataset.random_map(empty)
        return dataset


class ValidationBatches:
    """The validation rows as batches of the same form, the same in every pass.

    The last batch is filled up with rows whose mask is False throughout. `num_tokens` and
    `num_bytes` count, over all processes, what of the batches is not given: the loss in bits per
    byte is (nats summed over the mask) / (num_bytes * ln 2). Where some rows stand for no text
    (record_bytes NO_TEXT), there is no such loss, and `num_bytes` is 0. given: which tokens of each
    record are given.
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
        given: Records | None = None,
    ):
        self._local = local_batch_size(global_batch_size, process_count)
        # A fixed order, so that the first batches are a fair sample of the whole split.
        order = np.random.default_rng(0).permutation(len(records))
        if max_batches is not None:
            order = order[: max_batches * global_batch_size]
        self._records = [records[int(i)] for i in order]
        self._given = None if given is None else [given[int(i)] for i in order]
        self._seq_len = seq_len
        self._pad_id = pad_id
        self._global_batch_size = global_batch_size
        self._process_index = process_index
        self.num_tokens = sum(len(r) for r in self._records)
        self.num_tokens -= sum(int(np.sum(marks)) for marks in self._given or [])
        sizes = [int(record_bytes[int(i)]) for i in order]
        self._num_texts = sum(size != NO_TEXT for size in sizes)
        self.num_bytes = sum(sizes) if self._num_texts == len(sizes) else 0

    def __len__(self) -> int:
        return math.ceil(len(self._records) / self._global_batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        nothing = np.zeros(0, np.int32)
        for batch in range(len(self)):
            start = batch * self._global_batch_size + self._process_index * self._local
            padded = []
            for number in range(start, start + self._local):
                is_real = number < len(self._records)
                ids = self._records[number] if is_real else nothing
                given = None
                if self._given is not None:
                    given = self._given[number] if is_real else np.zeros(0, bool)
                padded.append(rows.pad(ids, self._seq_len, self._pad_id, given))
            yield {key: np.stack([row[key] for row in padded]) for key in padded[0]}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs where it is not given, int64 [vocab_size]."""
        return _count_tokens(self._records, vocab_size, given=self._given)

    @property
    def surprise(self) -> str | None:
        """Why there are no bits per byte; None where there are, or nobody would look for them."""
        if self.num_bytes or not self._num_texts:
            return None
        if self._num_texts < len(self._records):
            return "some of the validation rows are arrays of ids, which stand for no text"
        return (
            "the validation rows stand for no byte of text: look for empty documents, or choose "
            "others with data.validation"
        )


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
    records, num_bytes, given = validation_source(settings, tokenizer, seq_len)
    return ValidationBatches(
        records,
        num_bytes,
        seq_len,
        tokenizer.pad_id,
        global_batch_size,
        process_index,
        process_count,
        max_batches,
        given,
    )


def unigram_nats(
    settings: "DataSettings", tokenizer: Tokenizer, seq_len: int, validation: ValidationBatches
) -> float:
    """Nats of the unigram model on the tokens of `validation`, summed.

    Its probabilities are the frequencies in the training rows plus one, over the vocabulary; the
    rows of a mixture count alike, and what is given does not.
    """
    counts = np.ones(tokenizer.vocab_size, np.int64)
    for source in train_sources(settings, tokenizer, seq_len):
        part = source.records, tokenizer.vocab_size, MAX_UNIGRAM_TOKENS, source.given
        counts += _count_tokens(*part)
    nats = -np.log(counts / counts.sum())
    return float((nats * validation.token_counts(tokenizer.vocab_size)).sum())


def unigram_bits_per_byte(
    settings: "DataSettings", tokenizer: Tokenizer, seq_len: int, validation: ValidationBatches
) -> float:
    """Bits per byte of the unigram model (`unigram_nats`); NaN where `validation` has no byte."""
    if not validation.num_bytes:
        return math.nan
    nats = unigram_nats(settings, tokenizer, seq_len, validation)
    return nats / math.log(2) / validation.num_bytes


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


class _InsertEmpty:
    def __init__(self, seq_len: int, pad_id: int, share: float):
        self._options = (seq_len, pad_id, share)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rows.with_empty_tokens(ids, *self._options, rng)


class _Marked:
    """Records with which of their tokens are given, as pairs."""

    def __init__(self, records: Records, given: Records):
        self._records = records
        self._given = given

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._records[index], self._given[index]


class _Pad:
    def __init__(self, seq_len: int, pad_id: int, has_givens: bool):
        self._seq_len = seq_len
        self._pad_id = pad_id
        self._has_givens = has_givens

    def __call__(self, row: np.ndarray | tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        ids, given = row if isinstance(row, tuple) else (row, None)
        if given is None and self._has_givens:  # of another part of the mixture
            given = np.zeros(len(ids), bool)
        return rows.pad(ids, self._seq_len, self._pad_id, given)


def _count_tokens(
    records: Records | Sequence[np.ndarray],
    vocab_size: int,
    limit: int | None = None,
    given: Records | Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Occurrences of each id, int64 [vocab_size], until `limit` tokens have been counted.

    given: which tokens of each record do not count.
    """
    counts = np.zeros(vocab_size, np.int64)
    lot: list[np.ndarray] = []
    # A fixed random order, so that a limit takes a fair sample.
    for i in np.random.default_rng(0).permutation(len(records)):
        ids = records[int(i)]
        lot.append(ids if given is None else ids[~given[int(i)]])
        if len(lot) == 1024:
            counts += np.bincount(np.concatenate(lot), minlength=vocab_size)
            lot = []
            if limit is not None and counts.sum() >= limit:
                break
    if lot:
        counts += np.bincount(np.concatenate(lot), minlength=vocab_size)
    return counts
