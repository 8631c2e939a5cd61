"""Which tokens of a text are probably wrong, by a trained diffusion model.

The text z is taken as data x that went through the forward process up to a small time t, where
some tokens became uniform noise. A token is suspicious as far as it is noise, P(x_i != z_i | z):

    p_i(v) = P(x_i = v | z without position i)                      the prior, from the context
    q_t(z_i|v) = alpha_t 1[v = z_i] + b,  b = (beta_t pi_t)(z_i)    the process, token by token
    P(x_i = v | z) = q_t(z_i|v) p_i(v) / sum_w q_t(z_i|w) p_i(w)    Bayes
    P(x_i != z_i | z) = b (1 - p_i(z_i)) / (alpha_t p_i(z_i) + b)   two numbers of the process

x_hat of GIDD is this prior p_i, not the posterior: the bound plugs x_hat into q(z_s|z_t, x_hat),
so its minimiser leaves position i out although the network sees it. 1 - x_hat(z_i) would count the
evidence of z_i not at all, and flag every token that is merely hard to guess.

One pass reads every p_i from one call on z. For training weights that are the ELBO's up to a factor
of t the minimiser is p_i; "clip" and the hybrid family's "dynamic" weigh z_i = x_i more, which
multiplies the odds of x_hat(z_i) by the same factor at all positions: ranks stay, probabilities are
too low. Leaving one out masks each position in turn: on a mask all weights agree, and posterior
and prior are the same. The network is still told t: the other tokens are noise of that time, and
under a later one it would trust them too little. Where the only noise is the mask no token is ever
noise (b = 0), and what leaving one out gives is 1 - p_i(z_i): how unexpected a token is. It ranks,
but is not calibrated.

Self-correction (`correction`) scores a change by the tempered x_hat of its proposal and asks which
change to make first; it never asks how probable the token that stands there is as noise. With score
"suspicion" it asks just that, by one pass.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax.errors import InputError
from gidd_jax.likelihood import Denoiser
from gidd_jax.loss import at_ids, log_marginal, masked_logits
from gidd_jax.process import InterpolatingProcess, expand_time
from gidd_jax.sampling.options import SuspicionOptions
from gidd_jax.sampling.schedule import is_mask_only
from gidd_jax.sampling.times import CLEAN


class Suspicion(NamedTuple):
    """For each token [B, L]: P(it is wrong), the best other token, and P(that is what belongs).

    Both probabilities are of one distribution: what is right is the token, its proposal or another.
    """

    wrong: jax.Array
    proposals: jax.Array
    proposal_probs: jax.Array


def check_suspicion(process: InterpolatingProcess, options: SuspicionOptions) -> None:
    """Raise InputError when the method finds no wrong token under this process."""
    if options.method == "one_pass" and is_mask_only(process):
        raise InputError(
            "method 'one_pass' needs a process with noise other than the mask, under masks alone "
            "no token is ever wrong: use method 'leave_one_out'"
        )


def expected_share(process: InterpolatingProcess, t: float) -> float:
    """Return the share of noise among tokens other than the mask at time t, which is the prior."""
    noise = process.beta_pi(t).uniform * process.num_noise_tokens
    return float(noise / (noise + process.alpha(t)))


def judge(
    process: InterpolatingProcess,
    denoise: Denoiser,
    options: SuspicionOptions,
    z: jax.Array,
    free: jax.Array | None = None,
) -> Suspicion:
    """Judge every token of z int [B, L]: one call of the network, or L to leave each out.

    free bool [B, L]: the tokens that may be wrong, None: all; the others are at time 0.
    """
    check_suspicion(process, options)
    t = jnp.full(z.shape[:1], options.t)
    times = t if free is None else jnp.where(free, t[:, None], CLEAN)
    if options.method == "one_pass":
        return noise_posterior(process, _log_x_hat(process, denoise, z, times), z, t)

    def left_out(position: jax.Array) -> Suspicion:
        if free is None:
            return judge_one(position)
        said = jax.eval_shape(judge_one, position)
        none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), said)
        return jax.lax.cond(jnp.any(free[:, position]), judge_one, lambda _: none, position)

    def judge_one(position: jax.Array) -> Suspicion:
        log_x_hat = _log_x_hat(process, denoise, z.at[:, position].set(process.mask_id), times)
        prior, token = log_x_hat[:, position], z[:, position]
        if is_mask_only(process):
            return surprise(prior, token)
        return noise_posterior(process, prior, token, t)

    by_position = jax.lax.map(left_out, jnp.arange(z.shape[1]))
    return Suspicion(*(jnp.swapaxes(leaf, 0, 1) for leaf in by_position))


def noise_posterior(
    process: InterpolatingProcess, log_prior: jax.Array, z: jax.Array, t: jax.Array
) -> Suspicion:
    """Return P(x != z | z) for a prior over x, log-probabilities [B, ..., V]; z [B, ...], t [B]."""
    t = expand_time(t, z)
    mass = jnp.broadcast_to(process.mass_at(process.beta_pi(t), z), z.shape)
    log_q = log_marginal(jnp.log(process.alpha(t)) + at_ids(log_prior, z), mass)
    wrong, proposals, proposal_probs = surprise(log_prior, z)
    odds = mass * jnp.exp(-log_q)
    return Suspicion(wrong * odds, proposals, proposal_probs * odds)


def surprise(log_prior: jax.Array, z: jax.Array) -> Suspicion:
    """Return 1 - p(z), the most probable other token and its p, for log p [B, ..., V]."""
    is_z = z[..., None] == jnp.arange(log_prior.shape[-1]).reshape((1,) * z.ndim + (-1,))
    others = jnp.where(is_z, 0.0, jnp.exp(log_prior))
    # The sum of the others keeps its accuracy where p(z) is close to 1.
    return Suspicion(others.sum(-1), jnp.argmax(others, axis=-1), jnp.max(others, axis=-1))


def _log_x_hat(
    process: InterpolatingProcess, denoise: Denoiser, z: jax.Array, times: jax.Array
) -> jax.Array:
    logits = masked_logits(process, denoise(z, times))[..., : process.vocab_size]
    return jax.nn.log_softmax(logits)
