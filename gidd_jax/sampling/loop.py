"""Sampling from diffusion models: one compiled loop for every method.

One scan goes through a schedule of network calls with the step of the chosen method; calls that
could change nothing are not made. Every row draws from its own key, so that a sample depends on
the seed and its number, not on the batch it was made in. Probabilities and draws are float32.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax.draws import fold_in
from gidd_jax.likelihood import Denoiser
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling import steps
from gidd_jax.sampling.filters import filter_log_probs, keep_min_p, unnormalised
from gidd_jax.sampling.options import ANCESTRAL, REMASKING, SamplerOptions
from gidd_jax.sampling.schedule import Schedule, check_method, make_schedule
from gidd_jax.sampling.steps import Network, Taken
from gidd_jax.sampling.thinning import network_at


class Prompt(NamedTuple):
    """What is given: ids int32 [B, L], and bool [B, L] where a token is to be generated."""

    ids: jax.Array
    free: jax.Array


class Frames(NamedTuple):
    """Ids int32 before the first of S scheduled calls, `start` [B, L], and after each of them,
    `ids` [S, B, L] with `log_probs` float32 [S, B, L]."""

    start: jax.Array
    ids: jax.Array
    log_probs: jax.Array


class Drawn(NamedTuple):
    """Token ids int32 [B, L], how they came about, and the number of network calls.

    log_probs float32 [B, L]: log x_hat (before temperature and filters) of each token in the call
    that put it there; drawn_at int32 [B, L]: the number of that call from 1 on. Both are 0 for
    given tokens, and for noise of the prior that never changed. num_calls: those of the schedule,
    and one more where masks were left and filled; network_calls: those that were made, as the
    others could have changed nothing. frames: what a trace asks for.
    """

    ids: jax.Array
    log_probs: jax.Array
    drawn_at: jax.Array
    num_calls: jax.Array
    network_calls: jax.Array
    frames: Frames | None = None


def put(drawn: Drawn, taken: Taken, mask_id: int) -> Drawn:
    """Replace the ids by those after a step and note the changes.

    A log-probability that is no number stays, also where nothing changed: of such a network the
    ids may look sound.
    """
    number = drawn.num_calls + 1
    changed = taken.ids != drawn.ids
    log_probs = jnp.where(taken.ids == mask_id, 0.0, taken.log_probs)
    log_probs = jnp.where(changed, log_probs, drawn.log_probs)
    is_broken = (taken.asked & jnp.isnan(taken.log_probs)) | jnp.isnan(drawn.log_probs)
    return Drawn(
        ids=taken.ids,
        log_probs=jnp.where(is_broken, jnp.nan, log_probs),
        drawn_at=jnp.where(changed, number, drawn.drawn_at),
        num_calls=number,
        network_calls=drawn.network_calls + jnp.any(taken.asked),
    )


def sample_diffusion(
    process: InterpolatingProcess,
    denoise: Denoiser,
    options: SamplerOptions,
    keys: jax.Array,
    length: int,
    prompt: Prompt | None = None,
    num_free: int | None = None,
    trace: bool = False,
    project: Callable[[jax.Array], jax.Array] = lambda features: features,
) -> Drawn:
    """Generate token ids [B, length] from one key per row: one scan over the network calls.

    denoise: (z_t, t) -> what `project` makes logits [..., V] of, position by position; only
    positions where a token can change are projected (see `thinning`).

    prompt: given tokens stay as they are; num_free: the most tokens that a row of it generates.
    Blocks count the tokens to generate. The network sees the whole row: blocks still to come are
    prior noise. trace: also return what every call left, 8 bytes a token and call. Raises
    InputError when the method cannot sample this process.
    """
    check_method(process, options.method)
    shape = (keys.shape[0], length)
    if prompt is None:
        prompt = Prompt(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))
    num_free = length if num_free is None else num_free
    schedule = make_schedule(process, options, num_free)
    block_length = min(options.block_length or num_free, num_free)
    block_of = (jnp.cumsum(prompt.free, axis=-1) - 1) // block_length

    def network(z_t: jax.Array, t: jax.Array) -> Network:
        weights = functools.partial(weights_of, options)
        return network_at(process, denoise, project, weights, z_t, t)

    def call(carry: tuple[Drawn, jax.Array], now: Schedule):
        drawn, t = carry
        active = prompt.free & (block_of == now.block)
        step_keys = fold_in(keys, 2 + now.block * schedule.num_steps + now.step)
        if options.method == "first_hitting":
            num_masked = jnp.sum(active & (drawn.ids == process.mask_id), axis=-1)
            t = jnp.where(num_masked == jnp.sum(active, axis=-1), now.t, t)  # a new block
            t = steps.hitting_time(process, fold_in(step_keys, 2), t, num_masked)
        else:
            t = jnp.full_like(t, now.t)
        taken = take_step(
            process,
            options,
            schedule.num_steps,
            step_keys,
            network(drawn.ids, t),
            drawn.ids,
            active,
            t,
            now,
        )
        drawn = put(drawn, taken, process.mask_id)
        return (drawn, t), (drawn.ids, drawn.log_probs) if trace else None

    prior = jax.vmap(lambda key: process.sample_prior(key, (length,)))(fold_in(keys, 0))
    if options.method == "confidence":
        prior = jnp.full(shape, process.mask_id, jnp.int32)
    zeros = jnp.zeros(shape, jnp.int32)
    start = Drawn(
        ids=jnp.where(prompt.free, prior, prompt.ids),
        log_probs=zeros.astype(jnp.float32),
        drawn_at=zeros,
        num_calls=jnp.int32(0),
        network_calls=jnp.int32(0),
    )
    t_max = jnp.full(shape[:1], process.t_max, jnp.float32)
    (drawn, _), after = jax.lax.scan(call, (start, t_max), jax.tree.map(jnp.asarray, schedule))
    frames = None if after is None else Frames(start.ids, *after)
    if options.fill_masks:
        last = network(drawn.ids, jnp.full_like(t_max, process.t_min))
        filled = steps.fill_step(process, fold_in(keys, 1), last, drawn.ids, prompt.free)
        num_calls = drawn.num_calls + jnp.any(filled.asked)
        drawn = put(drawn, filled, process.mask_id)._replace(num_calls=num_calls)
    return drawn._replace(frames=frames)


def filtered(options: SamplerOptions, log_probs: jax.Array) -> jax.Array:
    """Return the log-probabilities after the temperature, top-k and top-p of the options."""
    return filter_log_probs(
        log_probs, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
    )


def filtered_x_hat(options: SamplerOptions, log_x_hat: jax.Array) -> jax.Array:
    """Return the distribution that tokens are drawn from."""
    x_hat = jnp.exp(filtered(options, log_x_hat))
    return keep_min_p(x_hat, options.min_p) if options.min_p > 0 else x_hat


def weights_of(options: SamplerOptions, logits: jax.Array) -> jax.Array:
    """Return weights of any sum to draw tokens by; ancestral steps apply min-p themselves."""
    if options.min_p > 0 and options.method not in ANCESTRAL:
        return filtered_x_hat(options, jax.nn.log_softmax(logits))
    return unnormalised(filtered(options, logits))


def take_step(
    process: InterpolatingProcess,
    options: SamplerOptions,
    num_steps: int,
    keys: jax.Array,
    network: Network,
    z_t: jax.Array,
    active: jax.Array,
    t: jax.Array,
    now: Schedule,
) -> Taken:
    """Take the step of one call by the method of the options, at active positions."""
    place = (process, keys, network, z_t, active)
    if options.method in ANCESTRAL:
        kappa = options.kappa if options.method == "psi" else 1.0
        if options.min_p > 0:
            return steps.filtered_ancestral_step(*place, now.t, now.s, kappa, options.min_p)
        return steps.ancestral_step(*place, now.t, now.s, kappa)
    if options.method in REMASKING:
        return steps.remask_step(*place, now.t, now.s, now.sigma)
    if options.method == "first_hitting":
        return steps.first_hitting_step(*place)
    num_active = jnp.sum(active, axis=-1)
    if options.method == "confidence":
        # After step i of n, ceil(num_active i / n) tokens are there.
        num_masked = jnp.sum(active & (z_t == process.mask_id), axis=-1)
        due = (num_active * (now.step + 1) + num_steps - 1) // num_steps
        return steps.confidence_step(*place, due - (num_active - num_masked))
    spread = (num_active + num_steps - 1) // num_steps
    count = jnp.full_like(spread, options.tokens_per_step) if options.tokens_per_step else spread
    return steps.adaptive_step(*place, now.t, count)
