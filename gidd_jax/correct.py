"""Self-correction: a trained denoiser improves finished samples (arXiv 2503.04482, section 5.3).

Each step draws a token for every position from the tempered x_hat of the current sequence, taken
as slightly noisy (time t), and replaces the tokens whose replacement is most probable. Rows run
side by side in one compiled loop, and each stops by itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax.draws import categorical, fold_in
from gidd_jax.filters import temper
from gidd_jax.likelihood import Denoiser
from gidd_jax.loss import log_probs_at, masked_logits
from gidd_jax.options import CorrectionOptions
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampler import Frames
from gidd_jax.steps import highest, probs_at

# (number of the step, probabilities [B, L, V]) -> token ids [B, L]
Propose = Callable[[jax.Array, jax.Array], jax.Array]


class Correction(NamedTuple):
    """Corrected ids int32 [B, L] and, for each row [B], how it went.

    Self-accuracy: share of the positions whose token is the network's most probable one.
    initial_accuracy is that of the input; final_accuracy that after the last step, measured with
    the logits before it, also where stopping early dropped the changes of that step. num_changes
    counts the positions that differ from the input; converged: a step changed nothing;
    stopped_early: the patience ran out; num_steps: steps the row took part in. These are the
    original's conventions. Accuracies are NaN where the logits were. frames: what a trace asks
    for, up to the largest num_steps.
    """

    ids: jax.Array
    initial_accuracy: jax.Array
    final_accuracy: jax.Array
    num_changes: jax.Array
    converged: jax.Array
    stopped_early: jax.Array
    num_steps: jax.Array
    frames: Frames | None = None


class _State(NamedTuple):
    step: jax.Array
    z: jax.Array
    initial: jax.Array
    latest: jax.Array
    best: jax.Array
    stalled: jax.Array  # steps since the best accuracy
    converged: jax.Array
    stopped: jax.Array
    num_steps: jax.Array
    frames: Frames | None


def correction_step(
    probs: jax.Array,
    proposal: jax.Array,
    z: jax.Array,
    free: jax.Array,
    tokens_per_step: int,
) -> jax.Array:
    """Replace the tokens of highest score: the proposal's probability where it is a change, else 0.

    probs [B, L, V]: what the proposal [B, L] was drawn from; only free positions are replaced.
    """
    score = jnp.where(proposal != z, probs_at(probs, proposal), 0.0)
    count = jnp.full(z.shape[:1], tokens_per_step)
    return jnp.where(highest(score, free, count), proposal, z)


def self_accuracy(first_choice: jax.Array, z: jax.Array, free: jax.Array) -> jax.Array:
    """Return the share of each row's free positions that hold the first choice, float32 [B]."""
    right = jnp.sum(free & (z == first_choice), axis=-1)
    return (right / jnp.maximum(jnp.sum(free, axis=-1), 1)).astype(jnp.float32)


def self_correct(
    process: InterpolatingProcess,
    denoise: Denoiser,
    options: CorrectionOptions,
    z: jax.Array,
    free: jax.Array,
    propose: Propose,
    trace: bool = False,
) -> Correction:
    """Correct rows of token ids z [B, L] at their free positions [B, L]; one while_loop.

    `propose` draws the replacements, see `proposals`. A row stops when a step changes nothing, or
    when its accuracy has not exceeded its best one for more than `patience` steps; the changes of
    that last step are dropped, as in the original. trace: also return what every step left, 8 bytes
    a token and step.
    """
    rows, columns = z.shape[0], process.vocab_size

    def body(state: _State) -> _State:
        t = jnp.full((rows,), options.t, jnp.float32)
        logits = masked_logits(process, denoise(state.z, t))[..., :columns]
        log_x_hat = jax.nn.log_softmax(logits)
        probs = jnp.exp(temper(log_x_hat, options.temperature))
        proposal = propose(state.step, probs)
        z_next = correction_step(probs, proposal, state.z, free, options.tokens_per_step)
        first_choice = jnp.argmax(logits, axis=-1)
        before = self_accuracy(first_choice, state.z, free)
        after = self_accuracy(first_choice, z_next, free)
        is_broken = jnp.any(jnp.isnan(jnp.max(log_x_hat, axis=-1)), axis=-1)
        before, after = (jnp.where(is_broken, jnp.nan, share) for share in (before, after))
        state = state._replace(initial=jnp.where(state.step == 0, before, state.initial))
        return _note(_advance(state, z_next, after, options.patience), log_x_hat)

    def goes_on(state: _State) -> jax.Array:
        return (state.step < options.num_steps) & jnp.any(~state.converged & ~state.stopped)

    zeros, false = jnp.zeros((rows,), jnp.float32), jnp.zeros((rows,), bool)
    count = jnp.zeros((rows,), jnp.int32)
    frames = None
    if trace:
        room = jnp.zeros((options.num_steps, *z.shape))
        frames = Frames(z, room.astype(z.dtype), room)
    start = _State(jnp.int32(0), z, zeros, zeros, zeros - 1, count, false, false, count, frames)
    end = jax.lax.while_loop(goes_on, body, start)
    return Correction(
        ids=end.z,
        initial_accuracy=end.initial,
        final_accuracy=end.latest,
        num_changes=jnp.sum(end.z != z, axis=-1),
        converged=end.converged,
        stopped_early=end.stopped,
        num_steps=end.num_steps,
        frames=end.frames,
    )


def _note(state: _State, log_x_hat: jax.Array) -> _State:
    """Keep what the step before this state left, where a trace is asked for."""
    if state.frames is None:
        return state
    start, ids, log_probs = state.frames
    last = state.step - 1
    frames = Frames(
        start,
        ids.at[last].set(state.z),
        log_probs.at[last].set(log_probs_at(log_x_hat, state.z)),
    )
    return state._replace(frames=frames)


def _advance(state: _State, z_next: jax.Array, accuracy: jax.Array, patience: int) -> _State:
    """Take one step over for the rows that still run."""
    runs = ~state.converged & ~state.stopped
    better = accuracy > state.best
    stalled = jnp.where(better, 0, state.stalled + 1)
    stops = runs & (stalled > patience)
    same = jnp.all(z_next == state.z, axis=-1)
    return _State(
        step=state.step + 1,
        z=jnp.where((runs & ~stops)[:, None], z_next, state.z),
        initial=state.initial,
        latest=jnp.where(runs, accuracy, state.latest),
        best=jnp.where(runs & better, accuracy, state.best),
        stalled=jnp.where(runs, stalled, state.stalled),
        converged=state.converged | (runs & ~stops & same),
        stopped=state.stopped | stops,
        num_steps=state.num_steps + runs,
        frames=state.frames,
    )


def proposals(keys: jax.Array) -> Propose:
    """Return a `propose` that draws each row from its key [B] and the number of the step."""
    return lambda step, probs: categorical(fold_in(keys, step), probs)
