"""Figures of sets of token sequences, and how much they vary with the set: the bootstrap."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_CHUNK = 4_000_000  # resampled counts held at a time


class Estimate(NamedTuple):
    """A figure with its standard error and 95% interval (None where fewer than two items)."""

    value: float
    standard_error: float | None
    interval: tuple[float, float] | None


def bootstrap_counts(count: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each of `count` items is in each resample, int [some resamples, count]."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // max(count, 1))
    for start in range(0, num_resamples, rows):
        size = min(rows, num_resamples - start)
        yield rng.multinomial(count, np.full(count, 1 / count), size=size)


def bootstrap_ratios(
    numerators: np.ndarray, denominators: np.ndarray, num_resamples: int, seed: int
) -> np.ndarray:
    """Resample items with replacement; return sum(numerators) / sum(denominators), [resamples].

    numerators and denominators [N] belong to the same items (documents, samples): the ratio of
    sums weighs items by their size. Resamples whose denominators sum to 0 give NaN.
    """
    values = np.stack([numerators, denominators], axis=1).astype(np.float64)
    sums = [counts @ values for counts in bootstrap_counts(len(values), num_resamples, seed)]
    top, bottom = np.concatenate(sums).T
    return np.divide(top, bottom, out=np.full(num_resamples, np.nan), where=bottom > 0)


def estimate_from(value: float, resampled: np.ndarray) -> Estimate:
    """Return a figure with the error and interval of its resampled values, NaN ones left out.

    A figure that is not finite has neither.
    """
    if not np.isfinite(value) or np.sum(np.isfinite(resampled)) < 2:
        return Estimate(value, None, None)
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return Estimate(value, float(np.nanstd(resampled, ddof=1)), (float(low), float(high)))


def ratio_estimate(
    numerators: np.ndarray, denominators: np.ndarray, num_resamples: int, seed: int
) -> Estimate:
    """Return sum(numerators) / sum(denominators) with the bootstrap's error over the items [N].

    NaN where the denominators sum to 0.
    """
    top, bottom = (float(np.sum(a, dtype=np.float64)) for a in (numerators, denominators))
    value = top / bottom if bottom else float("nan")
    if len(numerators) < 2 or num_resamples < 2 or not np.isfinite(value):
        return Estimate(value, None, None)
    return estimate_from(value, bootstrap_ratios(numerators, denominators, num_resamples, seed))


def mean_estimate(values: np.ndarray, num_resamples: int, seed: int) -> Estimate:
    """Return the mean of values [N] with the bootstrap's error."""
    return ratio_estimate(values, np.ones(len(values)), num_resamples, seed)


def token_entropy(ids: np.ndarray) -> float:
    """Return the entropy, in nats, of the frequencies of the tokens in one sequence [L]."""
    counts = np.unique(ids, return_counts=True)[1]
    probs = counts / counts.sum()
    return float(np.sum(probs * -np.log(probs)))  # of one token 0.0, not -0.0


def distinct_n(sequences: Sequence[np.ndarray], n: int) -> float | None:
    """Return the share of different n-grams among all of the sequences; None where there are none.

    It falls with the amount of text: compare sets of the same size (Li et al., arXiv 1510.03055).
    """
    grams = [
        np.lib.stride_tricks.sliding_window_view(np.asarray(ids), n)
        for ids in sequences
        if len(ids) >= n
    ]
    if not grams:
        return None
    together = np.concatenate(grams)
    return len(np.unique(together, axis=0)) / len(together)
