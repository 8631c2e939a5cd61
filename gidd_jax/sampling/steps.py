"""One denoising step of every sampler: from z_t at time t to z_s at time s < t.

All take one key per row [B], the network, token ids int32 [B, L], where they may change, bool
[B, L], and times float32 [] or [B]. Each first makes what choices it can, then asks the network at
the positions where the rest depends on it. Ancestral, psi and remasking steps draw all positions
independently; the ordered ones (confidence, mode seeking, first hitting) choose positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gidd_jax.draws import fold_in, index_from_uniforms, num_levels, total, uniforms
from gidd_jax.loss import at_ids
from gidd_jax.process import InterpolatingProcess, expand_time
from gidd_jax.sampling.filters import entropy, keep_min_p, log_softmax_at, unnormalised


class Predicted(NamedTuple):
    """What the network says of some positions, float32 [B, K, C].

    logits: -inf where there is no token; weights: of any sum > 0, to draw tokens from.
    """

    logits: jax.Array
    weights: jax.Array


Judge = Callable[..., Any]  # (Predicted, *arrays [B, K, ...]) -> arrays [B, K, ...]


class Ask(Protocol):
    """Ask the network at positions bool [B, L], of which a row has no more than `at_most`.

    Returns there what `judge` makes of its word and of the arrays [B, L, ...], position by
    position, and 0 elsewhere.
    """

    def __call__(self, where: jax.Array, judge: Judge, *arrays: Any, at_most: int = ...) -> Any: ...


class Network(NamedTuple):
    """The network as a step sees it, at the ids and the time of the step."""

    num_columns: int
    ask: Ask


class Taken(NamedTuple):
    """Ids int32 [B, L] after a step; where the network was asked, bool [B, L], and there the
    log x_hat (before temperature and filters) of the token drawn, taken or not, float32 [B, L]."""

    ids: jax.Array
    log_probs: jax.Array
    asked: jax.Array


def draw_noise(process: InterpolatingProcess, keys: jax.Array, length: int) -> jax.Array:
    """Draw background tokens [B, length], each row from its key."""
    return jax.vmap(lambda key: process.sample_background(key, (length,)))(keys)


def draw(said: Predicted, levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw ids [B, K] by uniforms [B, K, num_levels(C)]; also log x_hat of each."""
    ids = index_from_uniforms(said.weights, levels)
    return ids, log_softmax_at(said.logits, ids)


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
    kappa: ArrayLike = 1.0,
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

    q_t(z_t) >= (beta_t pi_t)(z_t), so the coin keeps z_t if it would at x_hat(z_t) = 0; and noise
    that replaces z_t by itself, as a mask by the mask, changes nothing.
    """
    may_be_drawn = (draws.coin * draws.noise_mass < draws.step_mass) | draws.is_drawn_anew
    stays_the_same = ~draws.is_clean & (draws.noise == z_t)
    return may_be_drawn & ~stays_the_same


def finish_ancestral_step(draws: AncestralDraws, x_hat: jax.Array, z_t: jax.Array) -> jax.Array:
    """Return z_s, int32 [B, L], of choices that were made and x_hat [B, L, V], of any sum > 0."""
    q_t = draws.alpha * at_ids(x_hat, z_t) / total(x_hat) + draws.noise_mass
    redraw = (draws.coin * q_t < draws.step_mass) | draws.is_drawn_anew
    clean = index_from_uniforms(x_hat, draws.levels)
    return jnp.where(redraw, jnp.where(draws.is_clean, clean, draws.noise), z_t).astype(jnp.int32)


def ancestral_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    network: Network,
    z_t: jax.Array,
    active: jax.Array,
    t: ArrayLike,
    s: ArrayLike,
    kappa: ArrayLike = 1.0,
) -> Taken:
    """Draw z_s ~ kappa q(.|z_t, x_hat) + (1 - kappa) q_s(.|x_hat), without the posterior.

    q(z_s|z_t) is a mixture: z_t stays with probability alpha_{t|s} q_s(z_t)/q_t(z_t), otherwise
    z_s ~ q_s = alpha_s x_hat + beta_s pi_s. The distribution is that of `transition_probs`.
    kappa < 1 is the psi-posterior (arXiv 2602.21185): it draws anew, whatever z_t is, with
    probability 1 - kappa, and has the marginals of the process for every kappa. From t to itself
    it is a Gibbs sweep: a share 1 - kappa of the positions is drawn anew from alpha_t x_hat +
    beta_t pi_t, which leaves p_t as it is where one position is drawn at a time.
    """
    draws = ancestral_draws(process, keys, z_t, t, s, kappa, num_columns=network.num_columns)
    asked = active & needs_x_hat(process, draws, z_t)

    def finish(said: Predicted, draws: AncestralDraws, z_t: jax.Array) -> Any:
        z_s = finish_ancestral_step(draws, said.weights, z_t)
        return z_s, log_softmax_at(said.logits, z_s)

    z_s, log_probs = network.ask(asked, finish, draws, z_t)
    return Taken(jnp.where(asked, z_s, z_t), log_probs, asked)


def filtered_ancestral_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    network: Network,
    z_t: jax.Array,
    active: jax.Array,
    t: ArrayLike,
    s: ArrayLike,
    kappa: ArrayLike,
    min_p: float,
) -> Taken:
    """Draw z_s as `ancestral_step`, from probabilities of at least min_p alone.

    The posterior of every active position is needed for that, as in the original.
    """
    levels = uniforms(keys, z_t.shape[1], num_levels(process.vocab_size))

    def judge(said: Predicted, z_t: jax.Array, levels: jax.Array) -> Any:
        x_hat = said.weights[..., : process.vocab_size]
        x_hat = x_hat / jnp.sum(x_hat, axis=-1, keepdims=True)
        probs = transition_probs(process, x_hat, z_t, t, s, kappa)
        z_s = index_from_uniforms(keep_min_p(probs, min_p), levels)
        return z_s, log_softmax_at(said.logits, z_s)

    z_s, log_probs = network.ask(active, judge, z_t, levels)
    return Taken(jnp.where(active, z_s, z_t), log_probs, active)


def transition_probs(
    process: InterpolatingProcess,
    x_hat: jax.Array,
    z_t: jax.Array,
    t: ArrayLike,
    s: ArrayLike,
    kappa: ArrayLike = 1.0,
) -> jax.Array:
    """Return the distribution that `ancestral_step` draws from, dense [B, L, V]."""
    posterior = process.posterior_probs(x_hat, z_t, t, s)
    if isinstance(kappa, float) and kappa == 1.0:
        return posterior
    return jnp.asarray(kappa * posterior + (1 - kappa) * process.marginal_probs(x_hat, s))


def remask_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    network: Network,
    z_t: jax.Array,
    active: jax.Array,
    t: ArrayLike,
    s: ArrayLike,
    sigma: ArrayLike,
) -> Taken:
    """Draw z_s from ReMDM's posterior (arXiv 2503.00307, section 3) of a mask-only process.

    A token becomes the mask with probability sigma; the mask stays one with probability
    (1 - alpha_s - sigma alpha_t) / (1 - alpha_t), which keeps the marginals, else it is drawn from
    x_hat. sigma = 0 is the ancestral step; sigma must not exceed (1 - alpha_s) / alpha_t.
    """
    u = uniforms(keys, z_t.shape[1], 1 + num_levels(network.num_columns))
    coins, t, s = u[..., 0], expand_time(t, z_t), expand_time(s, z_t)
    masked_t, masked_s = process.beta_pi(t).mask, process.beta_pi(s).mask
    stays = coins * masked_t < masked_s - sigma * process.alpha(t)
    is_mask = z_t == process.mask_id
    lifted = active & is_mask & ~stays
    clean, log_probs = network.ask(lifted, draw, u[..., 1:])
    z_s = jnp.where(active & ~is_mask & (coins < sigma), process.mask_id, z_t)
    return Taken(jnp.where(lifted, clean, z_s), log_probs, lifted)


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
    network: Network,
    z_t: jax.Array,
    active: jax.Array,
    count: jax.Array,
    order: str = "entropy",
) -> Taken:
    """Unmask the `count` [B] active masks that the network is surest of, by a draw from x_hat.

    order "entropy": those where x_hat has the least entropy, which does not look at what is drawn:
    one token a call samples a right network exactly. "drawn": those whose drawn tokens are most
    probable, as in MaskGIT (arXiv 2202.04200) without its noise, and LLaDA (arXiv 2502.09992): of
    all draws the probable ones are kept, so no number of steps samples the network. Both are read
    before temperature and filters.
    """
    levels = uniforms(keys, z_t.shape[1], num_levels(network.num_columns))
    masked = active & (z_t == process.mask_id) & (count > 0)[:, None]

    def judge(said: Predicted, levels: jax.Array) -> Any:
        drawn, log_probs = draw(said, levels)
        return drawn, log_probs, log_probs if order == "drawn" else -entropy(said.logits)

    drawn, log_probs, score = network.ask(masked, judge, levels)
    chosen = highest(score, masked, count)
    return Taken(jnp.where(chosen, drawn, z_t), log_probs, masked)


def mode_seeking_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    network: Network,
    z_t: jax.Array,
    active: jax.Array,
    t: ArrayLike,
    count: jax.Array,
) -> Taken:
    """Redraw from x_hat the `count` [B] active positions that can improve most.

    The improvement of a position is (max_v p(v) - p(z_t)) times the noise mass of z_t at time t,
    with p = x_hat before temperature and filters: how much more probable the best token is, times
    how likely the token there is noise (adaptive sampling of arXiv 2512.10858). Masks and tokens
    alike: once every token is drawn it goes on to more probable ones, so it does not sample the
    network but climbs to a mode.
    """
    levels = uniforms(keys, z_t.shape[1], num_levels(network.num_columns))

    def judge(said: Predicted, levels: jax.Array, z_t: jax.Array) -> Any:
        p = unnormalised(said.logits)  # the largest is 1
        return *draw(said, levels), (1 - at_ids(p, z_t)) / jnp.sum(p, axis=-1)

    drawn, log_probs, gain = network.ask(active, judge, levels, z_t)
    noise = process.mass_at(process.beta_pi(expand_time(t, z_t)), z_t)
    # What cannot be noise is right: under masks alone a token that was drawn.
    chosen = highest(gain * noise, active & (noise > 0), count)
    return Taken(jnp.where(chosen, drawn, z_t), log_probs, active)


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
    network: Network,
    z_t: jax.Array,
    active: jax.Array,
) -> Taken:
    """Replace one active mask of each row, any with equal probability, by a draw from x_hat."""
    u = uniforms(keys, z_t.shape[1], 1 + num_levels(network.num_columns))
    one = jnp.ones(z_t.shape[0], jnp.int32)
    chosen = highest(u[..., 0], active & (z_t == process.mask_id), one)
    clean, log_probs = network.ask(chosen, draw, u[..., 1:], at_most=1)
    return Taken(jnp.where(chosen, clean, z_t), log_probs, chosen)


def fill_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    network: Network,
    z: jax.Array,
    active: jax.Array,
) -> Taken:
    """Replace every active mask by a draw from x_hat."""
    levels = uniforms(keys, z.shape[1], num_levels(network.num_columns))
    masked = active & (z == process.mask_id)
    clean, log_probs = network.ask(masked, draw, levels)
    return Taken(jnp.where(masked, clean, z), log_probs, masked)
