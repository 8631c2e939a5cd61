"""Upper bounds on -log p(x): the diffusion bound with both of its boundary terms, and exact values.

-log p(x) <= reconstruction + middle + prior (paper, theorem 2), per token and in nats:
reconstruction E[-log p(x|z)] at the first time, middle the integral of the ELBO integrand,
prior KL(q_T(.|x) || p_T) at the last time. The original reports the middle term alone, which is
too good by one to several percent for hybrid noise.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax.loss import (
    autoregressive_loss,
    gidd_loss,
    log_marginal,
    log_probs_at,
    masked_logits,
)
from gidd_jax.process import InterpolatingProcess, expand_time

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]  # (z_t [B, L], t [B]) -> logits [B, L, C]


class Nelbo(NamedTuple):
    """The three terms of the bound, float32 [B, L], in nats per token."""

    reconstruction: jax.Array
    middle: jax.Array
    prior: jax.Array

    @property
    def total(self) -> jax.Array:
        return self.reconstruction + self.middle + self.prior


def reconstruction_nll(
    process: InterpolatingProcess,
    logits: jax.Array,
    x: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
    keep_padding_columns: bool = False,
) -> jax.Array:
    """Return -log q(x|z_t, x_hat), [B, L]: the last step of the model, from time t to the data."""
    log_x_hat = jax.nn.log_softmax(masked_logits(process, logits, keep_padding_columns))
    t = expand_time(t, x)
    log_alpha, at_z = jnp.log(process.alpha(t)), process.mass_at(process.beta_pi(t), z_t)
    log_q_z_given_x = log_marginal(jnp.where(z_t == x, log_alpha, -jnp.inf), at_z)
    log_q_z = log_marginal(log_alpha + log_probs_at(log_x_hat, z_t), at_z)
    # Under masks alone an unmasked token is certain: 0/0 in the general formula.
    certain = (z_t == x) & (at_z == 0)
    nll = log_q_z - log_q_z_given_x - log_probs_at(log_x_hat, x)
    return jnp.where(certain, 0.0, nll)


def prior_kl(process: InterpolatingProcess, x: jax.Array) -> jax.Array:
    """Return KL(q_T(.|x) || p_T), [B, L]; p_T is the marginal of uniformly distributed data."""
    t = jnp.float32(process.t_max)
    alpha, mass = process.alpha(t), process.beta_pi(t)
    at_x = process.mass_at(mass, x)
    data = alpha / process.num_noise_tokens
    # sum over v of q(v|x) log(q(v|x) / p_T(v)); every v but x has q(v|x) = b_v, p_T(v) = b_v + data
    ids = jnp.arange(process.vocab_size)
    others = jnp.where(ids == process.mask_id, 0.0, process.mass_at(mass, ids))
    log_ratio = jnp.log1p(data / jnp.where(others > 0, others, 1.0))
    terms = jnp.where(others > 0, others * log_ratio, 0.0)
    at_x_term = (alpha + at_x) * (jnp.log(alpha + at_x) - jnp.log(data + at_x))
    return at_x_term - (jnp.sum(terms) - terms[x])


def nelbo(
    process: InterpolatingProcess,
    denoise: Denoiser,
    key: jax.Array,
    x: jax.Array,
    *,
    num_samples_t: int = 1,
    stratified: bool = True,
    keep_padding_columns: bool = False,
) -> Nelbo:
    """Estimate the bound for token ids x [B, L] with `num_samples_t` times per sequence.

    The times of all draws are stratified together over the batch. Unbiased for every draw count.
    """
    batch = x.shape[0]
    time_key, *keys = jax.random.split(key, num_samples_t + 2)
    times = process.sample_t(time_key, batch * num_samples_t, stratified)
    times = times.reshape(batch, num_samples_t).T if stratified else times.reshape(-1, batch)

    def middle(total: jax.Array, draw: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        draw_key, t = draw
        z_t = process.sample(draw_key, x, t)
        losses = gidd_loss(
            process,
            denoise(z_t, t),
            x,
            z_t,
            t,
            weighting="elbo",
            keep_padding_columns=keep_padding_columns,
        )
        return total + losses.elbo, None

    zeros = jnp.zeros(x.shape, jnp.float32)
    total, _ = jax.lax.scan(middle, zeros, (jnp.stack(keys[1:]), times))
    t_min = jnp.full((batch,), process.t_min, jnp.float32)
    z_min = process.sample(keys[0], x, t_min)
    reconstruction = reconstruction_nll(
        process, denoise(z_min, t_min), x, z_min, t_min, keep_padding_columns
    )
    span = process.t_max - process.t_min
    return Nelbo(reconstruction, total * (span / num_samples_t), prior_kl(process, x))


def autoregressive_nelbo(predict: Callable[[jax.Array], jax.Array], x: jax.Array) -> Nelbo:
    """Return the exact -log p of each token but the first (0) as the middle term, [B, L]."""
    nll = jnp.pad(autoregressive_loss(predict(x), x), [(0, 0), (1, 0)])
    return Nelbo(jnp.zeros_like(nll), nll, jnp.zeros_like(nll))
