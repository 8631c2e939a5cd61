"""The network asked only where a step needs it: exact, and most of its output projection saved.

Most positions of a step stay as they are whatever the network says. The others are gathered, row
by row, into groups of a fixed size; a loop projects and judges group after group, so that no more
logits are held than those of one group. Where no position is asked, the network is not called.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gidd_jax.likelihood import Denoiser
from gidd_jax.loss import masked_logits
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.steps import Judge, Network, Predicted

Weights = Callable[[jax.Array], jax.Array]


def group_size(length: int) -> int:
    """Positions of a row that are projected together: about what a step of 16 changes."""
    return min(length, max(16, -(-length // 16)))


def guided(
    process: InterpolatingProcess,
    denoise: Denoiser,
    project: Callable[[Any], jax.Array],
    guidance: float,
    condition: jax.Array,
    keys: jax.Array,
) -> tuple[Callable[..., Any], Callable[[Any], jax.Array]]:
    """Return denoise and project whose x_hat is x_hat(with)^g x_hat(without)^(1 - g), of any sum.

    Without the condition, bool [B, L], its tokens are noise of the prior, drawn by keys [B]. It is
    x_hat that is guided, before Bayes: the evidence at a position counts once.
    """

    def both(z_t: jax.Array, times: jax.Array) -> Any:
        noise = jax.vmap(lambda key: process.sample_prior(key, z_t.shape[1:]))(keys)
        without = jnp.where(condition, noise, z_t), jnp.where(condition, process.t_max, times)
        return denoise(z_t, times), denoise(*without)

    def mixed(features: Any) -> jax.Array:
        # Logits of -inf have no difference.
        given, other = (jnp.maximum(project(f), -1e30) for f in features)
        return guidance * given + (1 - guidance) * other

    return both, mixed


def network_at(
    process: InterpolatingProcess,
    denoise: Denoiser,
    project: Callable[[Any], jax.Array],
    weights: Weights,
    z_t: jax.Array,
    times: jax.Array,
) -> Network:
    """Return the network at noisy ids z_t [B, L] and their times, to be asked once.

    denoise: (z_t, times) -> what `project` makes logits [..., C] of, position by position; weights:
    logits -> the distribution to draw from, of any sum.
    """
    rows, length = z_t.shape

    def predict(features: Any, places: jax.Array) -> Predicted:
        logits = masked_logits(
            process, project(jax.tree.map(lambda a: at(a, places), features))
        ).astype(jnp.float32)
        return Predicted(logits, weights(logits))

    features, one = jax.eval_shape(denoise, z_t, times), jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    columns = jax.eval_shape(predict, features, one).logits.shape[-1]

    def ask(where: jax.Array, judge: Judge, *arrays: Any, at_most: int = length) -> Any:
        def judge_at(features: Any, places: jax.Array) -> Any:
            here = jax.tree.map(lambda a: at(a, places), arrays)
            return judge(predict(features, places), *here)

        said = jax.eval_shape(judge_at, features, one)
        nothing = jax.tree.map(lambda a: jnp.zeros((rows, length, *a.shape[2:]), a.dtype), said)

        def call() -> Any:
            size = min(group_size(length), at_most)
            return _in_groups(where, judge_at, denoise(z_t, times), size, nothing)

        return jax.lax.cond(jnp.any(where), call, lambda: nothing)

    return Network(columns, ask)


def _in_groups(
    where: jax.Array,
    judge_at: Callable[[Any, jax.Array], Any],
    features: Any,
    size: int,
    result: Any,
) -> Any:
    """Put what `judge_at` says of places int32 [B, size] into the result [B, L, ...], `where`."""
    length = where.shape[1]
    count = jnp.sum(where, axis=-1)
    # Positions that are asked come first; those beyond the end are dropped when results are put.
    order = jnp.argsort(~where, axis=-1, stable=True)
    order = jnp.where(jnp.arange(length)[None] < count[:, None], order, length)
    order = jnp.pad(order, ((0, 0), (0, -length % size)), constant_values=length)

    def some_left(carry: tuple[jax.Array, Any]) -> jax.Array:
        return jnp.any(carry[0] * size < count)

    def judge_group(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        number, result = carry
        places = jax.lax.dynamic_slice_in_dim(order, number * size, size, axis=1)
        said = judge_at(features, jnp.minimum(places, length - 1))
        return number + 1, jax.tree.map(lambda a, part: put(a, places, part), result, said)

    return jax.lax.while_loop(some_left, judge_group, (jnp.int32(0), result))[1]


# Row by row: indexed by the rows' numbers, a batch that is split over devices would be exchanged.


def at(array: jax.Array, places: jax.Array) -> jax.Array:
    """Return [B, K, ...] of an array [B, L, ...] at places [B, K]."""
    return jax.vmap(lambda row, at: row[at])(array, places)


def put(array: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    """Put values [B, K, ...] into an array [B, L, ...] at places [B, K] that are not beyond it."""
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(array, places, values)
