"""Whether a model that always takes the most probable token would generate a given text.

The text is put in as it is found: a row needs no more network calls than it has tokens, and is
done at its first mismatch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gidd_jax.likelihood import Denoiser
from gidd_jax.loss import masked_logits
from gidd_jax.process import InterpolatingProcess
from gidd_jax.schedule import check_method
from gidd_jax.steps import highest


def diffusion_is_greedy(
    process: InterpolatingProcess, denoise: Denoiser, x: jax.Array, free: jax.Array
) -> jax.Array:
    """Return whether the free tokens of x [B, L] are what greedy decoding finds, bool [B].

    Greedy is what the sampler does with method "confidence", temperature 0 and one step a token:
    from masks on it fills in the most probable token of all (LLaDA, arXiv 2502.09992).
    Raises InputError for processes that do not start from masks.
    """
    check_method(process, "confidence")
    count = jnp.maximum(jnp.sum(free, axis=-1), 1)

    def masked(z: jax.Array) -> jax.Array:
        return free & (z == process.mask_id)

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z, matches = state
        share = jnp.sum(masked(z), axis=-1) / count
        t = process.t_min + (process.t_max - process.t_min) * share
        logits = masked_logits(process, denoise(z, t))
        log_x_hat = jax.nn.log_softmax(logits)[..., : process.vocab_size]
        one = jnp.ones(z.shape[:1], jnp.int32)
        chosen = highest(jnp.max(log_x_hat, axis=-1), masked(z), one)
        wrong = chosen & (jnp.argmax(log_x_hat, axis=-1) != x)
        return jnp.where(chosen, x, z), matches & ~jnp.any(wrong, axis=-1)

    def unfinished(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        z, matches = state
        return jnp.any(masked(z) & matches[:, None])

    start = jnp.where(free, process.mask_id, x), jnp.ones(x.shape[:1], bool)
    return jax.lax.while_loop(unfinished, step, start)[1]


def autoregressive_is_greedy(
    predict: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    free: jax.Array,
    *,
    vocab_size: int,
    excluded_ids: tuple[int, ...] = (),
) -> jax.Array:
    """Return whether each free token of x [B, L] is the most probable one, bool [B].

    As in sampling, ids from vocab_size on and `excluded_ids` are never predicted.
    """
    banned = jnp.isin(jnp.arange(vocab_size), jnp.asarray(excluded_ids, jnp.int32))
    logits = jnp.where(banned[None, None], -jnp.inf, predict(x)[:, :-1, :vocab_size])
    wrong = free[:, 1:] & (jnp.argmax(logits, axis=-1) != x[:, 1:])
    return ~jnp.any(wrong, axis=-1)
