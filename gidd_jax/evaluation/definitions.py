"""What alpha and beta_pi of a process say, in float64 NumPy: the references of its checks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.process import InterpolatingProcess

TOY_VOCAB_SIZE, TOY_MASK_ID = 8, 3
NUM_TIMES = 25
STENCIL = np.array([3, -32, 168, -672, 0, 672, -168, 32, -3]) / 840  # first derivative, order 8


class Check(NamedTuple):
    """The largest error that was found, and the largest that is right."""

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return bool(self.error <= self.bound)  # not for NaN


def float64(function: Callable[..., Any], *args: np.ndarray) -> Any:
    """Return function(*args), computed in float64 and as NumPy arrays."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(function)(*map(jnp.asarray, args)))


def masses(process: InterpolatingProcess, t: np.ndarray) -> np.ndarray:
    """Return alpha_t and the noise masses of the mask and of each other token, [3, T]."""
    values = float64(lambda t: (process.alpha(t), *process.beta_pi(t)), t)
    return np.stack(np.broadcast_arrays(*values, t)[:3]).astype(np.float64)


def times(process: InterpolatingProcess, margin: float = 0.1) -> np.ndarray:
    """Return times [NUM_TIMES], evenly spread by logit up to `margin` from both ends."""
    low = process.t_min * (1 + margin)
    high = 1 - (1 - process.t_max) * (1 + margin)
    first, last = (np.log(t) - np.log1p(-t) for t in (low, high))
    return 1 / (1 + np.exp(-np.linspace(first, last, NUM_TIMES)))


def derivatives(process: InterpolatingProcess, t: np.ndarray) -> np.ndarray:
    """Return the derivatives of `masses` by t, [3, T], from differences of values."""
    step = 0.02 * np.minimum(t, 1 - t)  # both ends may be singular
    points = t + np.arange(-4, 5)[:, None] * step
    values = masses(process, points.ravel()).reshape(3, *points.shape)
    return np.einsum("k,mkt->mt", STENCIL, values) / step


def mass_at(process: InterpolatingProcess, mask_uniform: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the entry at each token id [K] of noise masses [2, T], [T, K]."""
    ratio = np.ones(process.vocab_size)
    if process.background is not None:
        ratio = np.asarray(process.background) * process.num_noise_tokens
    mask, uniform = mask_uniform[:, :, None]
    return np.where(ids == process.mask_id, mask, uniform * ratio[ids])


class Marginals(NamedTuple):
    """alpha_t [T] and beta_t pi_t over the vocabulary [T, V]."""

    alpha: np.ndarray
    noise: np.ndarray

    def of(self, probs: np.ndarray) -> np.ndarray:
        """Return q_t(.|probs) for probs [K, V], [T, K, V]."""
        return self.alpha[:, None, None] * probs + self.noise[:, None, :]


def marginals(process: InterpolatingProcess, t: np.ndarray) -> Marginals:
    """Return the marginals at times [T]."""
    alpha, *noise = masses(process, t)
    return Marginals(alpha, mass_at(process, np.stack(noise), np.arange(process.vocab_size)))


def bayes(
    process: InterpolatingProcess, x_hat: np.ndarray, t: np.ndarray, s: np.ndarray
) -> np.ndarray:
    """Return q(z_s|z_t, x_hat) [T, z_t, z_s] for x_hat [V]; NaN where z_t is impossible."""
    at_t, at_s = marginals(process, t), marginals(process, s)
    alpha_ts = at_t.alpha / at_s.alpha
    noise = at_t.noise - alpha_ts[:, None] * at_s.noise
    step = alpha_ts[:, None, None] * np.eye(process.vocab_size) + noise[:, :, None]
    joint = step * at_s.of(x_hat[None])
    total = joint.sum(-1, keepdims=True)
    return np.divide(joint, total, out=np.full_like(joint, np.nan), where=total > 0)
