"""The ancestral step with logits only where a token can change: exact, and most of the head saved.

Most positions of a step stay as they are whatever the network says. The others are gathered, row
by row, into groups of a fixed size; a loop projects and finishes group after group.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gidd_jax.filters import log_softmax_at
from gidd_jax.process import InterpolatingProcess
from gidd_jax.steps import ancestral_draws, finish_ancestral_step, needs_x_hat

Predict = Callable[[jax.Array], jax.Array]  # positions int32 [B, K] -> logits [B, K, V]


def group_size(length: int) -> int:
    """Positions of a row that are projected together: about what a step of 16 changes."""
    return min(length, max(16, -(-length // 16)))


def thinned_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    predict: Predict,
    weights: Callable[[jax.Array], jax.Array],
    z_t: jax.Array,
    active: jax.Array,
    t: ArrayLike,
    s: ArrayLike,
    kappa: float,
) -> tuple[jax.Array, jax.Array]:
    """Return z_s as `steps.ancestral_step` draws it at active positions, and log x_hat(z_s).

    Logits are -inf where there is no token. weights: logits -> the distribution to draw from, of
    any sum. The second array, float32 [B, L], is 0 where the network was not asked.
    """
    length = z_t.shape[1]
    size = group_size(length)
    num_columns = jax.eval_shape(predict, z_t[:, :size]).shape[-1]
    draws = ancestral_draws(process, keys, z_t, t, s, kappa, num_columns=num_columns)
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
        logits = predict(real)
        here = jax.tree.map(lambda a: a[rows, real], draws)
        z_s = finish_ancestral_step(here, weights(logits), z_t[rows, real])
        z = z.at[rows, places].set(z_s, mode="drop")
        drawn = log_softmax_at(logits, z_s)
        return number + 1, z, log_probs.at[rows, places].set(drawn, mode="drop")

    start = (jnp.int32(0), z_t, jnp.zeros(z_t.shape, jnp.float32))
    _, z, log_probs = jax.lax.while_loop(some_left, finish_group, start)
    return z, log_probs
