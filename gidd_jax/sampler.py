"""Sampling from diffusion models: one compiled loop for every method.

One scan goes through a schedule of network calls with the step of the chosen method. Every row
draws from its own key, so that a sample depends on the seed and its number, not on the batch it
was made in. Probabilities and draws are float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax import steps
from gidd_jax.draws import categorical, fold_in
from gidd_jax.filters import filter_log_probs, keep_min_p, unnormalised
from gidd_jax.likelihood import Denoiser
from gidd_jax.loss import log_probs_at, masked_logits
from gidd_jax.options import REMASKING, SamplerOptions
from gidd_jax.process import InterpolatingProcess
from gidd_jax.schedule import Schedule, check_method, make_schedule
from gidd_jax.thinning import thinned_step


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
    given tokens, and for noise of the prior that never changed. frames: what a trace asks for.
    """

    ids: jax.Array
    log_probs: jax.Array
    drawn_at: jax.Array
    network_calls: jax.Array
    frames: Frames | None = None


def put(drawn: Drawn, z: jax.Array, log_probs: jax.Array, mask_id: int) -> Drawn:
    """Replace the ids by z and note the changes; one more network call."""
    calls = drawn.network_calls + 1
    changed = z != drawn.ids
    log_probs = jnp.where(z == mask_id, 0.0, log_probs)
    return Drawn(
        ids=z,
        log_probs=jnp.where(changed, log_probs, drawn.log_probs),
        drawn_at=jnp.where(changed, calls, drawn.drawn_at),
        network_calls=calls,
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

    denoise: (z_t, t) -> what `project` makes logits [..., V] of, position by position; ancestral
    steps project only positions whose token can change (see `thinning`).

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

    is_thinned = options.method in ("ancestral", "psi") and options.min_p == 0.0
    kappa = options.kappa if options.method == "psi" else 1.0

    def logits_of(features: jax.Array) -> jax.Array:
        return masked_logits(process, project(features))

    def log_x_hat_of(features: jax.Array) -> jax.Array:
        # Columns that only pad the vocabulary are not tokens.
        return jax.nn.log_softmax(logits_of(features))[..., : process.vocab_size]

    def weights_of(logits: jax.Array) -> jax.Array:
        return unnormalised(filtered(options, logits))

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
        features = denoise(drawn.ids, t)
        if is_thinned:
            z, log_probs = thinned_step(
                process,
                step_keys,
                lambda places: logits_of(_rows_at(features, places)),
                weights_of,
                drawn.ids,
                active,
                t,
                now.s,
                kappa,
            )
        else:
            log_x_hat = log_x_hat_of(features)
            z = take_step(
                process,
                options,
                schedule.num_steps,
                step_keys,
                log_x_hat,
                drawn.ids,
                active,
                t,
                now,
            )
            z = jnp.where(active, z, drawn.ids)
            log_probs = log_probs_at(log_x_hat, z)
        drawn = put(drawn, z, log_probs, process.mask_id)
        return (drawn, t), (drawn.ids, drawn.log_probs) if trace else None

    prior = jax.vmap(lambda key: process.sample_prior(key, (length,)))(fold_in(keys, 0))
    if options.method == "confidence":
        prior = jnp.full(shape, process.mask_id, jnp.int32)
    zeros = jnp.zeros(shape, jnp.int32)
    start = Drawn(
        ids=jnp.where(prompt.free, prior, prompt.ids),
        log_probs=zeros.astype(jnp.float32),
        drawn_at=zeros,
        network_calls=jnp.int32(0),
    )
    t_max = jnp.full(shape[:1], process.t_max, jnp.float32)
    (drawn, _), after = jax.lax.scan(call, (start, t_max), jax.tree.map(jnp.asarray, schedule))
    frames = None if after is None else Frames(start.ids, *after)
    if not options.fill_masks:
        return drawn._replace(frames=frames)

    def fill(drawn: Drawn) -> Drawn:
        log_x_hat = log_x_hat_of(denoise(drawn.ids, jnp.full_like(t_max, process.t_min)))
        clean = categorical(fold_in(keys, 1), filtered_x_hat(options, log_x_hat))
        masked = prompt.free & (drawn.ids == process.mask_id)
        z = jnp.where(masked, clean, drawn.ids)
        return put(drawn, z, log_probs_at(log_x_hat, z), process.mask_id)

    leftover = jnp.any(prompt.free & (drawn.ids == process.mask_id))
    return jax.lax.cond(leftover, fill, lambda drawn: drawn, drawn)._replace(frames=frames)


def _rows_at(features: jax.Array, places: jax.Array) -> jax.Array:
    """Return [B, K, D] of [B, L, D]; row by row, so that a batch stays split over devices."""
    return jnp.take_along_axis(features, places[..., None], axis=1)


def filtered(options: SamplerOptions, log_probs: jax.Array) -> jax.Array:
    """Return the log-probabilities after the temperature, top-k and top-p of the options."""
    return filter_log_probs(
        log_probs, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
    )


def filtered_x_hat(options: SamplerOptions, log_x_hat: jax.Array) -> jax.Array:
    """Return the distribution that tokens are drawn from."""
    x_hat = jnp.exp(filtered(options, log_x_hat))
    return keep_min_p(x_hat, options.min_p) if options.min_p > 0 else x_hat


def take_step(
    process: InterpolatingProcess,
    options: SamplerOptions,
    num_steps: int,
    keys: jax.Array,
    log_x_hat: jax.Array,
    z_t: jax.Array,
    active: jax.Array,
    t: jax.Array,
    now: Schedule,
) -> jax.Array:
    """Draw the ids after one call by the method of the options; only active positions count."""
    s = now.s
    if options.method in ("ancestral", "psi"):  # with min-p; without it see `thinning`
        kappa = options.kappa if options.method == "psi" else 1.0
        x_hat = jnp.exp(filtered(options, log_x_hat))
        probs = steps.transition_probs(process, x_hat, z_t, t, s, kappa)
        return categorical(keys, keep_min_p(probs, options.min_p))
    x_hat = filtered_x_hat(options, log_x_hat)
    if options.method in REMASKING:
        return steps.remask_step(process, keys, x_hat, z_t, t, s, now.sigma)
    if options.method == "first_hitting":
        return steps.first_hitting_step(process, keys, x_hat, z_t, active)
    num_active = jnp.sum(active, axis=-1)
    confidence_probs = jnp.exp(log_x_hat)
    if options.method == "confidence":
        # After step i of n, ceil(num_active i / n) tokens are there.
        num_masked = jnp.sum(active & (z_t == process.mask_id), axis=-1)
        due = (num_active * (now.step + 1) + num_steps - 1) // num_steps
        count = due - (num_active - num_masked)
        return steps.confidence_step(process, keys, x_hat, confidence_probs, z_t, active, count)
    spread = (num_active + num_steps - 1) // num_steps
    count = jnp.full_like(spread, options.tokens_per_step) if options.tokens_per_step else spread
    return steps.adaptive_step(process, keys, x_hat, confidence_probs, z_t, active, t, count)
