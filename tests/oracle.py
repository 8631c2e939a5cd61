"""Float64 NumPy definitions of the forward processes and of the bound, written from the papers.

Nothing here is shared with the package: marginals are dense vectors over the vocabulary,
derivatives in t are exact (complex step), divergences are sums over the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gidd_jax.process import HybridProcess, InterpolatingProcess, LogSnrProcess, MaskedProcess

COMPLEX_STEP = 1e-30

Array = Any  # of NumPy; its scalar types are not ndarrays to a type checker


@dataclass(frozen=True)
class Oracle:
    """alpha(t) and noise(t)[..., V] for float64 t of any shape; both accept complex t."""

    alpha: Callable[[Array], Array]
    noise: Callable[[Array], Array]

    def marginal(self, probs: Array, t: Array) -> Array:
        """q_t(.|probs) for probs [..., C >= V] and t [...]; extra columns get no noise."""
        noise = self.noise(t)
        noise = np.concatenate(
            [noise, np.zeros((*noise.shape[:-1], probs.shape[-1] - noise.shape[-1]))], axis=-1
        )
        return self.alpha(t)[..., None] * probs + noise

    def rate(self, t: Array) -> Array:
        """R_t = (beta pi)' - (alpha'/alpha) beta pi, [..., V]."""
        d_alpha = self.alpha(t + 1j * COMPLEX_STEP).imag / COMPLEX_STEP
        d_noise = self.noise(t + 1j * COMPLEX_STEP).imag / COMPLEX_STEP
        return d_noise - (d_alpha / self.alpha(t))[..., None] * self.noise(t)

    def weights(self, x: Array, z_t: Array, t: Array) -> Array:
        """ELBO weights R_t(z_t) / q_t(z_t|x); x, z_t and t of one shape."""
        onehot = np.eye(self.noise(t).shape[-1])[x]
        return at(self.rate(t), z_t) / at(self.marginal(onehot, t), z_t)

    def divergences(self, probs: Array, x: Array, z_t: Array, t: Array) -> tuple[Array, Array]:
        """KL and Itakura-Saito divergence of q_t(.|x) from q_t(.|probs), by their definitions."""
        q = self.marginal(np.eye(probs.shape[-1])[x], t)
        p = self.marginal(probs, t)
        ratio = np.where(q > 0, q, 1) / np.where(q > 0, p, 1)
        kl = np.sum(np.where(q > 0, q * np.log(ratio), 0), axis=-1)
        ratio_z = at(q, z_t) / at(p, z_t)
        return kl, ratio_z - np.log(ratio_z) - 1

    def transition(self, t: Array, s: Array) -> tuple[Array, Array]:
        """alpha_{t|s} and beta_{t|s} pi_{t|s} [..., V], from the difference that defines it."""
        alpha_ts = self.alpha(t) / self.alpha(s)
        return alpha_ts, self.noise(t) - alpha_ts[..., None] * self.noise(s)


def float32_values(values: Array) -> Array:
    """Round to float32 and widen again: a float32 computation then sees the same numbers."""
    return np.asarray(values, np.float32).astype(np.float64)


def at(values: Array, ids: Array) -> Array:
    """values[..., ids]."""
    return np.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


def softmax(logits: Array, excluded: Array) -> Array:
    """Softmax over the last axis with the given columns left out."""
    logits = np.where(excluded, -np.inf, np.asarray(logits, np.float64))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def excluded_columns(process: InterpolatingProcess, columns: int) -> Array:
    """True at the mask and at the columns beyond the vocabulary."""
    ids = np.arange(columns)
    return (ids == process.mask_id) | (ids >= process.vocab_size)


def token_distribution(process: InterpolatingProcess) -> Array:
    """The distribution u of the noise that is not the mask."""
    if process.background is not None:
        return np.asarray(process.background)
    u = np.full(process.vocab_size, 1 / (process.vocab_size - 1))
    u[process.mask_id] = 0
    return u


def mixture(process: InterpolatingProcess, mask_mass, token_mass) -> Array:
    """mask_mass * m + token_mass * u over the vocabulary."""
    onehot = np.eye(process.vocab_size)[process.mask_id]
    return mask_mass[..., None] * onehot + token_mass[..., None] * token_distribution(process)


def hybrid(process: HybridProcess) -> Oracle:
    """Equations 9-11 of arXiv 2503.04482; p_uniform floored at e^-20, log B at -20."""
    p = max(process.p_uniform, np.exp(-20.0))
    b = max(2.0**process.gamma * p / (1 - p), np.exp(-20.0))

    def odds(t):
        return b * t ** (process.gamma / 2) * (1 - t) ** (process.gamma / 2)

    return Oracle(
        alpha=lambda t: (1 - t) / (1 + odds(t)),
        noise=lambda t: mixture(process, t / (1 + odds(t)), odds(t) / (1 + odds(t))),
    )


def masked(process: MaskedProcess) -> Oracle:
    """The log-linear schedule of arXiv 2406.07524."""
    return Oracle(
        alpha=lambda t: 1 - (1 - process.eps) * t,
        noise=lambda t: mixture(process, (1 - process.eps) * t, 0 * t),
    )


def log_snr(process: LogSnrProcess) -> Oracle:
    """alpha = sigmoid(lambda) with lambda = log((1-t)/t), in (min_log_snr, max_log_snr)."""
    shift = np.clip(process.shift, -690.0, 690.0)  # e^690 still is a float64

    def share(t):  # sigmoid(scale * lambda + shift) and its complement
        odds = ((1 - t) / t) ** process.scale * np.exp(shift)
        return odds / (1 + odds), 1 / (1 + odds)

    return Oracle(
        alpha=lambda t: 1 - t,
        noise=lambda t: mixture(process, t * share(t)[1], t * share(t)[0]),
    )


def of(process: InterpolatingProcess) -> Oracle:
    """The oracle of any of the three families."""
    if isinstance(process, HybridProcess):
        return hybrid(process)
    if isinstance(process, MaskedProcess):
        return masked(process)
    assert isinstance(process, LogSnrProcess)
    return log_snr(process)
