"""Filters on distributions over tokens, in float32: temperature, top-k, top-p and min-p.

Each keeps at least the most probable token. Distributions lie along the last axis; those given as
logarithms may be logits, of any sum.
"""

import jax
import jax.numpy as jnp

from gidd_jax.draws import first_largest, largest, total
from gidd_jax.loss import at_ids


def unnormalised(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Return exp(logits / temperature) over the largest of them, at most 1: what draws need of a
    softmax; temperature 0 leaves the first of the largest."""
    if temperature == 0.0:
        return jax.nn.one_hot(first_largest(logits), logits.shape[-1], dtype=logits.dtype)
    return jnp.exp((logits - largest(logits)[..., None]) / temperature)


def log_softmax_at(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Return log_softmax(logits) at each token id, [B, L].

    From the sum of `unnormalised`, which a program computes once; the largest logit is taken off
    first, so that those near it keep their digits.
    """
    return (at_ids(logits, ids) - largest(logits)) - jnp.log(total(unnormalised(logits)))


def entropy(logits: jax.Array) -> jax.Array:
    """Return the entropy of softmax(logits), [...] in nats."""
    shifted = logits - largest(logits)[..., None]
    weights = unnormalised(logits)
    mass = total(weights)
    mean = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=-1) / mass
    return jnp.log(mass) - mean


def temper(log_probs: jax.Array, temperature: float) -> jax.Array:
    """Return log-probabilities proportional to p^(1/temperature); 0 puts all on the largest."""
    if temperature == 1.0:
        return log_probs
    if temperature == 0.0:
        best = jnp.argmax(log_probs, axis=-1)
        return jnp.where(jax.nn.one_hot(best, log_probs.shape[-1], dtype=bool), 0.0, -jnp.inf)
    return jax.nn.log_softmax(log_probs / temperature)


def keep_top_k(log_probs: jax.Array, top_k: int) -> jax.Array:
    """Return the log-probabilities of the top_k most probable tokens (and ties), normalised."""
    if top_k >= log_probs.shape[-1]:
        return log_probs
    smallest = jax.lax.top_k(log_probs, top_k)[0][..., -1:]
    return jax.nn.log_softmax(jnp.where(log_probs >= smallest, log_probs, -jnp.inf))


def keep_top_p(log_probs: jax.Array, top_p: float) -> jax.Array:
    """Return the smallest set of most probable tokens whose sum exceeds top_p, normalised.

    A token stays while the sum of those before it is at most top_p (nucleus sampling, arXiv
    1904.09751); tokens as probable as the last of the set stay too.
    """
    log_probs = jax.nn.log_softmax(log_probs)
    ordered = -jnp.sort(-jnp.exp(log_probs), axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    count = jnp.sum(before <= top_p, axis=-1, keepdims=True)
    smallest = jnp.take_along_axis(ordered, count - 1, axis=-1)
    return jax.nn.log_softmax(jnp.where(jnp.exp(log_probs) >= smallest, log_probs, -jnp.inf))


def keep_min_p(probs: jax.Array, min_p: float) -> jax.Array:
    """Return probs without the entries below min_p, normalised; the largest one always stays."""
    most = jnp.max(probs, axis=-1, keepdims=True)
    kept = jnp.where(probs >= jnp.minimum(min_p, most), probs, 0.0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def filter_log_probs(
    log_probs: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Apply temperature, then top_k (0: all), then top_p (1: all).

    The result is normalised, unless no filter is on: then it is what was given.
    """
    log_probs = temper(log_probs, temperature)
    if top_k > 0:
        log_probs = keep_top_k(log_probs, top_k)
    if top_p < 1.0:
        log_probs = keep_top_p(log_probs, top_p)
    return log_probs
