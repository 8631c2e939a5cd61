"""Whether a model that always takes the most probable token would generate a given text.

The text is put in as it is found: a row needs no more network calls than it has tokens, and is
done at its first mismatch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax.likelihood import Denoiser
from gidd_jax.loss import masked_logits
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.schedule import check_method
from gidd_jax.sampling.steps import highest
from gidd_jax.sampling.times import CLEAN


class Greedy(NamedTuple):
    """Whether rows are what greedy decoding finds, and whether a logit was no number, bool [B]."""

    matches: jax.Array
    is_broken: jax.Array


def diffusion_is_greedy(
    process: InterpolatingProcess, denoise: Denoiser, x: jax.Array, free: jax.Array
) -> Greedy:
    """Compare the free tokens of x [B, L] with what greedy decoding finds.

    Greedy is what the sampler does with method "confidence", order "drawn", temperature 0 and one
    step a token: from masks on it fills in the most probable token of all (LLaDA, arXiv
    2502.09992).
    Raises InputError for processes that do not start from masks.
    """
    check_method(process, "confidence")

    def masked(z: jax.Array) -> jax.Array:
        return free & (z == process.mask_id)

    def step(state: tuple[jax.Array, Greedy]) -> tuple[jax.Array, Greedy]:
        z, found = state
        times = jnp.where(masked(z), process.t_max, CLEAN)
        logits = masked_logits(process, denoise(z, times))
        log_x_hat = jax.nn.log_softmax(logits)[..., : process.vocab_size]
        one = jnp.ones(z.shape[:1], jnp.int32)
        surest = jnp.max(log_x_hat, axis=-1)
        chosen = highest(surest, masked(z), one)
        wrong = chosen & (jnp.argmax(log_x_hat, axis=-1) != x)
        # Nothing is chosen among numbers that are none: such a row would never be finished.
        is_broken = found.is_broken | jnp.any(jnp.isnan(surest), axis=-1)
        matches = found.matches & ~jnp.any(wrong, axis=-1) & ~is_broken
        return jnp.where(chosen, x, z), Greedy(matches, is_broken)

    def unfinished(state: tuple[jax.Array, Greedy]) -> jax.Array:
        z, found = state
        return jnp.any(masked(z) & found.matches[:, None])

    true = jnp.ones(x.shape[:1], bool)
    start = jnp.where(free, process.mask_id, x), Greedy(true, ~true)
    return jax.lax.while_loop(unfinished, step, start)[1]


def autoregressive_is_greedy(
    predict: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    free: jax.Array,
    *,
    vocab_size: int,
    excluded_ids: tuple[int, ...] = (),
) -> Greedy:
    """Tell whether each free token of x [B, L] is the most probable one.

    As in sampling, ids from vocab_size on and `excluded_ids` are never predicted.
    """
    banned = jnp.isin(jnp.arange(vocab_size), jnp.asarray(excluded_ids, jnp.int32))
    logits = jnp.where(banned[None, None], -jnp.inf, predict(x)[:, :-1, :vocab_size])
    wrong = free[:, 1:] & (jnp.argmax(logits, axis=-1) != x[:, 1:])
    return Greedy(~jnp.any(wrong, axis=-1), jnp.any(jnp.isnan(logits), axis=(1, 2)))
