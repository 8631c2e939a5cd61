"""Self-correction: a trained denoiser improves finished samples (arXiv 2503.04482, section 5.3).

Each step draws a token for every position from the tempered x_hat of the current sequence, taken
as slightly noisy (time t), and replaces the tokens of highest score. Score "proposal", the paper's,
asks which replacement is most probable; score "suspicion" asks which token is most probably noise
(`sampling.suspicion`), and replaces none that is not above a threshold. Rows run side by side in
one compiled loop, and each stops by itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax.draws import (
    first_largest,
    fold_in,
    index_from_uniforms,
    num_levels,
    total,
    uniforms,
)
from gidd_jax.errors import InputError
from gidd_jax.likelihood import Denoiser
from gidd_jax.loss import at_ids, masked_logits
from gidd_jax.ops.fused_loss import chunk_size
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.filters import log_softmax_at, unnormalised
from gidd_jax.sampling.loop import Frames
from gidd_jax.sampling.options import CorrectionOptions
from gidd_jax.sampling.schedule import is_mask_only
from gidd_jax.sampling.steps import highest
from gidd_jax.sampling.suspicion import noise_posterior
from gidd_jax.sampling.times import CLEAN


class Proposals(NamedTuple):
    """How tokens are proposed, for all positions or some of them.

    numbers: (step, length L, columns C) -> random numbers [B, L, n] of the step; draw: (weights
    [B, K, C] of any sum, their numbers [B, K, n]) -> ids [B, K].
    """

    numbers: Callable[[jax.Array, int, int], jax.Array]
    draw: Callable[[jax.Array, jax.Array], jax.Array]


class Judgement(NamedTuple):
    """What the network says of every position, each [B, L].

    score: the probability of the proposal among the proposals, or that the token there is wrong;
    first_choice: the most probable token; log_proposal, log_token: log x_hat at the proposal, and
    at the token there; is_number: no NaN.
    """

    proposal: jax.Array
    score: jax.Array
    first_choice: jax.Array
    log_proposal: jax.Array
    log_token: jax.Array
    is_number: jax.Array


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
    judged: Judgement, z: jax.Array, free: jax.Array, tokens_per_step: int
) -> jax.Array:
    """Replace the tokens of highest score, which is 0 where the proposal is no change.

    Only free positions [B, L] are replaced.
    """
    score = jnp.where(judged.proposal != z, judged.score, 0.0)
    count = jnp.full(z.shape[:1], tokens_per_step)
    return jnp.where(highest(score, free, count), judged.proposal, z)


def judge(
    process: InterpolatingProcess,
    logits: jax.Array,
    numbers: jax.Array,
    z: jax.Array,
    propose: Proposals,
    options: CorrectionOptions,
) -> Judgement:
    """Judge tokens z [B, K] by their logits [B, K, C], with the proposals' random numbers."""
    logits = masked_logits(process, logits)
    weights = unnormalised(logits, options.temperature)
    if options.score == "suspicion":
        proposal, score = _suspicious(process, logits, numbers, z, propose, options)
    else:
        proposal = propose.draw(weights, numbers)
        score = at_ids(weights, proposal) / total(weights)
    return Judgement(
        proposal=proposal,
        score=score,
        first_choice=first_largest(logits),
        log_proposal=log_softmax_at(logits, proposal),
        log_token=log_softmax_at(logits, z),
        # XLA's maximum on CPU may pass over NaN, their exponentials do not.
        is_number=~jnp.isnan(total(unnormalised(logits))),
    )


def _suspicious(
    process: InterpolatingProcess,
    logits: jax.Array,
    numbers: jax.Array,
    z: jax.Array,
    propose: Proposals,
    options: CorrectionOptions,
) -> tuple[jax.Array, jax.Array]:
    """Return another token where the one there is too suspicious, else that one; and P(wrong).

    Given that z_i is noise, x_i is v with a probability proportional to x_hat(v), v other than z_i.
    """
    t = jnp.full(z.shape[:1], options.t)
    log_prior = jax.nn.log_softmax(logits[..., : process.vocab_size])
    wrong = noise_posterior(process, log_prior, z, t).wrong
    others = jnp.where(jax.nn.one_hot(z, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    another = propose.draw(unnormalised(others, options.temperature), numbers)
    return jnp.where(wrong > options.threshold, another, z), wrong


def check_correction(process: InterpolatingProcess, options: CorrectionOptions) -> None:
    """Raise InputError when the score finds no wrong token under this process."""
    if options.score == "suspicion" and is_mask_only(process):
        raise InputError(
            "score 'suspicion' needs a process with noise other than the mask, under masks alone "
            "no token is ever wrong: use score 'proposal'"
        )


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
    propose: Proposals,
    trace: bool = False,
    project: Callable[[jax.Array], jax.Array] = lambda features: features,
) -> Correction:
    """Correct rows of token ids z [B, L] at their free positions [B, L]; one while_loop.

    denoise: (z_t, times [B, L]) -> what `project` makes logits of, position by position; so no more
    logits are held than those of a group of positions. `propose` draws the replacements, see
    `proposals`.
    A row stops when a step changes nothing, or when its accuracy has not exceeded its best one for
    more than `patience` steps; the changes of that last step are dropped, as in the original.
    trace: also return what every step left, 8 bytes a token and step. Raises InputError for score
    "suspicion" under masks alone.
    """
    check_correction(process, options)
    rows, length = z.shape

    def judge_all(step: jax.Array, z: jax.Array) -> Judgement:
        features = denoise(z, jnp.where(free, jnp.float32(options.t), CLEAN))
        columns = jax.eval_shape(project, features[:, :1]).shape[-1]
        numbers = propose.numbers(step, length, columns)
        tokens = chunk_size(columns, features.shape[-1], jax.default_backend())
        size = min(length, max(1, tokens // rows))
        parts = jax.tree.map(lambda a: _in_groups(a, size), (features, numbers, z))

        def judge_group(part: tuple[jax.Array, jax.Array, jax.Array]) -> Judgement:
            h, numbers, z = part
            return judge(process, project(h), numbers, z, propose, options)

        judged = jax.lax.map(judge_group, parts)  # [groups, B, size]
        return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(rows, -1)[:, :length], judged)

    def body(state: _State) -> _State:
        judged = judge_all(state.step, state.z)
        z_next = correction_step(judged, state.z, free, options.tokens_per_step)
        before = self_accuracy(judged.first_choice, state.z, free)
        after = self_accuracy(judged.first_choice, z_next, free)
        is_broken = ~jnp.all(judged.is_number, axis=-1)
        before, after = (jnp.where(is_broken, jnp.nan, share) for share in (before, after))
        state = state._replace(initial=jnp.where(state.step == 0, before, state.initial))
        return _note(_advance(state, z_next, after, options.patience), judged)

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


def _in_groups(a: jax.Array, size: int) -> jax.Array:
    """Split positions [B, L, ...] into groups [G, B, size, ...]; the last one is filled up."""
    widths = [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2)
    padded = jnp.pad(a, widths)
    return jnp.moveaxis(padded.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)


def _note(state: _State, judged: Judgement) -> _State:
    """Keep what the step before this state left, where a trace is asked for."""
    if state.frames is None:
        return state
    start, ids, log_probs = state.frames
    last = state.step - 1
    here = jnp.where(state.z == judged.proposal, judged.log_proposal, judged.log_token)
    frames = Frames(start, ids.at[last].set(state.z), log_probs.at[last].set(here))
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


def proposals(keys: jax.Array) -> Proposals:
    """Return proposals that each row draws from its key [B] and the number of the step."""

    def numbers(step: jax.Array, length: int, columns: int) -> jax.Array:
        return uniforms(fold_in(keys, step), length, num_levels(columns))

    return Proposals(numbers, index_from_uniforms)
