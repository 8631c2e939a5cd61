"""The compiled programs of `Gidd`, each for one `Batch` of rows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax import likelihood
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.models.gidd import blocks_of
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.autoregressive import sample_autoregressive
from gidd_jax.sampling.correction import Correction, proposals, self_correct
from gidd_jax.sampling.estimators import estimate
from gidd_jax.sampling.greedy import Greedy, autoregressive_is_greedy, diffusion_is_greedy
from gidd_jax.sampling.loop import Drawn, Prompt, sample_diffusion
from gidd_jax.sampling.options import (
    CorrectionOptions,
    EstimatorOptions,
    SamplerOptions,
    SuspicionOptions,
)
from gidd_jax.sampling.suspicion import Suspicion, judge
from gidd_jax.sampling.times import told
from gidd_jax.sampling.windows import windows_of


class Batch(NamedTuple):
    """Parameters, and for each row its key, ids, free positions and length (None: all full)."""

    params: Any
    keys: jax.Array
    ids: jax.Array
    free: jax.Array
    lengths: jax.Array | None


class SpecialIds(NamedTuple):
    """Ids with a role, and the number of ids that the model and its tokenizer share; is_framed:
    whether rows have a frame of such tokens."""

    eos: int | None
    pad: int
    mask: int
    vocab_size: int
    is_framed: bool = True

    @property
    def excluded(self) -> tuple[int, ...]:
        """What is never drawn. Some tokenizers pad with their end token, which stays possible."""
        return tuple({self.mask, self.pad} - {self.eos})


def special_ids(tokenizer: Tokenizer, network: Any, *, is_framed: bool) -> SpecialIds:
    """Return the special ids of a model and its tokenizer."""
    # An imported model may lack the last tokens of its tokenizer, or have more rows.
    shared = min(tokenizer.vocab_size, network.vocab_size)
    ids = tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id
    return SpecialIds(*ids, shared, is_framed)


def within(batch: Batch) -> jax.Array | None:
    """Return which positions belong to the rows, bool [B, L]; None: all."""
    if batch.lengths is None:
        return None
    return jnp.arange(batch.ids.shape[1])[None] < batch.lengths[:, None]


def denoiser(network: Any, process: InterpolatingProcess, batch: Batch) -> likelihood.Denoiser:
    """Return the network as a function of noisy ids and their times, about the rows of a batch.

    A model by blocks sees the blocks before each as they are in the rows.
    """
    context = (batch.ids,) if blocks_of(network) else ()

    def logits(z_t: jax.Array, times: jax.Array) -> jax.Array:
        t = told(network, process, times, within(batch))
        return network.apply({"params": batch.params}, z_t, t, batch.lengths, *context)

    return logits


def halves(
    network: Any, process: InterpolatingProcess, batch: Batch
) -> tuple[likelihood.Denoiser, Callable[[jax.Array], jax.Array]]:
    """Return the network up to the output projection, and the projection."""

    def features(z_t: jax.Array, times: jax.Array) -> jax.Array:
        t = told(network, process, times, within(batch))
        return network.apply({"params": batch.params}, z_t, t, batch.lengths, method="features")

    def project(h: jax.Array) -> jax.Array:
        return network.apply({"params": batch.params}, h, method="project")

    return features, project


def draw(
    batch: Batch,
    *,
    network: Any,
    process: InterpolatingProcess | None,
    special: SpecialIds,
    options: SamplerOptions,
    num_free: int,
    width: int,
    trace: bool,
) -> Drawn:
    """Return the rows with their free tokens drawn, by diffusion or from left to right.

    num_free: the most tokens that a row generates, or more; width: the most that follow its first
    one to generate, it included, or more.
    """
    if process is None:
        return autoregressive(batch, network=network, special=special, options=options)
    return diffusion(
        batch,
        network=network,
        process=process,
        special=special,
        options=options,
        num_free=num_free,
        width=width,
        trace=trace,
    )


@functools.partial(
    jax.jit,
    static_argnames=("network", "process", "special", "options", "num_free", "width", "trace"),
)
def diffusion(
    batch: Batch,
    *,
    network: Any,
    process: InterpolatingProcess,
    special: SpecialIds,
    options: SamplerOptions,
    num_free: int,
    width: int,
    trace: bool,
) -> Drawn:
    """Return the rows with their free tokens drawn by diffusion; arguments as in `draw`."""
    features, project = halves(network, process, batch)
    length = batch.ids.shape[1]
    is_text = jnp.ones_like(batch.free)
    if special.is_framed:
        is_text = ~jnp.isin(batch.ids, jnp.asarray((special.eos, special.pad)))
        is_text &= (jnp.arange(length) > 0)[None]
    prompt = Prompt(batch.ids, batch.free, within(batch), ~batch.free & is_text)
    windows = windows_of(network, batch.params, options, min(width, length), batch.lengths)
    drawn = sample_diffusion(
        process,
        features,
        options,
        batch.keys,
        length,
        prompt,
        num_free,
        trace,
        project,
        windows,
        special.eos if options.stop_at_end else None,
    )
    if not options.stop_at_end:
        return drawn
    is_end = (drawn.ids == special.eos) & batch.free
    is_after = ((jnp.cumsum(is_end, axis=-1) - is_end) > 0) & batch.free
    frames = drawn.frames
    if frames is not None:  # the last of them is what is returned
        last = jnp.where(is_after, special.pad, frames.ids[-1])
        frames = frames._replace(ids=frames.ids.at[-1].set(last))
    return drawn._replace(
        ids=jnp.where(is_after, special.pad, drawn.ids),
        log_probs=jnp.where(is_after, 0.0, drawn.log_probs),
        drawn_at=jnp.where(is_after, 0, drawn.drawn_at),
        frames=frames,
    )


@functools.partial(jax.jit, static_argnames=("network", "special", "options"))
def autoregressive(
    batch: Batch,
    *,
    network: Any,
    special: SpecialIds,
    options: SamplerOptions,
) -> Drawn:
    """Return the rows with their free tokens drawn from left to right."""
    assert special.eos is not None
    params, keys, ids, free, _ = batch  # padding comes last: no token before it sees it

    def decode(token: jax.Array, cache: Any, position: jax.Array) -> Any:
        return network.apply({"params": params}, token, cache, position, method="decode_step")

    return sample_autoregressive(
        decode,
        network.init_cache(*ids.shape),
        options,
        keys,
        Prompt(ids, free),
        eos_id=special.eos,
        pad_id=special.pad,
        vocab_size=special.vocab_size,
        excluded_ids=special.excluded,
    )


@functools.partial(jax.jit, static_argnames=("network", "process", "options", "trace"))
def correct(
    batch: Batch,
    *,
    network: Any,
    process: InterpolatingProcess,
    options: CorrectionOptions,
    trace: bool,
) -> Correction:
    """Return the rows with their free tokens corrected (see `correction.self_correct`)."""
    features, project = halves(network, process, batch)
    draw = proposals(batch.keys)
    return self_correct(process, features, options, batch.ids, batch.free, draw, trace, project)


@functools.partial(jax.jit, static_argnames=("network", "process", "options"))
def suspicion(
    batch: Batch,
    *,
    network: Any,
    process: InterpolatingProcess,
    options: SuspicionOptions,
) -> Suspicion:
    """Return how probably each free token is wrong (see `suspicion.judge`)."""
    judged = judge(process, denoiser(network, process, batch), options, batch.ids, batch.free)
    return jax.tree.map(lambda leaf: jnp.where(batch.free, leaf, 0), judged)


@functools.partial(
    jax.jit, static_argnames=("network", "process", "keep_padding_columns", "options")
)
def log_likelihood(
    batch: Batch,
    *,
    network: Any,
    process: InterpolatingProcess | None,
    keep_padding_columns: bool,
    options: EstimatorOptions,
) -> jax.Array:
    """Return draws of log p of the free tokens given the others, float32 [K, B, L] in nats.

    Exact for autoregressive models (K = 1), else by `sampling.estimators`.
    """
    if process is None:
        nll = likelihood.autoregressive_nelbo(
            lambda x: network.apply({"params": batch.params}, x), batch.ids
        ).total
        return jnp.where(batch.free, -nll, 0.0)[None]
    return estimate(
        process,
        denoiser(network, process, batch),
        options,
        batch.keys,
        batch.ids,
        batch.free,
        keep_padding_columns=keep_padding_columns,
    )


@functools.partial(jax.jit, static_argnames=("network", "process", "special"))
def is_greedy(
    batch: Batch,
    *,
    network: Any,
    process: InterpolatingProcess | None,
    special: SpecialIds,
) -> Greedy:
    """Tell whether greedy decoding generates the free tokens."""
    if process is not None:
        return diffusion_is_greedy(
            process, denoiser(network, process, batch), batch.ids, batch.free
        )
    return autoregressive_is_greedy(
        lambda x: network.apply({"params": batch.params}, x),
        batch.ids,
        batch.free,
        vocab_size=special.vocab_size,
        excluded_ids=special.excluded,
    )
