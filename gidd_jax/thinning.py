"""The ancestral step with logits only where a token can change: exact, and most of the head saved.

Most positions of a step stay as they are whatever the network says. The others are gathered, row
by row, into groups of a fixed size; a loop projects and finishes group after group.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gidd_jax.loss import log_probs_at
from gidd_jax.process import InterpolatingProcess
from gidd_jax.steps import ancestral_draws, finish_ancestral_step, needs_x_hat

Predict = Callable[[jax.Array], jax.Array]  # positions int32 [B, K] -> log x_hat [B, K, V]


def group_size(length: int) -> int:
    """Positions of a row that are projected together: about what a step of 16 changes."""
    return min(length, max(16, -(-length // 16)))


def thinned_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    predict: Predict,
    filtered: Callable[[jax.Array], jax.Array],
    z_t: jax.Array,
    active: jax.Array,
    t: ArrayLike,
    s: ArrayLike,
    kappa: float,
) -> tuple[jax.Array, jax.Array]:
    """Return z_s as `steps.ancestral_step` draws it at active positions, and log x_hat(z_s).

    filtered: log x_hat -> the distribution to draw from. The second array, float32 [B, L], is 0
    where the network was not asked.
    """
    length = z_t.shape[1]
    size = group_size(length)
    draws = ancestral_draws(process, keys, z_t, t, s, kappa)
    asked = active & needs_x_hat(process, draws, z_t)
    count = jnp.sum(asked, axis=-1)
    # Positions that are asked come first; those beyond the end are dropped when results are put.
    order = jnp.argsort(~asked, axis=-1, stable=True)
    order = jnp.where(jnp.arange(length)[None] < count[:, None], order, length)
    order = jnp.pad(order, ((0, 0), (0, -length % size)), constant_values=length)
    rows = jnp.arange(z_t.shape[0])[:, None]

    def some_left(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(carry[0] * size < count)

    def finish_group(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        number, z, log_probs = carry
        places = jax.lax.dynamic_slice_in_dim(order, number * size, size, axis=1)
        real = jnp.minimum(places, length - 1)
        log_x_hat = predict(real)
        here = jax.tree.map(lambda a: a[rows, real], draws)
        z_s = finish_ancestral_step(here, filtered(log_x_hat), z_t[rows, real])
        z = z.at[rows, places].set(z_s, mode="drop")
        log_probs = log_probs.at[rows, places].set(log_probs_at(log_x_hat, z_s), mode="drop")
        return number + 1, z, log_probs

    start = (jnp.int32(0), z_t, jnp.zeros(z_t.shape, jnp.float32))
    _, z, log_probs = jax.lax.while_loop(some_left, finish_group, start)
    return z, log_probs
