"""The scaling paper's laws: sizes, work, and the best batch and learning rate for a run's tokens.

"Scaling Behavior of Discrete Diffusion Language Models" (arXiv 2512.10858) and the notebooks of its
code: fits to 510 runs of 25M to 567M parameters under CompleteP, with LaProp and rows of 2,048
tokens. They say nothing of other networks, optimizers or parametrizations.
"""

import math
from typing import NamedTuple

from gidd_jax.errors import InputError


class Law(NamedTuple):
    """A power law exp(intercept) * x^slope."""

    slope: float
    intercept: float

    def __call__(self, x: float) -> float:
        return math.exp(self.intercept + self.slope * math.log(x))


# The fits to all runs, and those by type of noise: the shift of `process.LogSnrProcess` is -1000,
# -2, 0, 2 or 1000. planned: an earlier fit, by which the batches of the 3B and 10B runs were set.
BATCH_LAWS = {  # training tokens -> tokens of a batch
    "all": Law(0.8225, -2.4 * math.log(10)),
    "masked": Law(0.7759, -4.449),
    "low": Law(0.7916, -4.837),
    "balanced": Law(0.8373, -5.845),
    "high": Law(0.8607, -6.398),
    "uniform": Law(0.8787, -6.792),
    "planned": Law(0.8179, -2.442 * math.log(10)),
}
RATE_LAWS = {  # tokens of a batch -> learning rate
    "all": Law(0.3412, -2.06 * math.log(10)),
    "masked": Law(0.3295, -4.569),
    "low": Law(0.2924, -4.135),
    "balanced": Law(0.3653, -5.016),
    "high": Law(0.3628, -5.047),
    "uniform": Law(0.3554, -4.933),
}


class Advice(NamedTuple):
    """What the laws say of a run: training tokens, rows and tokens of a batch, learning rate."""

    tokens: int
    batch_rows: float
    batch_tokens: float
    learning_rate: float


def critical_batch(tokens: float, noise: str = "all") -> float:
    """Return the batch in tokens beyond which larger ones waste work, for so many training tokens.

    noise: a name in BATCH_LAWS. Raises InputError for another.
    """
    return _law(BATCH_LAWS, noise)(tokens)


def best_rate(batch_tokens: float, noise: str = "all") -> float:
    """Return the best learning rate (CompleteP's, of the whole) for a batch of so many tokens.

    noise: a name in RATE_LAWS. Raises InputError for another.
    """
    return _law(RATE_LAWS, noise)(batch_tokens)


def advise(tokens: int, seq_len: int) -> Advice:
    """Return the laws' batch for so many training tokens, in rows of seq_len, and its rate."""
    batch = critical_batch(tokens)
    return Advice(tokens, batch / seq_len, batch, best_rate(batch))


def non_embedding_parameters(num_layers: int, width: int) -> int:
    """Return the parameters of `models.gidd` but for embedding and output layer.

    A layer has 12 width^2 in matrices and 11 width in norms, biases, learned key and value.
    """
    return num_layers * (12 * width**2 + 11 * width) + width


def flops_per_token(num_layers: int, width: int, seq_len: int) -> int:
    """Return the paper's training FLOPs per token: 72 L d^2 + 12 L d S, without the vocabulary."""
    return 72 * num_layers * width**2 + 12 * num_layers * width * seq_len


def _law(laws: dict[str, Law], noise: str) -> Law:
    if noise not in laws:
        raise InputError(f"no law for noise {noise!r}: use one of {', '.join(laws)}")
    return laws[noise]
