"""Temperature, top-k, top-p and min-p against the original's arrays and their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gidd_jax.sampling.filters import filter_log_probs, keep_min_p, keep_top_k, keep_top_p, temper

P = np.array([0.05, 0.4, 0.15, 0.3, 0.1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("temp1_p0_k0", {}),
        ("temp0.7_p0.9_k0", {"temperature": 0.7, "top_p": 0.9}),
        ("temp1_p0_k5", {"top_k": 5}),
        ("temp0.5_p0.8_k10", {"temperature": 0.5, "top_p": 0.8, "top_k": 10}),
        ("temp0_p0_k0", {"temperature": 0.0}),
    ],
)
@pytest.mark.parametrize(("x64", "rtol"), [(False, 2e-5), (True, 1e-10)])
def test_filters_match_original(golden, name, options, x64, rtol):
    data = golden("c10_hf_sampling.npz")
    with jax.enable_x64(x64):
        log_probs = jax.nn.log_softmax(jnp.asarray(data["logits"]))
        got = np.exp(filter_log_probs(log_probs, **options))
    want = data[f"probs_{name}"]
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=rtol)


def test_temperature_is_a_power():
    np.testing.assert_allclose(np.exp(temper(np.log(P), 0.5)), P**2 / np.sum(P**2), rtol=1e-6)
    np.testing.assert_array_equal(np.exp(temper(np.log(P), 0.0)), [0, 1, 0, 0, 0])
    cold = np.exp(temper(jnp.float32([-1e4, -1.0, -1.001]), 1e-6))
    np.testing.assert_allclose(cold, [0, 1, 0], atol=1e-6)


def test_top_k_and_top_p_keep_the_right_tokens():
    np.testing.assert_allclose(np.exp(keep_top_k(np.log(P), 2)), [0, 4 / 7, 0, 3 / 7, 0], rtol=1e-6)
    np.testing.assert_allclose(np.exp(keep_top_k(np.log(P), 9)), P, rtol=1e-6)
    for top_p, kept in (
        (0.1, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.9, [1, 2, 3, 4]),
    ):
        support = np.flatnonzero(np.exp(keep_top_p(np.log(P), top_p)))
        np.testing.assert_array_equal(support, kept)
    np.testing.assert_allclose(
        np.exp(keep_top_p(np.log(P), 0.41)), [0, 4 / 7, 0, 3 / 7, 0], rtol=1e-6
    )


def test_min_p_keeps_the_largest_when_nothing_reaches_it():
    np.testing.assert_allclose(
        keep_min_p(P, 0.12), np.array([0, 0.4, 0.15, 0.3, 0]) / 0.85, rtol=1e-6
    )
    np.testing.assert_allclose(keep_min_p(P, 0.9), [0, 1, 0, 0, 0])
    np.testing.assert_array_equal(np.isfinite(keep_min_p(np.stack([P, P]), 1.0)), True)
