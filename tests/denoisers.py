"""Processes over seven tokens, networks that say the same everywhere, and a test of frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from scipy import stats

from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess
from gidd_jax.sampling import steps

SKEWED = (0.05, 0.3, 0.0, 0.1, 0.02, 0.33, 0.2)  # over 7 tokens, mask 2
PROCESSES = {
    "hybrid": HybridProcess(7, 6, p_uniform=0.2),
    "hybrid-gamma2": HybridProcess(7, 2, p_uniform=0.5, gamma=2.0),
    "hybrid-masks": HybridProcess(7, 6, p_uniform=0.0),
    "hybrid-skewed": HybridProcess(7, 2, p_uniform=0.4, background=SKEWED),
    "masked": MaskedProcess(7, 3),
    "log-snr": LogSnrProcess(7, 3, shift=0.0),
    "log-snr-uniform": LogSnrProcess(7, 6, shift=1000.0),
    "log-snr-skewed": LogSnrProcess(7, 2, scale=0.5, shift=-1.0, background=SKEWED),
}
MASK_ONLY = ["hybrid-masks", "masked"]
ROWS, LENGTH = 8, 4000  # 32,000 draws a test


def everywhere(logits, weights=None) -> steps.Network:
    """A network that is asked everywhere at once: logits [B, L, V], and weights to draw from."""
    said = steps.Predicted(logits, jax.nn.softmax(logits) if weights is None else weights)

    def ask(where, judge, *arrays, at_most=None):
        del at_most  # only a hint
        return jax.tree.map(
            lambda a: jnp.where(jnp.expand_dims(where, range(2, a.ndim)), a, 0),
            judge(said, *arrays),
        )

    return steps.Network(logits.shape[-1], ask)


def chi_square(drawn: np.ndarray, probs: np.ndarray) -> float:
    """P-value of draws (any shape) from probs [V]; draws of probability 0 give 0."""
    counts = np.bincount(np.ravel(drawn), minlength=len(probs)).astype(float)
    possible = probs > 1e-12
    if counts[~possible].any():
        return 0.0
    expected = probs[possible] * counts.sum() / probs[possible].sum()
    big = expected >= 5  # the approximation needs counts: the rest is pooled
    observed, expected = (np.append(a[big], a[~big].sum()) for a in (counts[possible], expected))
    keep = expected > 0
    return stats.chisquare(observed[keep], expected[keep]).pvalue if keep.sum() > 1 else 1.0


def distribution(process, seed: int = 0) -> np.ndarray:
    """A distribution over clean tokens with one that is impossible, [V] float32."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.standard_normal(process.vocab_size)
    excluded = oracle.excluded_columns(process, process.vocab_size)
    excluded[0 if process.mask_id else 1] = True
    return oracle.softmax(logits, excluded).astype(np.float32)


def tiled(x_hat: np.ndarray, rows: int = ROWS, length: int = LENGTH) -> steps.Network:
    probs = jnp.broadcast_to(jnp.asarray(x_hat, jnp.float32), (rows, length, len(x_hat)))
    return everywhere(jnp.log(probs))
