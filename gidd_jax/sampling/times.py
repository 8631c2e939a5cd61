"""The time that every position of a row is at, and the one time that stands for the row.

A sampler knows what it knows of each position: a given token is clean (time 0), a position that is
still to come is noise of the prior (t_max), others are in between. A network that takes one time a
row is told the time at which the expected share of noise is that of the row: at the time of the
schedule a hybrid model would take the given tokens for noise, as most of what it saw then was.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gidd_jax.process import InterpolatingProcess

CLEAN = 0.0  # the time of a token that is known


def noise_share(process: InterpolatingProcess, times: jax.Array) -> jax.Array:
    """Return 1 - alpha at times of any shape; 0 at CLEAN. Sum of the masses, which keeps digits."""
    mass = process.beta_pi(jnp.maximum(times, process.t_min))
    share = mass.mask + process.num_noise_tokens * mass.uniform
    return jnp.where(times <= CLEAN, 0.0, share)


def time_of_share(process: InterpolatingProcess, share: jax.Array) -> jax.Array:
    """Return the time in [t_min, t_max] at which 1 - alpha is `share`, any shape, by bisection."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        below = noise_share(process, middle) < share
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low = jnp.full(share.shape, process.t_min, jnp.float32)
    high = jnp.full(share.shape, process.t_max, jnp.float32)
    low, high = jax.lax.fori_loop(0, 30, halve, (low, high))
    return 0.5 * (low + high)


def row_times(
    process: InterpolatingProcess, times: jax.Array, within: jax.Array | None = None
) -> jax.Array:
    """Return the time [B] whose share of noise is the mean over each row's times [B, L].

    within bool [B, L]: the positions that belong to a row; None: all. Where they are all at one
    time it is that time, to the last bit.
    """
    within = jnp.ones(times.shape, bool) if within is None else within
    first = jnp.min(jnp.where(within, times, jnp.inf), axis=-1)
    last = jnp.max(jnp.where(within, times, -jnp.inf), axis=-1)
    share = jnp.sum(jnp.where(within, noise_share(process, times), 0.0), axis=-1)
    mean = share / jnp.maximum(jnp.sum(within, axis=-1), 1)
    return jnp.where(first == last, jnp.maximum(last, process.t_min), time_of_share(process, mean))


def told(
    network: Any,
    process: InterpolatingProcess,
    times: jax.Array,
    within: jax.Array | None = None,
) -> jax.Array:
    """Return what the network is told of rows at times [B] or [B, L]: those it was trained with.

    within as in `row_times`.
    """
    if times.ndim == 1 or network.position_times:
        return times
    return row_times(process, times, within)
