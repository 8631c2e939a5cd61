"""Draws of noisy tokens, prior tokens and times against exact probabilities (fixed seeds)."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import stats
from test_process import CosineProcess

from gidd_jax.process import HybridProcess, InterpolatingProcess, LogSnrProcess, MaskedProcess

SKEWED = (0.05, 0.3, 0.0, 0.1, 0.02, 0.33, 0.2)  # over 7 tokens, mask 2
PROCESSES = {
    "hybrid": HybridProcess(7, 6, p_uniform=0.2),
    "hybrid-gamma2": HybridProcess(7, 2, p_uniform=0.5, gamma=2.0),
    "hybrid-masks": HybridProcess(7, 0, p_uniform=0.0),
    "hybrid-skewed": HybridProcess(7, 2, p_uniform=0.4, background=SKEWED),
    "masked": MaskedProcess(7, 3),
    "log-snr": LogSnrProcess(7, 3, shift=0.0),
    "log-snr-skewed": LogSnrProcess(7, 2, scale=0.5, shift=1.0, background=SKEWED),
    "cosine": CosineProcess(7, 5),
}


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


def exact_marginal(process: InterpolatingProcess, token: int, time: float) -> np.ndarray:
    """q_t(.|token) in float64; impossible tokens are 0."""
    if isinstance(process, CosineProcess):
        noise = np.sin(0.5 * np.pi * time) ** 2
        probs = oracle.mixture(process, np.float64(0.9 * noise), np.float64(0.1 * noise))
        return probs + (1 - noise) * np.eye(7)[token]
    probs = oracle.of(process).marginal(np.eye(7)[token], np.float64(time))
    return np.where(probs < 1e-7, 0, probs)


def chi_square_p(draws: np.ndarray, probs: np.ndarray) -> float:
    """p-value of the counts of token ids against exact probabilities; impossible ids fail."""
    counts = np.bincount(draws.ravel(), minlength=len(probs))
    assert len(counts) == len(probs)
    assert counts[probs == 0].sum() == 0
    if np.sum(probs > 0) == 1:
        return 1.0
    expected = probs[probs > 0] / probs.sum() * draws.size
    return float(stats.chisquare(counts[probs > 0], expected).pvalue)


@pytest.mark.parametrize("time", [0.05, 0.6, 0.95])
def test_samples_follow_the_marginal(process, time):
    x = np.array([v for v in range(7) if v != process.mask_id][:2])
    t = jnp.full((2,), time)
    z_t = np.asarray(process.sample(jax.random.key(7), jnp.tile(x[:, None], (1, 60_000)), t))
    probs = [exact_marginal(process, token, time) for token in x]
    for row in range(2):
        assert chi_square_p(z_t[row], probs[row]) > 1e-3
    # independent across positions and rows: the pairs of neighbours follow the product
    across = np.outer(*probs).ravel()
    if across.min() * 60_000 > 5:
        assert chi_square_p(z_t[0] * 7 + z_t[1], across) > 1e-3
    along = np.outer(probs[0], probs[0]).ravel()
    if along.min() * 30_000 > 5:
        assert chi_square_p(z_t[0, ::2] * 7 + z_t[0, 1::2], along) > 1e-3


def test_samples_follow_a_time_per_token():
    process = PROCESSES["hybrid"]
    t = jnp.tile(jnp.array([[0.2, 0.9]]), (30_000, 1))
    z_t = np.asarray(process.sample(jax.random.key(3), jnp.full((30_000, 2), 1), t))
    for column, time in enumerate((0.2, 0.9)):
        assert chi_square_p(z_t[:, column], exact_marginal(process, 1, time)) > 1e-3


def test_prior_samples_follow_the_prior(process):
    prior = process.prior()
    want = oracle.mixture(
        process, np.float64(prior.mask), np.float64(prior.uniform) * process.num_noise_tokens
    )
    np.testing.assert_allclose(want.sum(), 1.0, rtol=1e-6)
    noise = exact_marginal(process, process.mask_id, process.t_max)
    np.testing.assert_allclose(want, noise / noise.sum(), atol=2e-2)
    draws = np.asarray(process.sample_prior(jax.random.key(11), (300, 200)))
    assert draws.dtype == np.int32
    assert chi_square_p(draws, want) > 1e-3


def test_background_is_sampled_as_given():
    probs = np.array(SKEWED)
    draws = np.asarray(PROCESSES["hybrid-skewed"].sample_background(jax.random.key(5), (90_000,)))
    assert chi_square_p(draws, probs) > 1e-3
    even = np.asarray(PROCESSES["masked"].sample_background(jax.random.key(5), (90_000,)))
    assert chi_square_p(even, oracle.token_distribution(PROCESSES["masked"])) > 1e-3


def test_stratified_times_fill_one_stratum_each(process):
    low, high = process.t_min, process.t_max
    keys = jax.random.split(jax.random.key(0), 400)
    t = np.asarray(jax.vmap(lambda key: process.sample_t(key, 16))(keys), np.float64)
    u = (t - low) / (high - low)
    assert u.min() > -1e-6
    assert u.max() < 1 + 1e-6
    # one shared offset: sorted times are 1/16 apart, each sequence by itself is uniform
    in_order = np.sort(u, axis=1)
    np.testing.assert_allclose(in_order[:, 1:] - in_order[:, :-1], 1 / 16, atol=1e-5)
    assert stats.kstest(u[:, 0], "uniform").pvalue > 1e-3
    assert stats.kstest(u[:, 11], "uniform").pvalue > 1e-3


def test_independent_times_are_uniform():
    process = HybridProcess(7, 6, p_uniform=0.1, t_eps=0.05)
    t = np.asarray(process.sample_t(jax.random.key(2), 20_000, stratified=False))
    assert stats.kstest((t - 0.05) / 0.9, "uniform").pvalue > 1e-3
    assert np.diff(np.sort(t)).std() > 2e-5  # exponential gaps, not a grid
