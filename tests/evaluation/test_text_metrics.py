"""Entropy, distinct n-grams and the bootstrap."""

import numpy as np
import pytest

from gidd_jax.evaluation import text_metrics


def test_token_entropy():
    assert text_metrics.token_entropy(np.array([3, 3, 3])) == 0.0
    assert str(text_metrics.token_entropy(np.array([3]))) == "0.0"
    assert text_metrics.token_entropy(np.array([5, 1, 5, 1])) == pytest.approx(np.log(2))
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert text_metrics.token_entropy(np.array([7, 7, 2, 7])) == pytest.approx(expected)


def test_distinct_n():
    sequences = [np.array([1, 2, 1, 2]), np.array([2, 1]), np.array([9])]
    assert text_metrics.distinct_n(sequences, 1) == 3 / 7
    assert text_metrics.distinct_n(sequences, 2) == 2 / 4  # not across sequences: 12 21 12 | 21
    assert text_metrics.distinct_n(sequences, 3) == 2 / 2
    assert text_metrics.distinct_n(sequences, 5) is None


def test_bootstrap_of_a_mean_has_the_known_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = text_metrics.mean_estimate(values, 4000, seed=1)
    error = values.std() / np.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(error, rel=0.05)
    low, high = found.interval
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error
    )


def test_bootstrap_of_a_ratio_weighs_items_by_their_size():
    """Against the delta method; items whose ratio is the same leave no error at all."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 50, size=500)
    nats = sizes * rng.normal(4.0, 0.5, size=500)
    found = text_metrics.ratio_estimate(nats, sizes, 4000, seed=3)
    assert found.value == pytest.approx(nats.sum() / sizes.sum())
    residual = nats - found.value * sizes
    error = residual.std() / sizes.mean() / np.sqrt(500)
    assert found.standard_error == pytest.approx(error, rel=0.06)
    assert text_metrics.ratio_estimate(4.0 * sizes, sizes, 100, seed=3).standard_error < 1e-12


def test_bootstrap_is_seeded_and_does_not_depend_on_its_chunks(monkeypatch):
    values, ones = np.arange(50.0), np.ones(50)
    whole = text_metrics.bootstrap_ratios(values, ones, 64, seed=5)
    np.testing.assert_array_equal(whole, text_metrics.bootstrap_ratios(values, ones, 64, seed=5))
    assert not np.array_equal(whole, text_metrics.bootstrap_ratios(values, ones, 64, seed=6))
    monkeypatch.setattr(text_metrics, "_CHUNK", 500)
    parts = text_metrics.bootstrap_ratios(values, ones, 64, seed=5)
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


def test_one_item_has_no_error():
    assert text_metrics.ratio_estimate(np.array([3.0]), np.array([2]), 100, 0) == (1.5, None, None)
