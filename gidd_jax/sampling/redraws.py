"""Steps that return to tokens: rounds of redraws, and acceptance by entropy with editing.

Both keep, for each position, what they know of it between calls. Arguments as in `steps`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gidd_jax.draws import fold_in, num_levels, uniforms
from gidd_jax.loss import at_ids
from gidd_jax.process import InterpolatingProcess, NoiseMass
from gidd_jax.sampling.filters import entropy, unnormalised
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.sampling.steps import Network, Predicted, Taken, draw, draw_noise, highest


class Rounds(NamedTuple):
    """How often each position was drawn, int32 [B, L], by `adaptive`."""

    drawn: jax.Array


class Editing(NamedTuple):
    """What `entropy_bound` knows: where tokens are still to be drawn, bool [B, L]; P(a token is
    wrong), float32 [B, L]; the argmax of the last call, int32 [B, L], and in how many calls it
    stood still, int32 [B]; rows that have stopped, bool [B]."""

    open: jax.Array
    wrong: jax.Array
    argmax: jax.Array
    still: jax.Array
    stopped: jax.Array


def num_rounds(num_active: jax.Array, num_steps: ArrayLike) -> jax.Array:
    """Return how often every one of `num_active` [B] positions is drawn: at least once."""
    return jnp.maximum(1, num_steps // jnp.maximum(num_active, 1))


def round_times(
    process: InterpolatingProcess, drawn: jax.Array, rounds: jax.Array, *, ahead: int = 0
) -> jax.Array:
    """Return the times [B, L] that positions drawn so often are at, `ahead` rounds from now.

    From t_max, where nothing is drawn yet, to t_min after the last of `rounds` [B], by squares: a
    round leaves positions at two times, which a network with one time a row cannot tell apart, and
    what the last rounds leave wrong nothing mends.
    """
    left = jnp.maximum(1 - (drawn + ahead) / rounds[:, None], 0.0)
    return (process.t_min + (process.t_max - process.t_min) * left**2).astype(jnp.float32)


def adaptive_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    network: Network,
    z_t: jax.Array,
    active: jax.Array,
    state: Rounds,
    step: ArrayLike,
    num_steps: ArrayLike,
) -> tuple[Taken, Rounds]:
    """Redraw z_i ~ alpha_s x_hat + beta_s pi_s where z_i is the noisiest, in rounds of falling s.

    Such a redraw takes position i alone from its time to s and is exact for every process (a Gibbs
    step of the law in which each position has a time of its own), as long as the choice of i does
    not look at tokens that say something. In the first round the others are noise of the prior,
    which says nothing, and those of least entropy go first; later rounds pick at random. With more
    steps than tokens there are more rounds.
    """
    num_active = jnp.sum(active, axis=-1)
    rounds = num_rounds(num_active, num_steps)
    least = jnp.min(jnp.where(active, state.drawn, jnp.iinfo(jnp.int32).max), axis=-1)
    next_ones = active & (state.drawn == least[:, None])
    is_first = (least == 0)[:, None]
    total = rounds * num_active
    due = (total * (step + 1) + num_steps - 1) // num_steps - jnp.sum(
        jnp.where(active, state.drawn, 0), axis=-1
    )
    u = uniforms(fold_in(keys, 0), z_t.shape[1], 1 + num_levels(network.num_columns))
    noise = draw_noise(process, fold_in(keys, 1), z_t.shape[1])
    s = round_times(process, state.drawn, rounds, ahead=1)
    alpha, mask = process.alpha(s), process.beta_pi(s).mask
    noise = jnp.where(u[..., 0] < alpha + mask, process.mask_id, noise)
    is_clean = u[..., 0] < alpha
    in_order = highest(uniforms(fold_in(keys, 2), z_t.shape[1], 1)[..., 0], next_ones, due)
    wanted = jnp.where(is_first, next_ones & (due > 0)[:, None], in_order & is_clean)

    def judge(said: Predicted, levels: jax.Array) -> Any:
        return *draw(said, levels), entropy(said.logits)

    clean, log_probs, spread = network.ask(wanted, judge, u[..., 1:])
    chosen = jnp.where(is_first, highest(-spread, next_ones, due), in_order)
    z = jnp.where(chosen, jnp.where(is_clean, clean, noise), z_t)
    return Taken(z, log_probs, wanted), Rounds(state.drawn + chosen)


def entropy_bound_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    network: Network,
    z_t: jax.Array,
    active: jax.Array,
    state: Editing,
    t: jax.Array,
    step: ArrayLike,
    num_steps: ArrayLike,
    options: SamplerOptions,
) -> tuple[Taken, Editing]:
    """Draw as many open positions as may be drawn together, and reopen tokens that look wrong.

    For positions S drawn together KL(their joint law || the product) <= sum_S H - max_S H, H the
    entropies of x_hat (arXiv 2505.24857): the longest run by rising entropy whose bound is at most
    epsilon is drawn from x_hat, and at least what is open over the calls that are left. What stays
    open becomes noise of the process. A token is reopened when the chance that it is noise at the
    row's time t [B], b (1 - x_hat(z)) / (alpha x_hat(z) + b) (see `suspicion`), exceeds edit_above.
    A row stops when nothing is open and nothing can be reopened; and early, when the argmax stood
    still for `stop_after` calls and the mean entropy is below stop_entropy, at all positions that
    may still change: what is open is drawn. A block's last call draws all.
    """
    edits, stops = options.edit_above < 1, options.stop_after > 0
    runs = active & ~state.stopped[:, None]
    candidates = runs & state.open
    # Without editing drawn tokens stay, and under masks x_hat is untrained where one stands.
    wanted = runs if edits else candidates
    levels = uniforms(fold_in(keys, 0), z_t.shape[1], num_levels(network.num_columns))
    alpha, mass = process.alpha(t)[:, None], process.beta_pi(t)
    at_z = process.mass_at(NoiseMass(*(m[:, None] for m in mass)), z_t)
    noise_mass = jnp.broadcast_to(at_z, z_t.shape)
    alpha = jnp.broadcast_to(alpha, z_t.shape)

    def judge(
        said: Predicted, levels: jax.Array, z_t: jax.Array, alpha: jax.Array, noise_mass: jax.Array
    ) -> Any:
        p = unnormalised(said.logits)
        at_token = at_ids(p, z_t) / jnp.sum(p, axis=-1)
        q = alpha * at_token + noise_mass
        wrong = noise_mass * (1 - at_token) / jnp.where(q > 0, q, 1.0)
        return *draw(said, levels), entropy(said.logits), wrong, jnp.argmax(p, axis=-1)

    drawn, log_probs, spread, wrong, argmax = network.ask(
        wanted, judge, levels, z_t, alpha, noise_mass
    )
    is_last = jnp.asarray(step) == num_steps - 1
    reopened = runs & ~state.open & (wrong > options.edit_above) & ~is_last
    calls_left = jnp.asarray(num_steps) - step
    due = (jnp.sum(candidates, axis=-1) + calls_left - 1) // calls_left
    sure = _within_bound(spread, candidates, options.epsilon)
    chosen = highest(-spread, candidates, jnp.maximum(sure, due))
    still = jnp.where(jnp.all((argmax == state.argmax) | ~wanted, axis=-1), state.still + 1, 0)
    stopped = state.stopped
    if stops:
        total = jnp.sum(jnp.where(wanted, spread, 0.0), axis=-1)
        mean = total / jnp.maximum(jnp.sum(wanted, axis=-1), 1)
        stopped |= (still >= options.stop_after) & (mean < options.stop_entropy)
        chosen = jnp.where(stopped[:, None], candidates, chosen)
        reopened &= ~stopped[:, None]
    is_open = (state.open & ~chosen) | reopened
    u = uniforms(fold_in(keys, 1), z_t.shape[1], 1)[..., 0]
    noise = draw_noise(process, fold_in(keys, 2), z_t.shape[1])
    share = mass.mask / (mass.mask + process.num_noise_tokens * mass.uniform)
    noise = jnp.where(u < share[:, None], process.mask_id, noise)
    z = jnp.where(chosen, drawn, jnp.where(runs & is_open, noise, z_t))
    # A token that was just drawn from x_hat was judged by nothing yet.
    wrong = jnp.where(chosen, 0.0, jnp.where(runs & edits, wrong, state.wrong))
    if not edits:
        stopped |= ~jnp.any(active & is_open, axis=-1)
    return Taken(z, log_probs, wanted), Editing(
        is_open, wrong, jnp.where(wanted, argmax, state.argmax), still, stopped
    )


def _within_bound(spread: jax.Array, candidates: jax.Array, epsilon: float) -> jax.Array:
    """Return how many candidates of least entropy [B, L] keep the bound, int32 [B]."""
    ordered = jnp.sort(jnp.where(candidates, spread, jnp.inf), axis=-1)
    finite = jnp.isfinite(ordered)
    values = jnp.where(finite, ordered, 0.0)
    return jnp.sum(finite & (jnp.cumsum(values, axis=-1) - values <= epsilon), axis=-1)
