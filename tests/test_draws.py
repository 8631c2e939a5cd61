"""Uniform numbers and categorical draws: support, tail, frequencies, independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gidd_jax.draws import (
    categorical,
    first_largest,
    fold_in,
    index_from_uniforms,
    num_levels,
    row_keys,
    uniforms,
)

KEYS = row_keys(jax.random.key(0), jnp.arange(4))


def descend(weights: np.ndarray, u: list[float]) -> int:
    """The documented draw for one distribution, in float64 and with loops."""

    def tree(leaves: np.ndarray, depth: int) -> int:
        low, high = 0, 2**depth
        while high - low > 1:
            middle = (low + high) // 2
            left, right = leaves[low:middle].sum(), leaves[middle:high].sum()
            smaller = u.pop(0) * (left + right) < min(left, right)
            low, high = (middle, high) if smaller != (left <= right) else (low, middle)
        return low

    size = next((n for n in (256, 128, 64) if len(weights) % n == 0), 256)
    if len(weights) <= size:
        return tree(weights, len(u))
    depth = size.bit_length() - 1
    blocks = [weights[i : i + size] for i in range(0, len(weights), size)]
    block = tree(np.array([b.sum() for b in blocks]), len(u) - depth)
    return size * block + tree(blocks[block], depth)


def hard_weights(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Weights over forty orders of magnitude, a third of them 0; float32."""
    weights = np.exp(rng.uniform(-46, 0, (rows, size))) * rng.integers(0, 3, (rows, size))
    weights[:, rng.integers(size)] += 1
    return weights.astype(np.float32)


def edge_uniforms(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Uniforms that reach every branch: log-uniform down to 1e-12, plus 0 and the largest."""
    u = np.exp(rng.uniform(np.log(1e-12), 0, (rows, num_levels(size))))
    u[rng.random(u.shape) < 0.1] = 0
    u[rng.random(u.shape) < 0.1] = 1 - 2.0**-24
    return np.minimum(u, 1 - 2.0**-24).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 11, 192, 256, 257, 384, 1000])
def test_draw_never_takes_weight_zero_and_follows_its_definition(size):
    rng = np.random.default_rng(size)
    weights, u = hard_weights(rng, 400, size), edge_uniforms(rng, 400, size)
    drawn = np.asarray(jax.jit(index_from_uniforms)(weights, u))
    assert np.all(weights[np.arange(400), drawn] > 0)
    wanted = [
        descend(w, list(v)) for w, v in zip(weights.astype(float), u.astype(float), strict=True)
    ]
    np.testing.assert_array_equal(drawn, wanted)


@pytest.mark.parametrize("size", [1, 11, 192, 257, 384, 1000])
def test_the_first_of_the_largest(size):
    """Among ties too, and where the largest lies in the last block."""
    rng = np.random.default_rng(size)
    values = rng.integers(-9, 3, (200, size)).astype(np.float32)
    values[0, -1], values[1] = 7, -np.inf
    np.testing.assert_array_equal(jax.jit(first_largest)(values), np.argmax(values, axis=-1))


@pytest.mark.parametrize("place", [0, 1])
def test_probability_of_one_in_a_billion_is_kept(place):
    """A token of 1e-9 beside one of almost 1, wherever it stands, is drawn for u < 1e-9 alone."""
    weights = np.full((2, 300), 0.0, np.float32)
    rare, common = (5, 200) if place == 0 else (200, 5)
    weights[:, rare], weights[:, common] = 1e-9, 1
    u = np.full((2, num_levels(300)), 0.5, np.float32)
    first = np.argmax([bin(5 ^ 200)[2:].zfill(8)[i] == "1" for i in range(8)])
    u[:, num_levels(300) - 8 + first] = 0.999e-9, 1.001e-9
    np.testing.assert_array_equal(index_from_uniforms(weights, u), [rare, common])


def test_uniforms_are_uniform_and_fine_near_zero():
    u = np.asarray(uniforms(KEYS, 2**18, 2))
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    small = u[u < 2.0**-10].astype(np.float64)
    assert len(small) > 1000
    on_coarse_grid = np.mean(small * 2**24 % 1 == 0)
    assert on_coarse_grid < 0.01
    correlation = np.corrcoef(u.reshape(-1, 2).T)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(2**20)


def test_uniforms_depend_on_neither_batch_nor_length():
    u = uniforms(KEYS, 12, 3)
    np.testing.assert_array_equal(uniforms(KEYS[1:2], 7, 3)[0], u[1, :7])


@pytest.mark.parametrize("size", [5, 700])
def test_categorical_has_the_frequencies_of_the_weights(size):
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.full(size, 0.5))
    weights = jnp.broadcast_to(jnp.asarray(3 * probs, jnp.float32), (4, 5000, size))
    drawn = np.concatenate(
        [np.asarray(jax.jit(categorical)(fold_in(KEYS, n), weights)).ravel() for n in range(5)]
    )
    counts = np.bincount(drawn, minlength=size)
    expected = probs * counts.sum()
    big = expected >= 5  # the chi-square approximation needs counts: the rest is pooled
    observed = np.append(counts[big], counts[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3


def test_draws_of_a_row_do_not_depend_on_the_batch():
    weights = jnp.asarray(np.random.default_rng(2).random((4, 6, 9)), jnp.float32)
    together = categorical(KEYS, weights)
    alone = jnp.concatenate([categorical(KEYS[i : i + 1], weights[i : i + 1]) for i in range(4)])
    np.testing.assert_array_equal(together, alone)
