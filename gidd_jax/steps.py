"""One denoising step of every sampler: from z_t at time t to z_s at time s < t.

All take one key per row [B], x_hat float32 [B, L, V] (a distribution over clean tokens), token ids
int32 [B, L], and times float32 [] or [B]. Ancestral, psi and remasking steps draw all positions
independently; the ordered ones (confidence, adaptive, first hitting) choose positions first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gidd_jax.draws import categorical, fold_in, index_from_uniforms, num_levels, uniforms
from gidd_jax.process import InterpolatingProcess, expand_time


def probs_at(probs: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the probability of each token id, [B, L]."""
    return jnp.take_along_axis(probs, ids[..., None], axis=-1)[..., 0]


def draw_noise(process: InterpolatingProcess, keys: jax.Array, length: int) -> jax.Array:
    """Draw background tokens [B, length], each row from its key."""
    return jax.vmap(lambda key: process.sample_background(key, (length,)))(keys)


def coins_and_tokens(
    keys: jax.Array, x_hat: jax.Array, num_coins: int
) -> tuple[jax.Array, jax.Array]:
    """Return uniforms [B, L, num_coins] and tokens [B, L] drawn from x_hat, independent."""
    count = num_coins + num_levels(x_hat.shape[-1])
    u = uniforms(keys, x_hat.shape[1], count)  # at once: generators are slow to compile
    return u[..., :num_coins], index_from_uniforms(x_hat, u[..., num_coins:])


class AncestralDraws(NamedTuple):
    """All of an ancestral step but x_hat, for every position [B, L].

    alpha: of z_t; noise_mass, step_mass: (beta_t pi_t)(z_t) and (beta_{t|s} pi_{t|s})(z_t);
    coin: uniform, whether z_t stays; is_drawn_anew: whatever z_t is; is_clean: z_s, if it is drawn,
    comes from x_hat by the uniforms `levels` [B, L, num_levels(V)], else it is `noise`.
    """

    alpha: jax.Array
    noise_mass: jax.Array
    step_mass: jax.Array
    coin: jax.Array
    is_drawn_anew: jax.Array
    is_clean: jax.Array
    levels: jax.Array
    noise: jax.Array


def ancestral_draws(
    process: InterpolatingProcess,
    keys: jax.Array,
    z_t: jax.Array,
    t: ArrayLike,
    s: ArrayLike,
    kappa: float = 1.0,
    *,
    num_columns: int,
) -> AncestralDraws:
    """Make the random choices of a step from t to s; num_columns: those of x_hat that is to come.

    See `ancestral_step`.
    """
    u = uniforms(fold_in(keys, 0), z_t.shape[1], 3 + num_levels(num_columns))
    noise = draw_noise(process, fold_in(keys, 1), z_t.shape[1])
    t, s = expand_time(t, z_t), expand_time(s, z_t)
    _, step_mass = process.transition(t, s)
    alpha_s, mass_s = process.alpha(s), process.beta_pi(s)
    return AncestralDraws(
        alpha=jnp.broadcast_to(process.alpha(t), z_t.shape),
        noise_mass=process.mass_at(process.beta_pi(t), z_t),
        step_mass=process.mass_at(step_mass, z_t),
        coin=u[..., 0],
        is_drawn_anew=u[..., 1] >= kappa,
        is_clean=u[..., 2] < alpha_s,
        levels=u[..., 3:],
        noise=jnp.where(u[..., 2] < alpha_s + mass_s.mask, process.mask_id, noise),
    )


def needs_x_hat(process: InterpolatingProcess, draws: AncestralDraws, z_t: jax.Array) -> jax.Array:
    """Return where z_s may differ from z_t, bool [B, L]: elsewhere z_t stays, whatever x_hat is.

    q_t(z_t) >= (beta_t pi_t)(z_t), so the coin keeps z_t if it would at x_hat(z_t) = 0; and a mask
    whose next token is noise of the mask stays one.
    """
    may_be_drawn = (draws.coin * draws.noise_mass < draws.step_mass) | draws.is_drawn_anew
    stays_masked = ~draws.is_clean & (draws.noise == z_t)
    return may_be_drawn & ~stays_masked


def finish_ancestral_step(draws: AncestralDraws, x_hat: jax.Array, z_t: jax.Array) -> jax.Array:
    """Return z_s, int32 [B, L], of choices that were made and x_hat [B, L, V], of any sum > 0."""
    q_t = draws.alpha * probs_at(x_hat, z_t) / jnp.sum(x_hat, axis=-1) + draws.noise_mass
    redraw = (draws.coin * q_t < draws.step_mass) | draws.is_drawn_anew
    clean = index_from_uniforms(x_hat, draws.levels)
    return jnp.where(redraw, jnp.where(draws.is_clean, clean, draws.noise), z_t).astype(jnp.int32)


def ancestral_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    x_hat: jax.Array,
    z_t: jax.Array,
    t: ArrayLike,
    s: ArrayLike,
    kappa: float = 1.0,
) -> jax.Array:
    """Draw z_s ~ kappa q(.|z_t, x_hat) + (1 - kappa) q_s(.|x_hat), [B, L], without the posterior.

    q(z_s|z_t) is a mixture: z_t stays with probability alpha_{t|s} q_s(z_t)/q_t(z_t), otherwise
    z_s ~ q_s = alpha_s x_hat + beta_s pi_s. The distribution is that of `transition_probs`.
    kappa < 1 is the psi-posterior (arXiv 2602.21185): it draws anew, whatever z_t is, with
    probability 1 - kappa, and has the marginals of the process for every kappa.
    """
    draws = ancestral_draws(process, keys, z_t, t, s, kappa, num_columns=x_hat.shape[-1])
    return finish_ancestral_step(draws, x_hat, z_t)


def transition_probs(
    process: InterpolatingProcess,
    x_hat: jax.Array,
    z_t: jax.Array,
    t: ArrayLike,
    s: ArrayLike,
    kappa: float = 1.0,
) -> jax.Array:
    """Return the distribution that `ancestral_step` draws from, dense [B, L, V]."""
    posterior = process.posterior_probs(x_hat, z_t, t, s)
    if kappa == 1.0:
        return posterior
    return kappa * posterior + (1 - kappa) * process.marginal_probs(x_hat, s)


def remask_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    x_hat: jax.Array,
    z_t: jax.Array,
    t: ArrayLike,
    s: ArrayLike,
    sigma: ArrayLike,
) -> jax.Array:
    """Draw z_s from ReMDM's posterior (arXiv 2503.00307, section 3) of a mask-only process.

    A token becomes the mask with probability sigma; the mask stays one with probability
    (1 - alpha_s - sigma alpha_t) / (1 - alpha_t), which keeps the marginals, else it is drawn from
    x_hat. sigma = 0 is the ancestral step; sigma must not exceed (1 - alpha_s) / alpha_t.
    """
    coins, clean = coins_and_tokens(keys, x_hat, 1)
    u, t, s = coins[..., 0], expand_time(t, z_t), expand_time(s, z_t)
    masked_t, masked_s = process.beta_pi(t).mask, process.beta_pi(s).mask
    stays = u * masked_t < masked_s - sigma * process.alpha(t)
    from_mask = jnp.where(stays, process.mask_id, clean)
    from_token = jnp.where(u < sigma, process.mask_id, z_t)
    return jnp.where(z_t == process.mask_id, from_mask, from_token).astype(jnp.int32)


def highest(scores: jax.Array, eligible: jax.Array, count: jax.Array) -> jax.Array:
    """Return where the `count` [B] eligible positions of highest score are, bool [B, L].

    Equal scores are taken from left to right; positions that are not eligible never count.
    """
    order = jnp.argsort(-jnp.where(eligible, scores, -jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return eligible & (rank < count[:, None])


def confidence_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    x_hat: jax.Array,
    confidence_probs: jax.Array,
    z_t: jax.Array,
    active: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """Unmask the `count` [B] active masks whose drawn tokens are most probable.

    A token is drawn from x_hat at every mask; those of highest probability under
    `confidence_probs` (the network's distribution before temperature and filters) are kept, as in
    MaskGIT (arXiv 2202.04200) without its noise, and LLaDA (arXiv 2502.09992).
    """
    drawn = categorical(keys, x_hat)
    masked = active & (z_t == process.mask_id)
    chosen = highest(probs_at(confidence_probs, drawn), masked, count)
    return jnp.where(chosen, drawn, z_t)


def adaptive_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    x_hat: jax.Array,
    confidence_probs: jax.Array,
    z_t: jax.Array,
    active: jax.Array,
    t: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """Redraw from x_hat the `count` [B] active positions that can improve most.

    The improvement of a position is (max_v p(v) - p(z_t)) times the noise mass of z_t at time t,
    with p = `confidence_probs`: how much more probable the best token is, times how likely the
    token there is noise (adaptive sampling of arXiv 2512.10858). Masks and tokens alike.
    """
    gain = jnp.max(confidence_probs, axis=-1) - probs_at(confidence_probs, z_t)
    noise = process.mass_at(process.beta_pi(expand_time(t, z_t)), z_t)
    chosen = highest(gain * noise, active, count)
    return jnp.where(chosen, categorical(keys, x_hat), z_t)


def hitting_time(
    process: InterpolatingProcess, keys: jax.Array, t: jax.Array, num_masked: jax.Array
) -> jax.Array:
    """Draw the time [B] at which the next of `num_masked` [B] masks is lifted, going down from t.

    Each mask is still one at time tau with probability m_tau/m_t, m the mask mass: the first of n
    is lifted at m_tau = m_t u^(1/n) (arXiv 2409.02908). Rows without masks keep t. Mask-only.
    """
    u = uniforms(keys, 1, 1)[:, 0, 0]
    target = process.beta_pi(t).mask * u ** (1 / jnp.maximum(num_masked, 1))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        below = process.beta_pi(middle).mask < target
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, 40, halve, (jnp.full_like(t, process.t_min), t))
    return jnp.where(num_masked > 0, 0.5 * (low + high), t)


def first_hitting_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    x_hat: jax.Array,
    z_t: jax.Array,
    active: jax.Array,
) -> jax.Array:
    """Replace one active mask of each row, any with equal probability, by a draw from x_hat."""
    masked = active & (z_t == process.mask_id)
    scores, drawn = coins_and_tokens(keys, x_hat, 1)
    one = jnp.ones(z_t.shape[0], jnp.int32)
    return jnp.where(highest(scores[..., 0], masked, one), drawn, z_t)
