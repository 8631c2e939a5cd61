"""Denoising steps: the original's posteriors and trajectories, frequencies, and marginals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import (
    LENGTH,
    MASK_ONLY,
    PROCESSES,
    ROWS,
    chi_square,
    distribution,
    everywhere,
    tiled,
)
from scipy import stats

from gidd_jax.draws import row_keys
from gidd_jax.loss import masked_logits
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess
from gidd_jax.sampling import steps
from gidd_jax.sampling.filters import keep_min_p
from gidd_jax.sampling.schedule import time_grid

# Settings of the golden files: (p_uniform, mask_id), 23 tokens.
SETTINGS = {"pu0.0": (0.0, 22), "pu0.1": (0.1, 22), "pu0.2": (0.2, 22), "pu0.2_mid": (0.2, 11)}
KEYS = row_keys(jax.random.key(3), jnp.arange(ROWS))


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def rtol(request):
    """Run the test in float32 and under x64; gives the relative tolerance."""
    with jax.enable_x64(request.param):
        yield 1e-10 if request.param else 2e-5


def golden_hybrid(tag: str) -> HybridProcess:
    p_uniform, mask_id = SETTINGS[tag]
    return HybridProcess(23, mask_id, p_uniform=p_uniform)


def x_hat_of(process, logits) -> jax.Array:
    return jax.nn.softmax(masked_logits(process, jnp.asarray(logits)))


def posterior(process, logits, z_t, t, s, min_p) -> jax.Array:
    probs = steps.transition_probs(process, x_hat_of(process, logits), jnp.asarray(z_t), t, s)
    return keep_min_p(probs, min_p) if min_p else probs


# The original's arrays.


@pytest.mark.parametrize("min_p", [0, 0.05])
@pytest.mark.parametrize("tag", SETTINGS)
def test_hybrid_posteriors_match_original(golden, tag, min_p, rtol):
    data, process = golden("c07_samplers.npz"), golden_hybrid(tag)
    for pair, (t, s) in enumerate(data["step/t_s_pairs"]):
        q = posterior(process, data["step/logits"], data[f"gidd/{tag}/z_t"], t, s, min_p)
        want = data[f"gidd/{tag}/f64/minp{min_p}/pair{pair}/q_st"]
        np.testing.assert_allclose(q, want, rtol=rtol)


@pytest.mark.parametrize("min_p", [0, 0.05])
def test_masked_posteriors_match_original(golden, min_p, rtol):
    data, process = golden("c07_samplers.npz"), MaskedProcess(23, 22)
    z_t = data["mdlm/z_t"]
    masked = z_t == 22
    for pair, (t, s) in enumerate(data["step/t_s_pairs"][:3]):
        q = posterior(process, data["step/logits"], z_t, t, s, min_p)
        want = data[f"mdlm/f64/minp{min_p}/pair{pair}/probs"]  # the original keeps other tokens
        np.testing.assert_allclose(q[masked], want[masked], rtol=rtol)
        np.testing.assert_allclose(q[~masked], np.eye(23)[z_t[~masked]], atol=rtol)


@pytest.mark.parametrize("noise", [-1000, 0, 2, 1000])
def test_log_snr_posteriors_match_original(golden, noise, rtol):
    data, process = golden("c10_hf_sampling.npz"), LogSnrProcess(61, 3, shift=noise)
    x_hat, z = jnp.asarray(data["x_hat"]), jnp.asarray(data["z"])
    for pair in ("pair0", "pair1"):
        t, s = 1 / (1 + np.exp(data[f"noise{noise}/{pair}/log_snrs"]))
        pi = process.noise_probs(t) / (1 - process.alpha(t))
        np.testing.assert_allclose(pi, data[f"noise{noise}/{pair}/pi_t"], rtol=rtol)
        q, want = process.posterior_probs(x_hat, z, t, s), data[f"noise{noise}/{pair}/p_s_t"]
        np.testing.assert_allclose(q, want, rtol=rtol)


@pytest.mark.parametrize("min_p", [0, 0.05])
@pytest.mark.parametrize("kind", ["gidd", "mdlm"])
def test_trajectories_match_original(golden, kind, min_p):
    """Along the original's trajectory our posterior is its own, and its uniforms draw the same."""
    data = golden("c07_samplers.npz")
    process = MaskedProcess(23, 22) if kind == "mdlm" else golden_hybrid("pu0.1")
    name = f"gen/{kind}/minp{min_p}"
    with jax.enable_x64(True):
        z = np.full((4, 6), process.mask_id)
        pairs = data[f"{name}/pairs"][:, :2]
        np.testing.assert_allclose(
            np.stack(time_grid(process, 8, "reference"), 1), pairs, rtol=1e-6
        )
        for call, probs in enumerate(data[f"{name}/probs"]):
            t, s = pairs[call]
            logits = data["gen/W"][z] + data["gen/P"] + t * data["gen/D"]
            q = np.asarray(posterior(process, logits, z, t, s, min_p))
            free = np.full(z.shape, True) if kind == "gidd" else z == process.mask_id
            np.testing.assert_allclose(q[free], probs[free], rtol=1e-9, atol=1e-14)
            drawn = inverse_cdf(q, data[f"{name}/uniforms"][call])
            z = np.where(free, drawn, z)
            np.testing.assert_array_equal(z, data[f"{name}/z_trajectory"][call])


def inverse_cdf(probs: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The original's categorical draw: missing mass goes to the last entry."""
    cumulative = np.cumsum(probs, axis=-1)
    cumulative[..., -1] = 1 + 1e-4
    return np.argmax(cumulative > u[..., None], axis=-1)


def test_inverse_cdf_of_these_tests_is_the_original_one(golden):
    data = golden("c08_utils.npz")
    for probs, u, samples in (
        ("probs", "u", "samples"),
        ("probs_unnormalised", "u", "samples_unnormalised"),
        ("probs_onehot", "u_onehot", "samples_onehot"),
    ):
        drawn = inverse_cdf(data[f"categorical/{probs}"].copy(), data[f"categorical/{u}"])
        np.testing.assert_array_equal(drawn, data[f"categorical/{samples}"])


@pytest.mark.parametrize("steps_", [8, 128])
def test_reference_grid_is_the_original_one(golden, steps_):
    data = golden("c07_samplers.npz")
    t, s = time_grid(HybridProcess(23, 22, p_uniform=0.1), steps_, "reference")
    points = data[f"grid/N{steps_}_eps0.0001/ts_gidd"]
    index = data[f"grid/N{steps_}_eps0.0001/used_index_pairs"]
    np.testing.assert_allclose(t, points[index[:, 0]], rtol=1e-6)
    np.testing.assert_allclose(s, points[index[:, 1]], rtol=1e-6)
    full_t, full_s = time_grid(HybridProcess(23, 22, p_uniform=0.1), steps_)
    np.testing.assert_allclose(full_t, points[:0:-1], rtol=1e-6)
    np.testing.assert_allclose(full_s, points[-2::-1], rtol=1e-6)


def test_cosine_grid_is_the_original_one(golden):
    data, process = golden("c10_hf_sampling.npz"), LogSnrProcess(61, 3)
    for grid, name in (("uniform", "linear"), ("cosine", "cosine")):
        times = 1 / (1 + np.exp(data[f"grid_{name}"]))
        t, s = time_grid(process, 8, grid)
        np.testing.assert_allclose(t, times[:0:-1], rtol=2e-5)
        np.testing.assert_allclose(s, times[-2::-1], rtol=2e-5)


# Frequencies.


EVERY = np.ones((ROWS, LENGTH), bool)


@pytest.mark.parametrize("kappa", [1.0, 0.6])
@pytest.mark.parametrize("name", PROCESSES)
def test_ancestral_and_psi_steps_draw_from_the_dense_distribution(name, kappa):
    process = PROCESSES[name]
    x_hat = distribution(process)
    possible = np.flatnonzero(process.marginal_probs(x_hat[None], 0.7)[0] > 0)
    z = np.resize(possible, ROWS * LENGTH).reshape(ROWS, LENGTH).astype(np.int32)
    step = jax.jit(
        lambda z, t, s: steps.ancestral_step(process, KEYS, tiled(x_hat), z, EVERY, t, s, kappa)
    )
    for t, s in ((0.7, 0.3), (0.95, 0.9)):
        drawn = np.asarray(step(z, t, s).ids)
        probs = steps.transition_probs(process, x_hat[None, None], possible[None], t, s, kappa)
        probs = np.broadcast_to(probs, (1, len(possible), 7))
        np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
        for row, token in enumerate(possible):
            assert chi_square(drawn[z == token], probs[0, row].astype(float)) > 1e-4, (t, token)


@pytest.mark.parametrize("kappa", [1.0, 0.6])
def test_min_p_steps_draw_from_the_filtered_posterior(kappa):
    process = PROCESSES["hybrid"]
    x_hat, t, s, min_p = distribution(process), 0.7, 0.4, 0.06
    z = np.resize(np.arange(7), ROWS * LENGTH).reshape(ROWS, LENGTH).astype(np.int32)
    taken = steps.filtered_ancestral_step(process, KEYS, tiled(x_hat), z, EVERY, t, s, kappa, min_p)
    dense = steps.transition_probs(process, x_hat[None, None], np.arange(7)[None], t, s, kappa)
    probs = np.asarray(keep_min_p(jnp.broadcast_to(dense, (1, 7, 7)), min_p), float)[0]
    assert ((probs == 0) & (np.asarray(dense)[0] > 0)).any()
    for token in range(7):
        assert chi_square(np.asarray(taken.ids)[z == token], probs[token]) > 1e-4, token


@pytest.mark.parametrize("name", PROCESSES)
def test_psi_posterior_keeps_the_marginals_exactly(name):
    """sum over z of q_t(z) times the step from z is q_s, for every kappa, in float64."""
    process, x_hat = PROCESSES[name], distribution(PROCESSES[name]).astype(np.float64)
    with jax.enable_x64(True):
        for kappa in (0.0, 0.3, 1.0):
            for t, s in ((0.7, 0.3), (0.999, 0.5), (0.01, 0.005)):
                q_t = process.marginal_probs(x_hat[None] / x_hat.sum(), t)[0]
                z = np.flatnonzero(q_t > 0)[None]
                clean = jnp.asarray(x_hat / x_hat.sum())[None, None]
                step = steps.transition_probs(process, clean, jnp.asarray(z), t, s, kappa)
                q_s = process.marginal_probs(x_hat[None] / x_hat.sum(), s)[0]
                np.testing.assert_allclose(q_t[z[0]] @ step[0], q_s, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", MASK_ONLY)
def test_remasking_keeps_the_marginals_and_its_definition(name, share):
    """From z_t ~ q_t to q_s, for any sigma that is legal; sigma = 0 is the ancestral step."""
    process = PROCESSES[name]
    x_hat = distribution(process)
    for t, s in ((0.6, 0.5), (0.3, 0.3), (0.9, 0.2)):
        alpha_t, alpha_s = (float(process.alpha(time)) for time in (t, s))
        sigma = share * min(1.0, (1 - alpha_s) / alpha_t)
        rng = np.random.default_rng(5)
        q_t = np.asarray(process.marginal_probs(x_hat[None], t)[0], np.float64)
        z = rng.choice(7, (ROWS, LENGTH), p=q_t / q_t.sum()).astype(np.int32)
        taken = steps.remask_step(process, KEYS, tiled(x_hat), z, EVERY, t, s, sigma)
        z_s = np.asarray(taken.ids)
        q_s = np.asarray(process.marginal_probs(x_hat[None], s)[0], np.float64)
        assert chi_square(z_s, q_s) > 1e-4, (t, s)
        tokens = z != process.mask_id
        assert np.isin(z_s[tokens], [process.mask_id]).mean() == pytest.approx(sigma, abs=0.015)
        changed = tokens & (z_s != process.mask_id) & (z_s != z)
        assert not changed.any()
        np.testing.assert_array_equal(taken.asked, ~tokens & (z_s != process.mask_id))


# Ordered steps.


def test_highest_counts_eligible_positions_only_and_breaks_ties_to_the_left():
    scores = jnp.float32([[3, 9, 3, 1, 3], [0, -np.inf, 5, 5, 2]])
    eligible = jnp.array([[True, False, True, True, True], [True, True, True, True, False]])
    chosen = steps.highest(scores, eligible, jnp.int32([2, 3]))
    np.testing.assert_array_equal(chosen, [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0]])
    none_left = steps.highest(scores, eligible, jnp.int32([9, 0]))
    np.testing.assert_array_equal(none_left, [[1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])


def test_confidence_step_reveals_the_surest_masks():
    process = MaskedProcess(4, 3)
    probs = jnp.float32([[[0.5, 0.3, 0.2, 0], [0.1, 0.9, 0, 0], [0, 0, 1, 0], [0.8, 0.2, 0, 0]]])
    network = everywhere(jnp.log(probs), jax.nn.one_hot(jnp.argmax(probs, -1), 4))
    z, active = jnp.int32([[3, 3, 0, 3]]), jnp.array([[True, True, True, False]])
    for count, ids in enumerate(([3, 3, 0, 3], [3, 1, 0, 3], [0, 1, 0, 3])):
        args = (process, KEYS[:1], network, z, active, jnp.int32([count]))
        taken = steps.confidence_step(*args)
        np.testing.assert_array_equal(taken.ids, [ids])
        np.testing.assert_array_equal(taken.asked, [[count > 0, count > 0, False, False]])


def test_mode_seeking_step_takes_the_largest_gain_times_noise():
    process = HybridProcess(4, 3, p_uniform=0.2)
    probs = jnp.float32([[[0.5, 0.3, 0.2, 0], [0.05, 0.95, 0, 0], [0.1, 0.2, 0.7, 0]]])
    z, t = jnp.int32([[3, 0, 2]]), jnp.float32([0.5])
    mass = process.beta_pi(0.5)
    gains = np.array([0.5 * mass.mask, 0.9 * mass.uniform, 0.0])
    network = everywhere(jnp.log(probs), jax.nn.one_hot(jnp.argmax(probs, -1), 4))
    for count in (1, 2, 3):
        z_next = steps.mode_seeking_step(
            process, KEYS[:1], network, z, jnp.ones((1, 3), bool), t, jnp.int32([count])
        ).ids
        want = np.asarray(z[0]).copy()
        chosen = np.argsort(-gains)[:count]
        want[chosen] = np.argmax(probs[0], -1)[chosen]
        np.testing.assert_array_equal(z_next[0], want)


def test_the_gain_of_a_token_is_a_difference_of_probabilities():
    """0.9 - 0.1 comes before 0.4 - 0, though the latter token is the less probable one."""
    process = HybridProcess(4, 3, p_uniform=0.2)
    probs = jnp.float32([[[0.0, 0.3, 0.4, 0.3], [0.1, 0.9, 0, 0]]])
    active, one = jnp.ones((1, 2), bool), jnp.int32([1])
    z = jnp.int32([[0, 0]])
    network = everywhere(jnp.log(probs), jax.nn.one_hot(jnp.argmax(probs, -1), 4))
    taken = steps.mode_seeking_step(process, KEYS[:1], network, z, active, 0.5, one)
    np.testing.assert_array_equal(taken.ids, [[0, 1]])


@pytest.mark.parametrize("name", MASK_ONLY)
def test_hitting_times_have_their_distribution(name):
    """(m_tau / m_t)^n is uniform: the time at which the first of n masks is lifted."""
    process = PROCESSES[name]
    keys = row_keys(jax.random.key(8), jnp.arange(4000))
    start = np.float32(0.8)
    for count in (1, 7):
        t = jnp.full(4000, start)
        tau = steps.hitting_time(process, keys, t, jnp.full(4000, count, jnp.int32))
        ratio = np.asarray(process.beta_pi(tau).mask / process.beta_pi(start).mask) ** count
        assert stats.kstest(ratio, "uniform").pvalue > 1e-3
    unchanged = steps.hitting_time(process, keys, t, jnp.zeros(4000, jnp.int32))
    np.testing.assert_array_equal(unchanged, t)


def test_first_hitting_lifts_one_mask_anywhere():
    process, x_hat = MaskedProcess(7, 3), distribution(MaskedProcess(7, 3))
    rows = 3000
    keys = row_keys(jax.random.key(9), jnp.arange(rows))
    z = jnp.broadcast_to(jnp.int32([3, 3, 1, 3, 3]), (rows, 5))
    active = jnp.broadcast_to(jnp.array([True, True, True, True, False]), (rows, 5))
    taken = steps.first_hitting_step(process, keys, tiled(x_hat, rows, 5), z, active)
    z_next = np.asarray(taken.ids)
    lifted = z_next != np.asarray(z)
    np.testing.assert_array_equal(lifted.sum(-1), 1)
    np.testing.assert_array_equal(taken.asked, lifted)
    np.testing.assert_allclose(taken.log_probs[lifted], np.log(x_hat[z_next[lifted]]), rtol=1e-5)
    assert chi_square(np.nonzero(lifted)[1], np.array([1, 1, 0, 1, 0]) / 3) > 1e-3
    assert chi_square(z_next[lifted], x_hat.astype(float)) > 1e-3
