"""Per-token losses of GIDD, MDLM and the autoregressive baseline, and their reductions.

All are pure functions of arrays. Logits [B, L, C] may have more columns than the vocabulary
(C >= V, padding of the projection): those columns are left out of the softmax, unless
`keep_padding_columns` asks for the original's softmax over all of them. The mask column never
takes part: the model predicts clean tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax.process import InterpolatingProcess, as_float, expand_time


class GiddLoss(NamedTuple):
    """Per-token terms, float32 [B, L], in nats.

    loss: what is trained on, weight * (kl + is_div) with the training weight; elbo: the integrand
    of the bound (the same with the ELBO weight); kl, is_div: the two divergences, unweighted.
    """

    loss: jax.Array
    elbo: jax.Array
    kl: jax.Array
    is_div: jax.Array


def masked_logits(
    process: InterpolatingProcess, logits: jax.Array, keep_padding_columns: bool = False
) -> jax.Array:
    """Return float logits with -inf at the mask, and at columns beyond the vocabulary."""
    logits = as_float(logits)
    ids = jnp.arange(logits.shape[-1])
    excluded = ids == process.mask_id
    if not keep_padding_columns:
        excluded |= ids >= process.vocab_size
    return jnp.where(jnp.expand_dims(excluded, range(logits.ndim - 1)), -jnp.inf, logits)


def at_ids(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the values [B, L, V], such as log x_hat, at each token id, [B, L]."""
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


def positive(mass: jax.Array) -> jax.Array:
    """Return the mass with zeros replaced by one, for quotients that are masked afterwards."""
    return jnp.where(mass > 0, mass, 1.0)


def log_marginal(log_signal: jax.Array, mass: jax.Array) -> jax.Array:
    """Return log(e^log_signal + mass), where either summand may be zero."""
    log_mass = jnp.where(mass > 0, jnp.log(positive(mass)), -jnp.inf)
    return jnp.logaddexp(log_signal, jnp.broadcast_to(log_mass, log_signal.shape))


def expm1(d: jax.Array) -> jax.Array:
    """Return e^d - 1 without cancellation, by functions that kernels have, too."""
    return jnp.tanh(0.5 * d) * (jnp.exp(d) + 1.0)


def itakura_saito(log_ratio: jax.Array) -> jax.Array:
    """Return D_IS(a || b) = e^d - d - 1 for d = log(a/b)."""
    near = jnp.abs(log_ratio) < 0.25
    d = jnp.where(near, log_ratio, 0.0)
    series = jnp.ones_like(d)  # the difference cancels near 0: d^2/2 (1 + d/3 (1 + d/4 (...)))
    for k in range(14, 2, -1):
        series = 1.0 + d / k * series
    far = jnp.where(near, 1.0, log_ratio)
    return jnp.where(near, 0.5 * d * d * series, expm1(far) - far)


def gidd_divergences(
    process: InterpolatingProcess,
    log_x_hat: jax.Array,
    x: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return KL(q_t(.|x) || q_t(.|x_hat)) and D_IS(q_t(z_t|x) || q_t(z_t|x_hat)), each [B, L].

    KL = (alpha+b_x) log[(alpha+b_x) / (alpha x_hat_x + b_x)] - sum_{v != x, mask} b_v log1p(alpha
    x_hat_v / b_v) with the noise masses b; the mask term cancels because x_hat has no mask.
    """
    t = expand_time(t, x)
    alpha, mass = process.alpha(t), process.beta_pi(t)
    at_x, at_z = process.mass_at(mass, x), process.mass_at(mass, z_t)
    ids = jnp.arange(log_x_hat.shape[-1]).reshape((1,) * x.ndim + (-1,))
    other = ids != x[..., None]
    x_hat = jnp.exp(log_x_hat)

    # log[q_t(x|x) / q_t(x|x_hat)]: near x_hat_x = 1 the difference of logarithms would cancel
    rest = jnp.sum(jnp.where(other, x_hat, 0.0), axis=-1)  # 1 - x_hat_x
    near = rest < 0.5
    ratio_near = -jnp.log1p(-alpha / (alpha + at_x) * jnp.where(near, rest, 0.0))
    log_q_hat_x = log_marginal(jnp.log(alpha) + at_ids(log_x_hat, x), at_x)
    ratio_x = jnp.where(near, ratio_near, jnp.log(alpha + at_x) - log_q_hat_x)

    column_mass = mass.uniform[..., None] * process.background_ratio(ids[..., : process.vocab_size])
    odds = (alpha[..., None] * x_hat[..., : process.vocab_size]) / positive(column_mass)
    noisy = (column_mass > 0) & other[..., : process.vocab_size]
    others = jnp.sum(jnp.where(noisy, column_mass * jnp.log1p(odds), 0.0), axis=-1)
    kl = (alpha + at_x) * ratio_x - others

    ratio_z = -jnp.log1p(alpha * jnp.exp(at_ids(log_x_hat, z_t)) / positive(at_z))
    # A token without noise mass has rate 0: its (possibly infinite) IS is no part of the bound.
    scored = (z_t != process.mask_id) & (at_z > 0)
    ratio = jnp.where(scored, jnp.where(z_t == x, ratio_x, ratio_z), 0.0)
    return kl, itakura_saito(ratio)


def gidd_loss(
    process: InterpolatingProcess,
    logits: jax.Array,
    x: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
    *,
    weighting: str = "dynamic",
    min_weight: float = 0.0,
    max_weight: float = 2.0,
    keep_padding_columns: bool = False,
) -> GiddLoss:
    """Return the GIDD loss of any interpolating process (paper, theorem 2 and section 4.4).

    logits [B, L, C], x and z_t int [B, L], t [B] or [B, L]. Raises InputError for an unknown
    weighting.
    """
    log_x_hat = jax.nn.log_softmax(masked_logits(process, logits, keep_padding_columns))
    kl, is_div = gidd_divergences(process, log_x_hat, x, z_t, t)
    weights = process.loss_weights(
        x, z_t, t, weighting=weighting, min_weight=min_weight, max_weight=max_weight
    )
    elbo = process.elbo_weights(x, z_t, t) * (kl + is_div)
    return GiddLoss(loss=weights * (kl + is_div), elbo=elbo, kl=kl, is_div=is_div)


def mdlm_weights(process: InterpolatingProcess, z_t: jax.Array, t: jax.Array) -> jax.Array:
    """Return MDLM's weight of -log x_hat_x, -alpha'/(1-alpha) on masks and 0 elsewhere, [B, L].

    t [B] or [B, L].
    """
    t = expand_time(t, z_t)
    # All noise is the mask: 1 - alpha is its mass.
    mass, d_mass = jax.jvp(lambda time: process.beta_pi(time).mask, (t,), (jnp.ones_like(t),))
    return jnp.where(z_t == process.mask_id, d_mass / mass, 0.0)


def mdlm_loss(
    process: InterpolatingProcess,
    logits: jax.Array,
    x: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
    *,
    keep_padding_columns: bool = False,
) -> GiddLoss:
    """Return MDLM's loss -alpha'/(1-alpha) (-log x_hat_x) on masked tokens (arXiv 2406.07524).

    The bound of a process whose only noise is the mask; loss and elbo are the same.
    """
    log_x_hat = jax.nn.log_softmax(masked_logits(process, logits, keep_padding_columns))
    nll = -at_ids(log_x_hat, x)
    loss = mdlm_weights(process, z_t, t) * nll
    kl = jnp.where(z_t == process.mask_id, process.alpha(expand_time(t, x)) * nll, 0.0)
    return GiddLoss(loss=loss, elbo=loss, kl=kl, is_div=jnp.zeros_like(kl))


def autoregressive_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Return -log p(ids[:, 1:] | the ids before), float32 [B, L-1], in nats."""
    log_probs = jax.nn.log_softmax(as_float(logits[:, :-1]))
    return -at_ids(log_probs, ids[:, 1:])


def token_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Return the mean over all positions, or over those where mask is true."""
    if mask is None:
        return jnp.mean(values)
    total = jnp.sum(mask.astype(values.dtype))
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(total, 1.0)
