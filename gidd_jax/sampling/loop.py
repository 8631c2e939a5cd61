"""Sampling from diffusion models: one compiled loop for every method.

One scan goes through a schedule of network calls with the step of the chosen method; calls that
could change nothing are not made. The network is told the time of every position (see `times`).
Every row draws from its own key, so that a sample depends on the seed and its number, not on the
batch it was made in. Probabilities and draws are float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gidd_jax.draws import fold_in
from gidd_jax.likelihood import Denoiser
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling import methods, steps
from gidd_jax.sampling.filters import filter_log_probs, keep_min_p, unnormalised
from gidd_jax.sampling.methods import Call, Memory
from gidd_jax.sampling.options import ANCESTRAL, SamplerOptions
from gidd_jax.sampling.schedule import Schedule, check_options, make_schedule
from gidd_jax.sampling.steps import Network, Taken
from gidd_jax.sampling.thinning import guided, network_at
from gidd_jax.sampling.times import CLEAN, row_times
from gidd_jax.sampling.windows import Place, View, Windows, aligned_blocks


class Prompt(NamedTuple):
    """What is given: ids int32 [B, L], and bool [B, L] where a token is to be generated.

    within bool [B, L]: positions that belong to the rows, None: all; condition bool [B, L]: given
    tokens that guidance weighs, None: all that are given.
    """

    ids: jax.Array
    free: jax.Array
    within: jax.Array | None = None
    condition: jax.Array | None = None


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
    others could have changed nothing. stopped_at int32 [B]: calls after which a row was done.
    frames: what a trace asks for.
    """

    ids: jax.Array
    log_probs: jax.Array
    drawn_at: jax.Array
    num_calls: jax.Array
    network_calls: jax.Array
    stopped_at: jax.Array
    frames: Frames | None = None


def put(drawn: Drawn, taken: Taken, mask_id: int, calls: int = 1) -> Drawn:
    """Replace the ids by those after a step and note the changes.

    A log-probability that is no number stays, also where nothing changed: of such a network the
    ids may look sound. calls: of the network, if it was asked.
    """
    number = drawn.num_calls + 1
    changed = taken.ids != drawn.ids
    log_probs = jnp.where(taken.ids == mask_id, 0.0, taken.log_probs)
    log_probs = jnp.where(changed, log_probs, drawn.log_probs)
    is_broken = (taken.asked & jnp.isnan(taken.log_probs)) | jnp.isnan(drawn.log_probs)
    return drawn._replace(
        ids=taken.ids,
        log_probs=jnp.where(is_broken, jnp.nan, log_probs),
        drawn_at=jnp.where(changed, number, drawn.drawn_at),
        num_calls=number,
        network_calls=drawn.network_calls + calls * jnp.any(taken.asked),
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
    windows: Windows | None = None,
    end_id: int | None = None,
) -> Drawn:
    """Generate token ids [B, length] from one key per row: one loop over the network calls.

    denoise: (z_t, times [B, L]) -> what `project` makes logits [..., V] of, position by position;
    only positions where a token can change are projected (see `thinning`). Given tokens are at
    time 0, those still to come at t_max: `times.row_times` makes of it what a network with one
    time a row is told.

    prompt: given tokens stay as they are; num_free: the most tokens that a row of it generates, or
    more (of a model by blocks those between the first and the last of them, too): the calls end
    with the last block that a row has. Blocks count the tokens to generate. The network sees the
    whole row: blocks still to come are prior noise. trace: also return what every call left, 8
    bytes a token and call. windows: the network by windows, which then stands in for `denoise` (not
    with guidance). end_id: a row whose finished blocks hold it is done; None: rows go on. Raises
    InputError when the method cannot sample this process.
    """
    check_options(process, options)
    shape = (keys.shape[0], length)
    if prompt is None:
        prompt = Prompt(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))
    num_free = length if num_free is None else num_free
    if windows is not None and windows.block_length:
        block_of = aligned_blocks(prompt.free, windows.block_length)
        num_free += windows.block_length - 1  # a block more, where the first is begun
    else:
        block_length = min(options.block_length or num_free, num_free)
        block_of = (jnp.cumsum(prompt.free, axis=-1) - 1) // block_length
    schedule = make_schedule(process, options, num_free)
    last_block = jnp.max(jnp.where(prompt.free, block_of, 0), axis=-1)
    calls = 1 if options.guidance == 1.0 else 2
    fills = options.fill_masks and options.method != "entropy_bound"  # which leaves nothing open

    condition = ~prompt.free if prompt.condition is None else prompt.condition

    def network(keys: jax.Array, z_t: jax.Array, times: jax.Array, view: View | None) -> Network:
        asked = (denoise if windows is None else windows.denoiser(view)), project
        if options.guidance != 1.0:
            asked = guided(process, *asked, options.guidance, condition, keys)
        return network_at(process, *asked, functools.partial(weights_of, options), z_t, times)

    def closed(
        here: Call, taken: Taken, times: jax.Array, view: View | None
    ) -> tuple[Taken, jax.Array]:
        """Fill the masks that the last step of a block leaves: the next block relies on it.

        Also tells whether there were any, which takes a call more.
        """

        def fill() -> tuple[Taken, jax.Array]:
            asked = network(fold_in(here.keys, 3), taken.ids, times, view)
            filled = steps.fill_step(process, fold_in(here.keys, 4), asked, taken.ids, here.active)
            log_probs = jnp.where(filled.asked, filled.log_probs, taken.log_probs)
            return Taken(filled.ids, log_probs, taken.asked | filled.asked), jnp.any(filled.asked)

        return jax.lax.cond(here.now.is_last, fill, lambda: (taken, jnp.bool_(False)))

    def call(state: _State, now: Schedule) -> _State:
        drawn, memory, was_done, view = state
        active = prompt.free & (block_of >= now.first) & (block_of <= now.block)
        active &= (last_block >= now.block)[:, None]
        ahead = prompt.free & (block_of > now.block)
        if end_id is not None:
            active &= ~was_done[:, None]
        keys_now = fold_in(keys, 2 + drawn.num_calls)
        ids = drawn.ids
        if options.reopen:
            again = noised(process, fold_in(keys_now, 5), ids, now.t)
            ids = jnp.where(active & now.reopens & (now.step == 0), again, ids)
        here = Call(process, options, keys_now, ids, active, now)
        times, memory = methods.times(here, memory)
        times = jnp.where(active, times, jnp.where(ahead, process.t_max, CLEAN))
        if windows is not None:
            view = windows.moved(view, ids, Place(prompt.free, active, ahead, now))
        asked = network(fold_in(keys_now, 3), ids, times, view)
        taken, memory = methods.step(here, asked, row_times(process, times, prompt.within), memory)
        if windows is not None and fills:
            was_asked = jnp.any(taken.asked)
            taken, fills_some = closed(here, taken, times, view)
            both = calls * (was_asked & fills_some)
            drawn = drawn._replace(network_calls=drawn.network_calls + both)
        drawn = put(drawn, taken, process.mask_id, calls)
        done = methods.is_done(here, memory)
        if done is None:
            done = now.closes & (options.block_length > 0)
        stops = done & (now.block >= last_block)
        if end_id is not None:
            has_end = jnp.any(
                prompt.free & (block_of <= now.block) & (drawn.ids == end_id), axis=-1
            )
            stops |= has_end & now.closes
        first = stops & ~was_done
        drawn = drawn._replace(stopped_at=jnp.where(first, drawn.num_calls, drawn.stopped_at))
        return _State(drawn, memory, was_done | stops, view)

    prior = jax.vmap(lambda key: process.sample_prior(key, (length,)))(fold_in(keys, 0))
    if options.method == "confidence":
        prior = jnp.full(shape, process.mask_id, jnp.int32)
    zeros, row_zeros = jnp.zeros(shape, jnp.int32), jnp.zeros(shape[:1], jnp.int32)
    drawn = Drawn(
        ids=jnp.where(prompt.free, prior, prompt.ids),
        log_probs=zeros.astype(jnp.float32),
        drawn_at=zeros,
        num_calls=jnp.int32(0),
        network_calls=jnp.int32(0),
        stopped_at=row_zeros,
    )
    memory = methods.begin(process, options, prompt.free)
    view = None if windows is None else windows.empty(drawn.ids)
    start = _State(drawn, memory, row_zeros > 0, view)
    may_stop = options.method == "entropy_bound" or options.block_length > 0
    end, frames = _run(call, start, schedule, trace, stops=may_stop)
    drawn = end.drawn
    if fills and windows is None:
        times = jnp.where(prompt.free, process.t_min, CLEAN)
        last = network(fold_in(fold_in(keys, 1), 3), drawn.ids, times, None)
        filled = steps.fill_step(process, fold_in(keys, 1), last, drawn.ids, prompt.free)
        num_calls = drawn.num_calls + jnp.any(filled.asked)
        drawn = put(drawn, filled, process.mask_id, calls)._replace(num_calls=num_calls)
        end = end._replace(done=end.done & ~jnp.any(filled.asked, axis=-1))
    stopped_at = jnp.where(end.done, drawn.stopped_at, drawn.num_calls)
    return drawn._replace(frames=frames, stopped_at=stopped_at)


class _State(NamedTuple):
    drawn: Drawn
    memory: Memory
    done: jax.Array
    view: View | None


def _run(
    call: Callable[[_State, Schedule], _State],
    start: _State,
    schedule: Schedule,
    trace: bool,
    *,
    stops: bool,
) -> tuple[_State, Frames | None]:
    """Make the calls of the schedule, with what each left; stops: until all rows are done."""
    arrays = jax.tree.map(jnp.asarray, schedule)
    if not stops:

        def one(state: _State, now: Schedule) -> tuple[_State, Any]:
            state = call(state, now)
            return state, (state.drawn.ids, state.drawn.log_probs) if trace else None

        state, after = jax.lax.scan(one, start, arrays)
        return state, None if after is None else Frames(start.drawn.ids, *after)
    count = len(schedule.step)
    kept = (start.drawn.ids, start.drawn.log_probs) if trace else ()
    after = tuple(jnp.zeros((count, *a.shape), a.dtype) for a in kept)

    def goes_on(carry: tuple[jax.Array, _State, Any]) -> jax.Array:
        return (carry[0] < count) & ~jnp.all(carry[1].done)

    def next_one(carry: tuple[jax.Array, _State, Any]) -> tuple[jax.Array, _State, Any]:
        number, state, after = carry
        state = call(state, jax.tree.map(lambda a: a[number], arrays))
        now = (state.drawn.ids, state.drawn.log_probs)
        return (
            number + 1,
            state,
            tuple(a.at[number].set(b) for a, b in zip(after, now, strict=False)),
        )

    made, state, after = jax.lax.while_loop(goes_on, next_one, (jnp.int32(0), start, after))
    if not trace:
        return state, None
    # Calls that were not made left everything as it was.
    later = (jnp.arange(count) >= made)[:, None, None]
    last = (state.drawn.ids, state.drawn.log_probs)
    filled = (jnp.where(later, b, a) for a, b in zip(after, last, strict=True))
    return state, Frames(start.drawn.ids, *filled)


def noised(
    process: InterpolatingProcess, keys: jax.Array, ids: jax.Array, t: ArrayLike
) -> jax.Array:
    """Return ids [B, L] with the noise of time t, each row's by its key [B]."""
    draws = jax.vmap(lambda key: process.noise_draws(key, ids.shape[1:]))(keys)
    return process.corrupt(ids, t, draws)


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
    if options.min_p > 0 and options.method not in (*ANCESTRAL, "gibbs"):
        return filtered_x_hat(options, jax.nn.log_softmax(logits))
    if options.top_k == 0 and options.top_p == 1.0:
        return unnormalised(logits, options.temperature)
    return unnormalised(filtered(options, logits))
