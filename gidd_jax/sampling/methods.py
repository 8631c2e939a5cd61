"""What each method does in a call: the times it is at, its step, and what it keeps between calls.

A new method has a name in `options`, a step in `steps` or `redraws`, and a line in each of the
three functions here. The loop around them is `loop`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gidd_jax.draws import fold_in
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling import redraws, steps
from gidd_jax.sampling.options import REMASKING, SamplerOptions
from gidd_jax.sampling.redraws import Editing, Rounds
from gidd_jax.sampling.schedule import Schedule
from gidd_jax.sampling.steps import Network, Taken
from gidd_jax.sampling.times import CLEAN, time_of_share

Memory = Editing | Rounds | jax.Array | None  # the jax.Array is the time [B] of first_hitting


class Call(NamedTuple):
    """Where a run stands: keys [B] of the call, ids int32 [B, L], active bool [B, L] where they may
    change, `now` the call's own entry of the schedule."""

    process: InterpolatingProcess
    options: SamplerOptions
    keys: jax.Array
    ids: jax.Array
    active: jax.Array
    now: Schedule

    @property
    def num_steps(self) -> ArrayLike:
        return self.now.calls

    @property
    def num_active(self) -> jax.Array:
        return jnp.sum(self.active, axis=-1)

    @property
    def num_masked(self) -> jax.Array:
        return jnp.sum(self.active & (self.ids == self.process.mask_id), axis=-1)


def begin(process: InterpolatingProcess, options: SamplerOptions, free: jax.Array) -> Memory:
    """Return what the method keeps before its first call; free bool [B, L]."""
    count = jnp.zeros(free.shape, jnp.int32)
    if options.method == "adaptive":
        return Rounds(count)
    if options.method == "entropy_bound":
        zeros, false = count.astype(jnp.float32), jnp.zeros(free.shape[:1], bool)
        return Editing(free, zeros, count - 1, count[:, 0], false)
    if options.method == "first_hitting":
        return jnp.full(free.shape[:1], process.t_max, jnp.float32)
    return None


def times(call: Call, memory: Memory) -> tuple[jax.Array, Memory]:
    """Return the times [B, L] that active positions are at before the step, and what is kept."""
    process, now = call.process, call.now
    if isinstance(memory, Rounds):
        rounds = redraws.num_rounds(call.num_active, call.num_steps)
        return redraws.round_times(process, memory.drawn, rounds), memory
    if isinstance(memory, Editing):
        is_first = now.step == 0  # of a block: rows that had stopped go on
        memory = memory._replace(
            argmax=jnp.where(is_first, -1, memory.argmax),
            still=jnp.where(is_first, 0, memory.still),
            stopped=jnp.where(is_first, False, memory.stopped),
        )
        drawn = jnp.where(memory.wrong > 0, time_of_share(process, memory.wrong), CLEAN)
        return jnp.where(memory.open, process.t_max, drawn), memory
    if isinstance(memory, jax.Array):
        t = jnp.where(call.num_masked == call.num_active, now.t, memory)  # a new block
        t = steps.hitting_time(process, fold_in(call.keys, 2), t, call.num_masked)
        return jnp.broadcast_to(t[:, None], call.ids.shape), t
    if call.options.method == "confidence":
        return jnp.where(call.ids == process.mask_id, process.t_max, CLEAN), memory
    return jnp.broadcast_to(now.t, call.ids.shape), memory


def step(
    call: Call, network: Network, row_times: jax.Array, memory: Memory
) -> tuple[Taken, Memory]:
    """Take the step of the call; row_times [B] stand for the times of the whole rows."""
    options, now, method = call.options, call.now, call.options.method
    place = (call.process, call.keys, network, call.ids, call.active)
    if isinstance(memory, Rounds):
        return redraws.adaptive_step(*place, memory, now.step, call.num_steps)
    if isinstance(memory, Editing):
        return redraws.entropy_bound_step(
            *place, memory, row_times, now.step, call.num_steps, options
        )
    if method == "first_hitting":
        return steps.first_hitting_step(*place), memory
    if method in REMASKING:
        return steps.remask_step(*place, now.t, now.s, now.sigma), memory
    if method == "confidence":
        # After step i of n, ceil(num_active i / n) tokens are there.
        due = (call.num_active * (now.step + 1) + call.num_steps - 1) // call.num_steps
        count = due - (call.num_active - call.num_masked)
        return steps.confidence_step(*place, count, options.order), memory
    if method == "mode_seeking":
        spread = (call.num_active + call.num_steps - 1) // call.num_steps
        wanted = options.tokens_per_step
        count = jnp.full_like(spread, wanted) if wanted else spread
        t = now.t if options.noise_at == "step" else call.process.t_max
        return steps.mode_seeking_step(*place, t, count), memory
    kappa = 1.0 if method == "ancestral" else now.kappa
    if options.min_p > 0:
        return steps.filtered_ancestral_step(*place, now.t, now.s, kappa, options.min_p), memory
    return steps.ancestral_step(*place, now.t, now.s, kappa), memory


def is_done(call: Call, memory: Memory) -> jax.Array | None:
    """Return which rows change no more in this block, bool [B]; None where no row stops early."""
    if isinstance(memory, Editing):
        return memory.stopped | (call.num_active == 0)
    return None
