"""How well a model predicts the rows of a corpus: the score of each, and the figures."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.evaluation.corpora import CorpusRows
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
from gidd_jax.models.gidd import blocks_of
from gidd_jax.parallel.sharding import (
    BATCH_AXES,
    activate,
    batch_sharding,
    gather_batches,
    local_mesh,
    own_batches,
    replicated,
)
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.estimators import EXACT, quantities
from gidd_jax.sampling.options import EstimatorOptions
from gidd_jax.sampling.times import told


class Scores(NamedTuple):
    """What scoring gave: bounds of the rows [N], their times [S, N], the rows of a batch, and how
    long it took, with compilation."""

    bounds: RowBounds
    times: np.ndarray
    batch_size: int
    seconds: float


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
    mesh = local_mesh()
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
        pad_id = model.tokenizer.pad_id
        batch = [corpus.padded(int(i), model.max_seq_len, pad_id) for i in real]
        stacked = [np.stack([row[key] for row in batch]) for key in ("tokens", "mask", "given")]
        row_arrays = (row_keys(keys[1], jnp.asarray(numbers)), original[real], *stacked)
        arrays = (jax.device_put(times[:, real], by_draw), *jax.device_put(row_arrays, by_row))
        with activate(mesh):
            part = _score(
                params,
                *arrays,
                network=model.network,
                process=model.process,
                keep_padding_columns=model.keep_padding_columns,
                has_givens=corpus.given is not None,
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


@functools.partial(
    jax.jit, static_argnames=("network", "process", "keep_padding_columns", "has_givens")
)
def _score(
    params: Any,
    times: jax.Array,
    keys: jax.Array,
    original_times: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    given: jax.Array,
    *,
    network: Any,
    process: InterpolatingProcess | None,
    keep_padding_columns: bool,
    has_givens: bool,
) -> RowBounds:
    def apply(*inputs: jax.Array | None) -> jax.Array:
        return network.apply({"params": params}, *inputs)

    if process is None:
        return autoregressive_row_bounds(apply, tokens, mask)
    context = (None, tokens) if blocks_of(network) else ()  # a model by blocks sees those before
    return row_bounds(
        process,
        lambda z_t, times: apply(z_t, told(network, process, times), *context),
        keys,
        times,
        original_times,
        tokens,
        mask,
        keep_padding_columns=keep_padding_columns,
        given=given if has_givens else None,
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
    by_document = [np.bincount(numbers, v) for v in (nats, bounds.tokens, corpus.text_bytes)]
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
        "bytes": int(corpus.text_bytes.sum()),
        **_quantity(process, scores),
        **_named("nelbo", nelbo),
        **(terms if process is not None else {}),
        "perplexity": perplexity(nelbo.value),
        "perplexity_interval": nelbo.interval and [perplexity(v) for v in nelbo.interval],
        **_named("bits_per_byte", bits),
        **(_sampled_figures(process, scores) if process is not None else {}),
        "seconds": round(scores.seconds, 3),
    } | _notes(nelbo.value, corpus)


def _quantity(process: InterpolatingProcess | None, scores: Scores) -> dict[str, Any]:
    """What the figure is to log p, and the network calls that it took for a token."""
    num_samples_t, num_rows = scores.times.shape
    quantity, calls = EXACT, 1
    if process is not None:  # with the reconstruction, and the original's figure
        (quantity,), calls = quantities(EstimatorOptions()), num_samples_t + 2
    calls_per_token = calls * num_rows / int(scores.bounds.tokens.sum())
    return {
        "quantity": quantity.name,
        "says": quantity.says,
        "calls_per_token": calls_per_token,
    }


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
    if corpus.why_no_bits:
        notes["bits_per_byte"] = corpus.why_no_bits
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
