"""Acceptance by an entropy bound at its limits, editing, early stops, and rounds of redraws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import everywhere

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess
from gidd_jax.sampling import methods, redraws
from gidd_jax.sampling.loop import Prompt, sample_diffusion
from gidd_jax.sampling.options import GRIDS, SamplerOptions
from gidd_jax.sampling.schedule import make_schedule, sweep_grid
from gidd_jax.sampling.times import row_times

LENGTH, ROWS = 12, 6
MASKS, HYBRID = MaskedProcess(5, 4), HybridProcess(5, 4, 0.2)
UNIFORM = LogSnrProcess(5, 4, shift=1000.0)


def draw(process, denoise, prompt=None, rows=ROWS, first=0, trace=False, **options):
    options = SamplerOptions(method="entropy_bound", **options)
    keys = row_keys(jax.random.key(0), jnp.arange(first, first + rows))
    run = jax.jit(
        lambda k: sample_diffusion(process, denoise, options, k, LENGTH, prompt, trace=trace)
    )
    return jax.tree.map(np.asarray, run(keys))


def says(probs):
    logits = jnp.log(jnp.asarray([*probs, 0.0], jnp.float32))
    return lambda z, times: jnp.broadcast_to(logits, (*z.shape, 5))


def sharpening(z, times):
    """Even at first; surer of a token of its own at each place the more tokens are there."""
    share = jnp.mean(z != 4, axis=-1)[:, None, None]
    best = jax.nn.one_hot(jnp.arange(LENGTH) % 4, 5)[None]
    return 12 * share * best


# The bound at its limits, and in between.


@pytest.mark.parametrize("process", [MASKS, HYBRID, UNIFORM], ids=["masks", "hybrid", "uniform"])
def test_without_a_bound_all_is_drawn_in_one_call_and_with_none_one_token_a_call(process):
    predict = says([0.4, 0.3, 0.2, 0.1])
    whole = draw(process, predict, epsilon=float("inf"), num_steps=30)
    assert int(whole.network_calls) == 1
    assert (whole.stopped_at == 1).all()
    single = draw(process, predict, epsilon=0.0, num_steps=30)
    assert int(single.network_calls) == LENGTH
    assert (single.stopped_at == LENGTH).all()
    assert not np.isin(single.ids, [4]).any()


def test_as_many_tokens_are_drawn_together_as_the_bound_allows():
    """Equal entropies h: k tokens lose at most (k - 1) h."""
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    entropy = float(-np.sum(probs * np.log(probs)))
    drawn = draw(MASKS, says(probs), epsilon=2.5 * entropy, num_steps=30, trace=True)
    tokens = np.sum(drawn.frames.ids != 4, axis=-1)[:, 0]
    np.testing.assert_array_equal(tokens[:5], [3, 6, 9, 12, 12])


def test_fewer_calls_than_the_bound_asks_for_draw_evenly_what_is_open():
    drawn = draw(MASKS, says([0.25] * 4), epsilon=0.0, num_steps=5, trace=True)
    tokens = np.sum(drawn.frames.ids != 4, axis=-1)[:, 0]
    np.testing.assert_array_equal(tokens, [3, 6, 8, 10, 12])


def test_the_surest_positions_come_first_whatever_is_drawn():
    sharpness = jnp.arange(LENGTH, dtype=jnp.float32)
    logits = sharpness[None, :, None] * jnp.float32([1, 0, -1, 0, 0])[None, None]
    drawn = draw(MASKS, lambda z, t: jnp.broadcast_to(logits, (*z.shape, 5)), epsilon=0.0)
    np.testing.assert_array_equal(drawn.drawn_at[0], np.arange(LENGTH)[::-1] + 1)


# Editing.


@pytest.mark.parametrize("process", [HYBRID, UNIFORM], ids=["hybrid", "uniform"])
@pytest.mark.parametrize("edit_above", [0.05, 0.5, 1.0])
def test_tokens_are_reopened_when_they_are_noise_with_more_than_the_threshold(process, edit_above):
    """By the formula, at every position; what is reopened becomes noise."""
    said = np.random.default_rng(0).dirichlet([0.3] * 4, (ROWS, LENGTH)).astype(np.float32)
    logits = jnp.pad(jnp.log(said), [(0, 0), (0, 0), (0, 1)], constant_values=-jnp.inf)
    z, t = jnp.full((ROWS, LENGTH), 1, jnp.int32), jnp.linspace(0.1, 0.6, ROWS)
    none = jnp.zeros(z.shape, bool)
    state = redraws.Editing(none, none * 0.0, none - 1, jnp.zeros(ROWS, jnp.int32), none[:, 0])
    options = SamplerOptions(method="entropy_bound", edit_above=edit_above, stop_after=3)
    keys = row_keys(jax.random.key(1), jnp.arange(ROWS))
    place = (process, keys, everywhere(logits), z, ~none, state, t)
    taken, after = redraws.entropy_bound_step(*place, 0, 10, options)
    b = np.asarray(process.beta_pi(t).uniform)[:, None]
    alpha, p = np.asarray(process.alpha(t))[:, None], said[..., 1]
    wrong = b * (1 - p) / (alpha * p + b)
    np.testing.assert_array_equal(after.open, wrong > edit_above)
    assert after.open.any() == (edit_above < 1)
    if edit_above < 1:
        np.testing.assert_allclose(after.wrong, wrong, rtol=1e-4)
    np.testing.assert_array_equal(taken.ids[~after.open], 1)
    if process is HYBRID and edit_above < 1:
        assert (taken.ids[after.open] == process.mask_id).mean() > 0.3


def test_a_planted_error_is_mended_and_kept_without_editing():
    """Token 1 is drawn while nothing is known, 0 is right once a token is there."""

    def network(z, times):
        first = jnp.all(times > 0.99, axis=-1)[:, None, None]
        logits = jnp.where(
            first,
            jnp.float32([0, 9, 0, 0, 0])[None, None],
            jnp.float32([9, 0, 0, 0, 0])[None, None],
        )
        return jnp.broadcast_to(logits, (*z.shape, 5))

    kept = draw(HYBRID, network, epsilon=0.0, num_steps=30)
    np.testing.assert_array_equal((kept.ids == 1).sum(-1), 1)
    mended = draw(HYBRID, network, epsilon=0.0, num_steps=30, edit_above=0.5)
    assert not (mended.ids == 1).any()


@pytest.mark.parametrize("process", [HYBRID, UNIFORM], ids=["hybrid", "uniform"])
def test_the_time_told_is_that_of_the_share_that_is_wrong(process):
    """Open positions are noise; a token that may be wrong is at the time at which so much is."""
    options = SamplerOptions(method="entropy_bound", edit_above=0.9)
    wrong = jnp.float32([[0.0, 0.0, 0.3, 0.05]])
    is_open = jnp.array([[True, False, False, False]])
    zero = jnp.zeros((1, 4), jnp.int32)
    memory = redraws.Editing(is_open, wrong, zero - 1, zero[:, 0], zero[:, 0] > 0)
    now = jax.tree.map(lambda a: jnp.asarray(a[1]), make_schedule(process, options, 4))
    call = methods.Call(
        process, options, row_keys(jax.random.key(0), zero[:, 0]), zero, ~is_open, now
    )
    told = methods.times(call, memory)[0]
    np.testing.assert_array_equal(told[0, :2], [np.float32(process.t_max), 0.0])
    np.testing.assert_allclose(1 - process.alpha(told[0, 2:]), wrong[0, 2:], rtol=1e-3)
    # Told one time a row: that of the mean.
    row = row_times(process, told)
    share = float(jnp.mean(jnp.where(is_open, 1 - process.alpha(process.t_max), wrong)))
    np.testing.assert_allclose(1 - process.alpha(row[0]), share, rtol=1e-3)


def test_editing_needs_noise_that_is_no_mask():
    with pytest.raises(InputError, match="edit_above needs a process with noise other than"):
        draw(MASKS, says([0.25] * 4), edit_above=0.5)


def test_given_tokens_are_never_edited():
    free = jnp.broadcast_to(jnp.arange(LENGTH)[None] >= 4, (ROWS, LENGTH))
    prompt = Prompt(jnp.full((ROWS, LENGTH), 2, jnp.int32), free)
    drawn = draw(HYBRID, says([0.97, 0.01, 0.01, 0.01]), prompt, edit_above=0.1, num_steps=20)
    assert (drawn.ids[:, :4] == 2).all()


# Stops.

STOPS = {"epsilon": 0.0, "stop_after": 2, "stop_entropy": 0.1}


@pytest.mark.parametrize(
    ("process", "most", "edits"),
    [(MASKS, LENGTH, {}), (HYBRID, 30, {"edit_above": 0.6}), (UNIFORM, 30, {"edit_above": 0.6})],
    ids=["masks", "hybrid", "uniform"],
)
def test_a_stopped_row_is_the_row_of_a_longer_run_and_causes_no_calls(process, most, edits):
    short = draw(process, sharpening, num_steps=most, **STOPS, **edits)
    long = draw(process, sharpening, num_steps=50, **STOPS, **edits)
    for name in ("ids", "log_probs", "stopped_at"):
        np.testing.assert_array_equal(getattr(short, name), getattr(long, name))
    assert (long.stopped_at < most).all()
    assert int(long.network_calls) == int(long.num_calls) == long.stopped_at.max()


def test_a_row_stops_after_its_argmax_stood_still_so_often():
    """A sure network: the first call has nothing to compare with, the next one stands still."""
    for count in (1, 3):
        drawn = draw(
            MASKS, says([0.997, 0.001, 0.001, 0.001]), num_steps=50, **STOPS | {"stop_after": count}
        )
        assert (drawn.stopped_at == count + 1).all()
        assert not np.isin(drawn.ids, [4]).any()
    unsure = draw(MASKS, says([0.4, 0.2, 0.2, 0.2]), num_steps=20, **STOPS)
    assert (unsure.stopped_at == LENGTH).all()  # nothing is open


@pytest.mark.parametrize("process", [MASKS, HYBRID], ids=["masks", "hybrid"])
@pytest.mark.parametrize(("epsilon", "calls"), [(float("inf"), 1), (1.0, None), (0.0, LENGTH)])
def test_to_look_for_stops_never_costs_calls(process, epsilon, calls):
    predict = says([0.4, 0.3, 0.2, 0.1])
    plain = draw(process, predict, epsilon=epsilon, num_steps=40)
    assert calls in (None, int(plain.network_calls))
    for count in (1, 3):
        unsure = draw(process, predict, epsilon=epsilon, num_steps=40, stop_after=count)
        assert int(unsure.network_calls) == int(plain.network_calls)
        np.testing.assert_array_equal(unsure.stopped_at, plain.stopped_at)
        np.testing.assert_array_equal(unsure.ids, plain.ids)


def test_what_the_network_says_of_tokens_that_stay_stops_nothing_and_keeps_nothing_going():
    """Under masks it is untrained there: here flat, with another argmax in every call."""

    def sure_of_masks(z, times):
        drifting = 0.01 * jax.nn.one_hot(jnp.sum(z != 4, axis=-1) % 4, 5)[:, None]
        sure = jnp.float32([9, 0, 0, 0, 0])[None, None]
        return jnp.where((z == 4)[..., None], sure, drifting)

    drawn = draw(MASKS, sure_of_masks, num_steps=50, **STOPS)
    assert (drawn.stopped_at == 3).all()
    assert int(drawn.network_calls) == 3
    np.testing.assert_array_equal(drawn.ids, 0)


@pytest.mark.parametrize("process", [MASKS, HYBRID], ids=["masks", "hybrid"])
def test_rows_are_what_they_are_alone_also_where_others_stop_earlier(process):
    options = STOPS | ({"edit_above": 0.6} if process is HYBRID else {})
    ids = jnp.full((ROWS, LENGTH), 3, jnp.int32)
    free = jnp.arange(LENGTH)[None] >= jnp.array([0, 9, 3, 6, 11, 1])[:, None]
    together = draw(process, sharpening, Prompt(ids, free), num_steps=30, **options)
    assert len(np.unique(together.stopped_at)) > 1
    for row in (1, 3):
        part = np.s_[row : row + 1]
        alone = draw(
            process, sharpening, Prompt(ids[part], free[part]), 1, row, num_steps=30, **options
        )
        for name in ("ids", "log_probs", "drawn_at", "stopped_at"):
            np.testing.assert_array_equal(getattr(together, name)[part], getattr(alone, name))


def test_frames_of_calls_that_were_not_made_change_nothing():
    drawn = draw(MASKS, sharpening, num_steps=50, trace=True, **STOPS)
    np.testing.assert_array_equal(drawn.frames.ids[-1], drawn.ids)
    np.testing.assert_array_equal(drawn.frames.ids[int(drawn.num_calls) - 1], drawn.ids)


# Rounds.


def test_positions_are_drawn_round_after_round_and_end_clean():
    process, rounds = HYBRID, jnp.array([3, 1])
    drawn = jnp.array([[0, 1, 2, 3], [0, 1, 1, 0]])
    now = redraws.round_times(process, drawn, rounds)
    after = redraws.round_times(process, drawn, rounds, ahead=1)
    span = process.t_max - process.t_min
    want = process.t_min + span * np.array([[1, 4 / 9, 1 / 9, 0], [1, 0, 0, 1]])
    np.testing.assert_allclose(now, want, atol=1e-6)
    np.testing.assert_allclose(after[0, :3], want[0, 1:], atol=1e-6)
    counts = redraws.num_rounds(jnp.array([4, 12, 50]), 24)
    np.testing.assert_array_equal(counts, [6, 2, 1])


def test_each_token_is_drawn_as_often_as_the_steps_allow():
    options = SamplerOptions(method="adaptive", num_steps=36)
    keys = row_keys(jax.random.key(0), jnp.arange(ROWS))
    run = jax.jit(
        lambda k: sample_diffusion(UNIFORM, says([0.25] * 4), options, k, LENGTH, trace=True)
    )
    drawn = run(keys)
    at = np.asarray(drawn.drawn_at)
    assert ((at > 24).mean()) > 0.6  # in the last of three rounds, unless it was there already


# Sweeps of gibbs.


def test_sweeps_follow_the_last_step_alone_on_any_grid():
    """The original's ends with a step from t_min to itself."""
    for grid in GRIDS:
        options = SamplerOptions(method="gibbs", num_steps=20, sweeps=8, sweep_below=0.0, grid=grid)
        t, s = sweep_grid(HYBRID, options)
        assert len(t) == 20
        assert np.sum(t[:12] > s[:12]) == (11 if grid == "reference" else 12)
        assert np.all(s[12:] == np.float32(HYBRID.t_min))


@pytest.mark.parametrize("grid", ["uniform", "cosine"])
@pytest.mark.parametrize("below", [0.0, 0.2, 1.0])
def test_sweeps_take_the_calls_that_steps_leave(grid, below):
    """Times go on from where the last call stood, down to t_min; in sweeps they stand still."""
    for calls in (1, 2, 5, 7, 20, 33):
        for sweeps in (1, 2, 7, 40):
            options = SamplerOptions(
                method="gibbs", num_steps=calls, sweeps=sweeps, sweep_below=below, grid=grid
            )
            t, s = sweep_grid(HYBRID, options)
            assert len(t) == len(s) == calls
            assert (t[0], s[-1]) == (np.float32(HYBRID.t_max), np.float32(HYBRID.t_min))
            np.testing.assert_array_equal(t[1:], s[:-1])
            is_sweep = t == s
            assert np.all(t[is_sweep] <= max(below, HYBRID.t_min))
            if below == 0:
                assert is_sweep.sum() == min(sweeps, calls - 1)
            if below == 1:
                assert (~is_sweep).sum() == -(-calls // (1 + sweeps))
