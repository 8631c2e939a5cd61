"""Compiled programs of a model that scores texts, each for one batch of rows.

They take what `Gidd` yields for a batch: the parameters and, for each row, its key, its ids and
bool [B, L] where a token is free, and the lengths (None: all full).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax import likelihood
from gidd_jax.greedy import autoregressive_is_greedy, diffusion_is_greedy
from gidd_jax.process import InterpolatingProcess


class SpecialIds(NamedTuple):
    """Ids with a role, and the number of ids that the model and its tokenizer share."""

    eos: int
    pad: int
    mask: int
    vocab_size: int

    @property
    def excluded(self) -> tuple[int, ...]:
        """What is never drawn. Some tokenizers pad with their end token, which stays possible."""
        return tuple({self.mask, self.pad} - {self.eos})


def denoiser(network: Any, params: Any, lengths: jax.Array | None) -> likelihood.Denoiser:
    """Return the network as a function of noisy ids and time alone."""
    return lambda z_t, t: network.apply({"params": params}, z_t, t, lengths)


@functools.partial(
    jax.jit, static_argnames=("network", "process", "keep_padding_columns", "num_samples_t")
)
def log_likelihood(
    params: Any,
    keys: jax.Array,
    ids: jax.Array,
    free: jax.Array,
    lengths: jax.Array | None,
    *,
    network: Any,
    process: InterpolatingProcess | None,
    keep_padding_columns: bool,
    num_samples_t: int,
) -> jax.Array:
    """Return log p of the free tokens given the others, or its bound, float32 [B, L] in nats."""
    if process is None:
        nll = likelihood.autoregressive_nelbo(
            lambda x: network.apply({"params": params}, x), ids
        ).total
        return jnp.where(free, -nll, 0.0)
    return likelihood.log_likelihood(
        process,
        denoiser(network, params, lengths),
        keys,
        ids,
        free,
        num_samples_t=num_samples_t,
        keep_padding_columns=keep_padding_columns,
    )


@functools.partial(jax.jit, static_argnames=("network", "process", "special"))
def is_greedy(
    params: Any,
    keys: jax.Array,
    ids: jax.Array,
    free: jax.Array,
    lengths: jax.Array | None,
    *,
    network: Any,
    process: InterpolatingProcess | None,
    special: SpecialIds,
) -> jax.Array:
    """Return whether greedy decoding generates the free tokens, bool [B]."""
    del keys
    if process is not None:
        return diffusion_is_greedy(process, denoiser(network, params, lengths), ids, free)
    return autoregressive_is_greedy(
        lambda x: network.apply({"params": params}, x),
        ids,
        free,
        vocab_size=special.vocab_size,
        excluded_ids=special.excluded,
    )
