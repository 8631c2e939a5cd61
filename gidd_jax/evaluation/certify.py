"""Checks of a forward process: its masses, weights, transitions, draws, bound and losses.

Every check returns its error and the bound that a right process meets. References are float64
NumPy, made of nothing but the values of `alpha` and `beta_pi`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.evaluation.definitions import (
    NUM_TIMES,
    Check,
    derivatives,
    float64,
    mass_at,
    masses,
    times,
)
from gidd_jax.evaluation.enumerated import bound, fused, noising, posterior, prior, sampler
from gidd_jax.process import InterpolatingProcess


def formula_checks(process: InterpolatingProcess) -> Iterator[Check]:
    """Yield the checks of masses, weights and transitions, for a vocabulary of any size."""
    yield masses_sum(process)
    yield autodiff_weights(process)
    if type(process).elbo_weights is not InterpolatingProcess.elbo_weights:
        yield own_weights(process)
    for check in (float32_weights, rates, transitions, chapman_kolmogorov):
        yield check(process)


def toy_checks(process: InterpolatingProcess) -> Iterator[Check]:
    """Yield the checks that enumerate the vocabulary: `subjects` makes a process small for them."""
    for check in (posterior, noising, prior, sampler, bound, fused):
        yield check(process)


def resized(process: InterpolatingProcess, vocab_size: int, mask_id: int) -> InterpolatingProcess:
    """Return the same process over another vocabulary, its background by a sample of quantiles."""
    background = None
    if process.background is not None:
        tokens = np.sort(np.delete(process.background, process.mask_id))
        tokens = tokens[np.linspace(0, len(tokens) - 1, vocab_size - 1).round().astype(int)]
        background = tuple(np.insert(tokens / tokens.sum(), mask_id, 0.0))
    return dataclasses.replace(
        process, vocab_size=vocab_size, mask_id=mask_id, background=background
    )


# Masses, weights and transitions: nothing is enumerated.


def masses_sum(process: InterpolatingProcess) -> Check:
    """alpha_t, mask mass and N times the uniform mass are masses that sum to one."""
    t = np.concatenate([[process.t_min], times(process), [process.t_max]])
    values = masses(process, t)
    values[2] *= process.num_noise_tokens
    wrong = np.max(np.abs(values.sum(0) - 1)), np.max(np.abs(np.minimum(values, 0)))
    return Check("masses: alpha_t and beta_t pi_t sum to 1, none negative", np.max(wrong), 1e-6)


class _Weights(NamedTuple):
    """ELBO weights from numerical derivatives, [T, K], for pairs x, z int32 [T, K] at times [T].

    scale: the size of the terms whose difference they are; 1 where there are none.
    """

    x: np.ndarray
    z: np.ndarray
    t: np.ndarray
    values: np.ndarray
    scale: np.ndarray

    def error(self, weights: np.ndarray) -> float:
        return float(np.max(np.abs(weights - self.values) / self.scale))


def _weights(process: InterpolatingProcess) -> _Weights:
    t = times(process).astype(np.float32).astype(np.float64)  # float32 sees the same times
    tokens = _least_and_most_noisy(process)
    pairs = [(x, z) for x in tokens for z in (*tokens, process.mask_id)]
    x, z = (np.array(ids) for ids in zip(*pairs, strict=True))
    values, slopes = masses(process, t), derivatives(process, t)
    decay = slopes[0] / values[0]
    rate = mass_at(process, slopes[1:] - decay * values[1:], z)
    scale = mass_at(process, np.abs(slopes[1:]) + np.abs(decay * values[1:]), z)
    prob = mass_at(process, values[1:], z) + np.where(x == z, values[0][:, None], 0)
    possible = prob > 0
    rate, scale = (np.divide(a, prob, out=0 * a, where=possible) for a in (rate, scale))
    x, z = (np.broadcast_to(ids.astype(np.int32), rate.shape) for ids in (x, z))
    return _Weights(x, z, t, rate, np.where(scale > 0, scale, 1))


def _least_and_most_noisy(process: InterpolatingProcess) -> list[int]:
    """Two clean tokens (or the only one): of the least noise mass above 0, and of the most."""
    if process.background is None:
        tokens = np.delete(np.arange(process.vocab_size), process.mask_id)
    else:
        order = np.argsort(process.background)
        tokens = order[np.asarray(process.background)[order] > 0]
    return sorted({int(tokens[0]), int(tokens[-1])})


def autodiff_weights(process: InterpolatingProcess) -> Check:
    """R_t / q_t by jax.jvp through alpha and beta_pi against numerical derivatives."""
    want = _weights(process)
    generic = functools.partial(InterpolatingProcess.elbo_weights, process)
    got = float64(generic, want.x, want.z, want.t)
    return Check("weights: autodiff = numerical derivatives", want.error(got), 1e-6)


def own_weights(process: InterpolatingProcess) -> Check:
    """The process's own elbo_weights against numerical derivatives."""
    want = _weights(process)
    got = float64(process.elbo_weights, want.x, want.z, want.t)
    return Check("weights: its own elbo_weights = numerical derivatives", want.error(got), 1e-6)


def float32_weights(process: InterpolatingProcess) -> Check:
    """The weights that training uses, in float32."""
    want = _weights(process)
    t = jnp.asarray(want.t, jnp.float32)
    got = jax.jit(process.elbo_weights)(want.x, want.z, t)
    return Check("weights: float32 = numerical derivatives", want.error(np.asarray(got)), 1e-2)


def rates(process: InterpolatingProcess) -> Check:
    """R_t and the weights, relative to the terms whose difference they are."""
    want = _weights(process)
    own = float64(process.elbo_weights, want.x, want.z, want.t)
    smallest = np.min(np.minimum(want.values, own) / want.scale)
    error = np.abs(np.minimum(smallest, 0))
    return Check("rates: R_t and the weights never negative", error, 1e-6)


def _transition(process: InterpolatingProcess, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """alpha_{t|s} and the noise masses of the mask and of each other token, [3, T]."""
    alpha_ts, mass = float64(process.transition, t, s)
    return np.stack([alpha_ts, *mass])


def transitions(process: InterpolatingProcess) -> Check:
    """q(z_t|z_s) is a distribution for all s < t."""
    grid = times(process)
    s, t = (grid[i] for i in np.triu_indices(NUM_TIMES, 1))
    values = _transition(process, t, s)
    values[2] *= process.num_noise_tokens
    wrong = np.max(np.abs(values.sum(0) - 1)), np.max(np.abs(np.minimum(values, 0)))
    return Check("transitions: q(z_t|z_s) sums to 1, never negative", np.max(wrong), 1e-6)


def chapman_kolmogorov(process: InterpolatingProcess) -> Check:
    """The steps from r to s and s to t make that from r to t; from s to t q_s becomes q_t."""
    grid = times(process)
    i, j, k = (g.ravel() for g in np.meshgrid(*[np.arange(NUM_TIMES)] * 3, indexing="ij"))
    ordered = (i < j) & (j < k)
    r, s, t = (grid[index[ordered]] for index in (i, j, k))
    later, earlier = _transition(process, t, s), _transition(process, s, r)
    at_s, at_t = masses(process, s), masses(process, t)
    wrong = []
    for first, both in ((earlier, _transition(process, t, r)), (at_s, at_t)):
        product, scale = later[0] * first, np.abs(later[0] * first) + 1e-12
        product[1:] += later[1:]
        scale[1:] += np.abs(later[1:])
        wrong.append(np.max(np.abs(product - both) / scale))
    return Check("Chapman-Kolmogorov: r to s to t = r to t, q_s to q_t", np.max(wrong), 1e-6)


# Toys: vocabularies that are enumerated.
