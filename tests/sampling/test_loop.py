"""The sampling loop: exact distributions, schedules, prompts, blocks, independence of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import MASK_ONLY, PROCESSES, chi_square, distribution

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess, expand_time
from gidd_jax.sampling.loop import Prompt, sample_diffusion
from gidd_jax.sampling.options import METHODS, SamplerOptions
from gidd_jax.sampling.schedule import check_method, make_schedule, time_of_alpha


def keys_of(count: int, seed: int = 0) -> jax.Array:
    return row_keys(jax.random.key(seed), jnp.arange(count))


def constant(process, probs: np.ndarray):
    """A denoiser that predicts one distribution whatever it sees."""
    logits = jnp.log(jnp.asarray(probs, jnp.float32))
    return lambda z, t: jnp.broadcast_to(logits, (*z.shape, len(probs)))


def hashing(vocab_size: int):
    """A denoiser whose prediction depends on every token of the row up to `length`, and on t."""
    table = jax.random.normal(jax.random.key(7), (vocab_size, vocab_size))

    def denoise(z, t, length):
        within = (jnp.arange(z.shape[1])[None, :] < length[:, None])[..., None]
        summary = jnp.sum(jnp.where(within, table[z], 0.0), axis=1, keepdims=True)
        return jnp.sin(3 * summary) + table[z] + expand_time(t, z)[..., None]

    return denoise


def draw(process, denoise, count, length, seed=0, **options):
    run = jax.jit(
        lambda keys: sample_diffusion(process, denoise, SamplerOptions(**options), keys, length)
    )
    return run(keys_of(count, seed))


# Distributions that are known exactly.


def last_marginal(process, p_data: np.ndarray) -> np.ndarray:
    """q at the last time, with what is still masked drawn from p_data."""
    q = np.array(process.marginal_probs(p_data[None], process.t_min)[0], np.float64)
    mask, q[process.mask_id] = q[process.mask_id], 0
    return q + mask * p_data


RUNS = [(name, {"num_steps": 5}) for name in PROCESSES]
RUNS += [(name, {"method": "psi", "kappa": 0.5, "num_steps": 5}) for name in ("hybrid", "log-snr")]
RUNS += [("hybrid-skewed", {"num_steps": 4, "grid": "cosine"})]
RUNS += [("masked", {"method": m, "eta": 0.5, "num_steps": 10}) for m in METHODS if "remdm" in m]
RUNS += [(name, {"method": "first_hitting"}) for name in MASK_ONLY]
RUNS += [("hybrid", {"num_steps": 4, "block_length": 5})]


@pytest.mark.parametrize(("name", "options"), RUNS, ids=lambda value: str(value))
def test_sampler_draws_the_data_when_the_prediction_is_the_data(name, options):
    process = PROCESSES[name]
    p_data = distribution(process, seed=4)
    drawn = draw(process, constant(process, p_data), 2000, 12, **options)
    assert chi_square(np.asarray(drawn.ids), last_marginal(process, p_data)) > 1e-4


JOINT = np.array([[0.30, 0.02, 0.08], [0.01, 0.25, 0.04], [0.05, 0.05, 0.20]])  # of two tokens


def leave_one_out(process):
    """The best prediction for each of two tokens: its distribution given the other noisy one."""
    joint = jnp.asarray(JOINT, jnp.float32)

    def denoise(z, t):
        ids = jnp.arange(3)[None, None, :]
        time = expand_time(t, ids)
        hit = jnp.where(z[..., None] == ids, process.alpha(time), 0.0)
        noise = process.mass_at(process.beta_pi(expand_time(t, z)), z)
        likelihood = hit + noise[..., None]  # q_t(z_j | x_j), [B, 2, 3]
        first, second = likelihood[:, 1] @ joint.T, likelihood[:, 0] @ joint
        probs = jnp.stack([first, second], axis=1)
        return jnp.log(jnp.pad(probs / jnp.sum(probs, -1, keepdims=True), ((0, 0), (0, 0), (0, 1))))

    return denoise


@pytest.mark.parametrize(
    ("process", "options"),
    [
        (MaskedProcess(4, 3), {"num_steps": 200}),
        (HybridProcess(4, 3, p_uniform=0.3, t_eps=1e-5), {"num_steps": 300, "grid": "cosine"}),
        (LogSnrProcess(4, 3, shift=1000.0, t_eps=1e-4), {"num_steps": 300, "grid": "cosine"}),
        (MaskedProcess(4, 3), {"method": "first_hitting"}),
        (HybridProcess(4, 3, p_uniform=0.0), {"method": "first_hitting"}),
        (MaskedProcess(4, 3), {"num_steps": 3, "block_length": 1}),
        (MaskedProcess(4, 3), {"method": "first_hitting", "block_length": 1}),
    ],
    ids=str,
)
def test_correlated_tokens_are_drawn_from_their_joint_distribution(process, options, compile_well):
    """In the limit of many steps, or with one token at a time, independent draws are no error."""
    drawn = draw(process, leave_one_out(process), 8000, 2, seed=1, **options)
    ids = np.asarray(drawn.ids)
    assert chi_square(3 * ids[:, 0] + ids[:, 1], JOINT.ravel()) > 1e-3


def test_few_steps_would_not_pass_the_test_of_the_joint_distribution(compile_well):
    drawn = draw(MaskedProcess(4, 3), leave_one_out(MaskedProcess(4, 3)), 8000, 2, num_steps=3)
    ids = np.asarray(drawn.ids)
    assert chi_square(3 * ids[:, 0] + ids[:, 1], JOINT.ravel()) < 1e-6


def test_greedy_and_filtered_runs_draw_what_they_may():
    process, p = MaskedProcess(5, 4), np.array([0.4, 0.1, 0.3, 0.2, 0.0])
    predict = constant(process, p)
    assert np.all(np.asarray(draw(process, predict, 8, 16, num_steps=4, temperature=0.0).ids) == 0)
    top = draw(process, predict, 300, 16, num_steps=4, top_p=0.6)
    assert chi_square(np.asarray(top.ids), np.array([4, 0, 3, 0, 0]) / 7) > 1e-4
    # min_p drops from the posterior: 0.2 (t - s)/t is below 0.16 in the first of two steps, where
    # the mask is kept instead; 0.1 is below it in both.
    kept = draw(process, predict, 300, 16, num_steps=2, min_p=0.16)
    want = 2 / 7 * np.array([1, 0, 0, 0, 0]) + 5 / 7 * np.array([4, 0, 3, 2, 0]) / 9
    assert chi_square(np.asarray(kept.ids), want) > 1e-4
    alone = draw(process, predict, 300, 16, method="first_hitting", min_p=0.35)
    assert np.all(np.asarray(alone.ids) == 0)


# Structure of runs.


@pytest.mark.parametrize("method", METHODS)
def test_every_token_is_drawn_by_a_call_that_is_counted(method):
    """No mask is left, and no column beyond the vocabulary, though they have most of the mass."""
    process, calls = MaskedProcess(6, 2), []
    predict = constant(process, np.array([0.02, 0.02, 0.3, 0.02, 0.02, 0.02, 0.3, 0.3]))

    def counted(z, t):
        jax.debug.callback(lambda: calls.append(1))
        return predict(z, t)

    steps = {} if method == "first_hitting" else {"num_steps": 3}
    drawn = draw(process, counted, 50, 5, method=method, block_length=2, **steps)
    jax.effects_barrier()
    assert int(drawn.network_calls) == len(calls)
    assert 6 <= int(drawn.num_calls) <= 10
    assert 5 <= len(calls) <= int(drawn.num_calls)
    assert set(np.unique(drawn.ids)) == {0, 1, 3, 4, 5}
    np.testing.assert_allclose(drawn.log_probs, np.log(0.2), rtol=1e-5)
    at = np.asarray(drawn.drawn_at)
    assert at.min() >= 1
    assert at.max() <= int(drawn.num_calls)


@pytest.mark.parametrize("mask_id", [0, 10])
@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_none_are_kept_whatever_is_drawn(method, mask_id):
    """Also where the draws of such a network are masks, or nothing changes."""
    processes = [MaskedProcess(11, mask_id)]
    if method in ("ancestral", "psi", "gibbs", "entropy_bound", "adaptive", "mode_seeking"):
        processes += [HybridProcess(11, mask_id, 0.2), LogSnrProcess(11, mask_id, shift=1000.0)]
    options = {"method": method} | ({} if method == "first_hitting" else {"num_steps": 9})
    for process in processes:
        drawn = draw(process, constant(process, np.full(11, np.nan)), 2, 6, **options)
        assert np.isnan(drawn.log_probs).any(axis=-1).all(), process


def test_masks_stay_where_they_are_not_to_be_filled():
    process = MaskedProcess(6, 2)
    predict = constant(process, np.full(6, 1 / 6))
    options = {"num_steps": 2, "grid": "reference"}  # ends at t_min without its last transition
    t_min_masks = draw(process, predict, 400, 30, fill_masks=False, **options)
    left = np.asarray(t_min_masks.ids) == 2
    assert 0 < left.sum() < 10  # 12,000 tokens at t = 1e-4
    assert not np.any(np.asarray(draw(process, predict, 400, 30, **options).ids) == 2)


SHARPENED = [("ancestral", {}), ("gibbs", {"sweeps": 3}), ("entropy_bound", {}), ("adaptive", {})]


@pytest.mark.parametrize(("method", "options"), SHARPENED, ids=str)
@pytest.mark.parametrize("name", ["hybrid", "hybrid-skewed", "masked"])
def test_temperature_acts_on_the_prediction_before_bayes(name, method, options):
    """A prediction that never changes is then drawn as if p^(1/T) were the data, whatever the
    noise; after Bayes the evidence of the noise would be sharpened, too."""
    process = PROCESSES[name]
    p_data = distribution(process, seed=4)
    sharper = p_data**2 / np.sum(p_data**2)
    options = {"method": method, "temperature": 0.5, "num_steps": 8, **options}
    drawn = draw(process, constant(process, p_data), 1000, 12, **options)
    assert chi_square(np.asarray(drawn.ids), last_marginal(process, sharper)) > 1e-4


@pytest.mark.parametrize(("method", "options"), SHARPENED, ids=str)
@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.95}], ids=str)
def test_filters_act_on_the_prediction_before_bayes(filters, method, options):
    process = PROCESSES["hybrid"]
    p_data = distribution(process, seed=4)
    order = np.argsort(-p_data)
    count = filters.get("top_k") or 1 + int(np.sum(np.cumsum(p_data[order]) <= 0.95))
    assert 1 < count < np.sum(p_data > 0)
    kept = np.where(np.isin(np.arange(len(p_data)), order[:count]), np.float64(p_data), 0.0)
    options = {"method": method, "num_steps": 8, **filters, **options}
    ids = np.asarray(draw(process, constant(process, p_data), 1000, 12, **options).ids)
    assert np.mean(kept[ids] == 0) < 0.01  # the noise of the last time
    assert chi_square(ids[kept[ids] > 0], kept / kept.sum()) > 1e-4


@pytest.mark.parametrize("method", ["ancestral", "gibbs", "entropy_bound", "adaptive"])
@pytest.mark.parametrize("name", ["hybrid", "log-snr", "masked"])
def test_guidance_weighs_what_is_given_before_bayes(name, method):
    """A network that says p where the given tokens stand, and q where noise is in their place: gaps
    about them are drawn from p^g q^(1 - g), normalised."""
    process = PROCESSES[name]
    given = np.array([0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0], bool)
    p, q = distribution(process, seed=4), distribution(process, seed=9)
    token = int(np.flatnonzero(p)[0])

    def denoise(z, times):
        stands = jnp.all((z == token) | ~jnp.asarray(given)[None], axis=-1)[:, None, None]
        said = jnp.where(stands, jnp.float32(p)[None, None], jnp.float32(q)[None, None])
        return jnp.log(jnp.broadcast_to(said, (*z.shape, len(p))))

    count, free = 1000, jnp.asarray(~given)
    shape = (count, len(given))
    prompt = Prompt(jnp.full(shape, token, jnp.int32), jnp.broadcast_to(free, shape))
    settings = SamplerOptions(method=method, num_steps=7, guidance=1.5)
    run = jax.jit(lambda keys: sample_diffusion(process, denoise, settings, keys, 14, prompt))
    drawn = np.asarray(run(keys_of(count)).ids)
    assert np.all(drawn[:, given] == token)
    with np.errstate(divide="ignore", invalid="ignore"):
        want = np.where(p > 0, p**1.5 * q**-0.5, 0.0)
    want = last_marginal(process, want / want.sum())
    assert chi_square(drawn[:, ~given], want) > 1e-4


def test_confidence_and_mode_seeking_runs_reveal_evenly():
    process = MaskedProcess(6, 2)
    predict = hashing(6)
    full = jnp.full(4, 10)
    for method in ("confidence", "mode_seeking"):
        drawn = draw(process, lambda z, t: predict(z, t, full), 4, 10, num_steps=4, method=method)
        assert int(drawn.network_calls) == 4
        for row in np.asarray(drawn.drawn_at):
            counts = np.bincount(row, minlength=5)[1:]
            if method == "confidence":
                np.testing.assert_array_equal(counts, [3, 2, 3, 2])  # ceil(10 i / 4)
            else:
                assert counts.sum() == 10
                assert counts.max() <= 3
    few = draw(
        process,
        lambda z, t: predict(z, t, full),
        4,
        10,
        num_steps=4,
        method="mode_seeking",
        tokens_per_step=1,
    )
    assert int(few.network_calls) == 5
    np.testing.assert_array_equal((np.asarray(few.drawn_at) == 5).sum(-1), 6)  # left to the end


def test_confidence_run_reveals_the_surest_first():
    process = MaskedProcess(4, 3)
    sharpness = jnp.float32([0.5, 3, 1, 2])
    logits = sharpness[None, :, None] * jnp.float32([1, 0, -1, 0])[None, None, :]
    drawn = draw(
        process,
        lambda z, t: jnp.broadcast_to(logits, (*z.shape, 4)),
        3,
        4,
        method="confidence",
        num_steps=4,
        temperature=0.0,
    )
    np.testing.assert_array_equal(drawn.drawn_at, np.broadcast_to([4, 1, 3, 2], (3, 4)))


def test_blocks_are_generated_from_left_to_right():
    process = HybridProcess(6, 2, p_uniform=0.1)
    predict = constant(process, np.full(6, 1 / 6))
    free = jnp.array([[False, True, True, True, True, True, False]])
    prompt = Prompt(jnp.full((1, 7), 5), free)
    options = SamplerOptions(num_steps=3, block_length=2)
    drawn = sample_diffusion(
        process, predict, options, keys_of(1), 7, prompt, num_free=5, trace=True
    )
    at = np.asarray(drawn.drawn_at)[0]
    assert [int(a) for a in at[[0, 6]]] == [0, 0]
    for positions, block in (((1, 2), 0), ((3, 4), 1), ((5,), 2)):
        for position in positions:
            assert at[position] == 0 or 3 * block < at[position] <= 3 * block + 3
    history = np.stack([drawn.frames.start, *drawn.frames.ids[:8]])[:, 0]
    assert np.all(history[:4, 3:6] == 2)  # blocks to come are masks
    assert np.all(history[3:, 1:3] == history[3, 1:3])  # finished ones stay
    assert np.all(history[:, [0, 6]] == 5)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_mixed_batch_are_what_they_are_alone(method):
    """Prompts and lengths differ; each row gets the tokens it gets alone, unpadded."""
    process, predict = MaskedProcess(11, 10), hashing(11)
    lengths = np.array([5, 12, 9, 7])
    given = [3, 4, 0, 5]
    ids = np.random.default_rng(0).integers(0, 10, (4, 12)).astype(np.int32)
    place = np.arange(12)[None, :]
    free = (place >= np.array(given)[:, None]) & (place < lengths[:, None])
    free[1, 8] = False  # an island
    steps = {} if method == "first_hitting" else {"num_steps": 4}
    options = SamplerOptions(method=method, block_length=3, top_p=0.9, **steps)

    def run(keys, ids, free, length, num_free):
        prompt = Prompt(jnp.asarray(ids), jnp.asarray(free))
        return sample_diffusion(
            process,
            lambda z, t: predict(z, t, jnp.asarray(length)),
            options,
            keys,
            ids.shape[1],
            prompt,
            num_free,
        )

    keys = keys_of(4)
    together = jax.jit(run, static_argnums=4)(keys, ids, free, lengths, int(free.sum(1).max()))
    got = np.asarray(together.ids)
    np.testing.assert_array_equal(got[~free], ids[~free])
    assert not np.any(got[free] == 10)
    row = METHODS.index(method) % 4
    part = np.s_[row : row + 1, : lengths[row]]
    alone = jax.jit(run, static_argnums=4)(
        keys[row : row + 1], ids[part], free[part], lengths[row : row + 1], int(free[row].sum())
    )
    np.testing.assert_array_equal(together.ids[part], alone.ids)
    np.testing.assert_allclose(together.log_probs[part], alone.log_probs, atol=1e-5)
    np.testing.assert_array_equal(together.drawn_at[part], alone.drawn_at)


def test_another_batch_size_draws_the_same_bits():
    process, predict = HybridProcess(11, 10, p_uniform=0.2), hashing(11)
    options = SamplerOptions(num_steps=6)

    @jax.jit
    def run(keys):
        lengths = jnp.full(len(keys), 8)
        return sample_diffusion(process, lambda z, t: predict(z, t, lengths), options, keys, 8)

    keys = keys_of(6)
    together = run(keys)
    parts = [run(keys[i : i + 2]) for i in (0, 2, 4)]
    for name in ("ids", "log_probs", "drawn_at"):
        apart = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(getattr(together, name), apart)
    assert len(np.unique(together.ids, axis=0)) == 6
    assert np.any(np.asarray(run(keys_of(6, seed=1)).ids) != np.asarray(together.ids))


# Schedules and options.


def test_loop_schedule_holds_alpha():
    process = MaskedProcess(6, 2)
    options = SamplerOptions(method="remdm_loop", num_steps=20, eta=0.05)
    schedule = make_schedule(process, options, 9)
    alpha_t, alpha_s = process.alpha(schedule.t), process.alpha(schedule.s)
    np.testing.assert_allclose(alpha_t[9:19], 0.9, atol=1e-5)  # steps 0.55 to 0.05 of 20
    np.testing.assert_allclose(alpha_s[8:19], 0.9, atol=1e-5)
    assert np.all(np.diff(schedule.t) <= 0)
    np.testing.assert_allclose(schedule.t[1:], schedule.s[:-1], rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma, [0] * 9 + [0.05] * 10 + [0], atol=1e-7)
    assert schedule.s[-1] == np.float32(process.t_min)
    assert process.alpha(time_of_alpha(process, 0.3)) == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize(("method", "eta"), [("remdm_cap", 0.1), ("remdm_rescale", 0.1)])
def test_remasking_probabilities(method, eta):
    process = MaskedProcess(6, 2)
    schedule = make_schedule(process, SamplerOptions(method=method, eta=eta, num_steps=50), 9)
    alpha_t, alpha_s = 1 - (1 - 1e-4) * schedule.t, 1 - (1 - 1e-4) * schedule.s
    largest = np.minimum(1, (1 - alpha_s) / alpha_t)
    want = np.minimum(eta, largest) if method == "remdm_cap" else eta * largest
    np.testing.assert_allclose(schedule.sigma, want, rtol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"method": "euler"}, "unknown method 'euler': use one of ancestral, psi"),
        ({"grid": "linear"}, "unknown grid 'linear': use one of uniform, cosine, reference"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must lie in \[0, 1\]"),
        ({"block_length": -2}, "block_length must be at least 0"),
        ({"method": "mode_seeking", "tokens_per_step": -1}, "tokens_per_step must be at least 0"),
        ({"method": "psi", "kappa": 1.1}, r"kappa must lie in \[0, 1\]"),
        ({"method": "remdm_loop", "loop_alpha": 1.0}, r"loop_alpha must lie in \(0, 1\)"),
        ({"method": "remdm_loop", "loop_to": 0.8}, "loop_to must not exceed loop_from"),
        (
            {"method": "entropy_bound", "stop_entropy": 0.5},
            "stop_entropy has no effect without stop",
        ),
        ({"kappa": 0.5}, "kappa has no effect with method 'ancestral': it belongs to psi"),
        ({"method": "first_hitting", "num_steps": 4}, "num_steps has no effect with method"),
    ],
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SamplerOptions(**options)


@pytest.mark.parametrize(
    ("method", "process", "legal"),
    [
        ("remdm_cap", HybridProcess(7, 6, p_uniform=0.1), False),
        ("first_hitting", LogSnrProcess(7, 6), False),
        ("first_hitting", LogSnrProcess(7, 6, shift=-1000.0), True),
        ("remdm_loop", HybridProcess(7, 6, p_uniform=0.0), True),
        ("confidence", LogSnrProcess(7, 6, shift=1000.0), False),
        ("confidence", HybridProcess(7, 6, p_uniform=0.5), True),
        ("psi", LogSnrProcess(7, 6, shift=1000.0), True),
    ],
)
def test_methods_refuse_processes_they_cannot_sample(method, process, legal):
    if legal:
        check_method(process, method)
    else:
        with pytest.raises(InputError, match=f"method '{method}' needs a process"):
            check_method(process, method)


def test_options_are_values():
    assert SamplerOptions(num_steps=4) == dataclasses.replace(SamplerOptions(), num_steps=4)
    assert hash(SamplerOptions(method="psi")) == hash(SamplerOptions(method="psi"))
