"""Transitions and posteriors: accuracy of close times, Chapman-Kolmogorov, Bayes by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_process import COSINE, COSINE_ORACLE, PROCESSES, TIMES

from gidd_jax.process import InterpolatingProcess, NoiseMass

# Steps s -> t of three sizes, both ends too: differences that define the noise cancel in float32.
STEPS = np.repeat([0.3, 1e-3, 1e-4], 11)
STEPS_T = np.clip(np.tile(np.r_[2e-4, np.linspace(0.02, 0.98, 9), 0.9995], 3), STEPS + 2e-4, 1)
STEPS_T = oracle.float32_values(STEPS_T)
STEPS_S = oracle.float32_values(STEPS_T - STEPS)


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def rtol(request):
    """Run the test in float32 and under x64; gives the relative tolerance."""
    with jax.enable_x64(request.param):
        yield 1e-10 if request.param else 2e-5


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


def distributions(process: InterpolatingProcess, rows: int, seed: int = 0) -> np.ndarray:
    """Random distributions over clean tokens, [rows, V]."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((rows, process.vocab_size))
    return oracle.softmax(logits, oracle.excluded_columns(process, process.vocab_size))


def transition_matrices(process: InterpolatingProcess, t, s) -> np.ndarray:
    """q(z_t|z_s) [B, z_s, z_t]."""
    alpha_ts, mass = process.transition(t, s)
    ids = jnp.arange(process.vocab_size)[None]
    noise = process.mass_at(NoiseMass(*(m[:, None] for m in mass)), ids)
    stay = np.asarray(alpha_ts)[:, None, None] * np.eye(process.vocab_size)
    return stay + np.asarray(noise)[:, None, :]


def test_transitions_of_close_times_are_accurate(process, rtol):
    want_alpha, want = oracle.of(process).transition(STEPS_T, STEPS_S)
    alpha_ts, _ = process.transition(STEPS_T, STEPS_S)
    np.testing.assert_allclose(alpha_ts, want_alpha, rtol=min(rtol, 1e-5))
    got = transition_matrices(process, STEPS_T, STEPS_S)
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=min(rtol, 1e-6))
    noise = np.where(np.eye(23) == 1, np.inf, got).min(axis=1)  # the same from every other token
    np.testing.assert_allclose(noise, want, rtol=max(min(rtol, 1e-5), 1e-9), atol=1e-15)


def test_chapman_kolmogorov(process, rtol):
    t, s = STEPS_T, STEPS_S
    r = oracle.float32_values(np.maximum(s - STEPS / 2, 1.3e-4))
    s_r, t_s, t_r = (transition_matrices(process, *pair) for pair in ((s, r), (t, s), (t, r)))
    np.testing.assert_allclose(s_r @ t_s, t_r, rtol=max(rtol, 1e-9), atol=1e-15)
    clean = jnp.asarray(distributions(process, 66).reshape(33, 2, 23))
    at_s, at_t = (np.asarray(process.marginal_probs(clean, u)) for u in (s, t))
    np.testing.assert_allclose(at_s @ t_s, at_t, rtol=max(rtol, 1e-9))


def test_posterior_is_bayes_by_enumeration(process, rtol):
    reference, rng = oracle.of(process), np.random.default_rng(1)
    t, s = (oracle.float32_values(u) for u in ([0.02, 0.5, 0.97], [0.01, 0.1, 0.96]))
    x_hat = distributions(process, 21).reshape(3, 7, 23)
    z_t = rng.integers(0, 23, (3, 7))
    z_t[:, 0] = process.mask_id
    got = np.asarray(process.posterior_probs(jnp.asarray(x_hat), jnp.asarray(z_t), t, s))
    alpha_ts, noise = reference.transition(t, s)
    step = alpha_ts[:, None, None] * np.eye(23) + noise[:, None, :]  # [B, z_s, z_t]
    to_z = np.stack([m[:, z].T for m, z in zip(step, z_t, strict=True)])  # [B, L, z_s]
    start = np.stack([reference.marginal(np.eye(23), np.full(23, u)) for u in s])  # [B, x, z_s]
    joint = np.einsum("blx,bxs,bls->bls", x_hat, start, to_z)
    want = joint / joint.sum(-1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=3 * rtol, atol=rtol / 1000)
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=rtol)


def test_transitions_of_a_process_of_two_functions(rtol):
    t = np.clip(TIMES, 0, 0.98)  # cos^2 near t = 1 is known to the rounding of pi t / 2 only
    got = transition_matrices(COSINE, t, 0.5 * t)
    alpha_ts, noise = COSINE_ORACLE.transition(t, 0.5 * t)
    want = alpha_ts[:, None, None] * np.eye(23) + noise[:, None, :]
    np.testing.assert_allclose(got, want, rtol=rtol)
    x_hat = jnp.asarray(distributions(COSINE, 21).reshape(3, 7, 23))
    posterior = COSINE.posterior_probs(x_hat, jnp.ones((3, 7), int), t[3:30:12], t[2:29:12])
    np.testing.assert_allclose(posterior.sum(-1), 1.0, rtol=rtol)
