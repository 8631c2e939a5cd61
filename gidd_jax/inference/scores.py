"""Rows judged in groups of a similar width: how probable they are, and which tokens are wrong."""

import functools
from typing import TYPE_CHECKING

import numpy as np

from gidd_jax.inference import programs
from gidd_jax.inference.batches import by_batches
from gidd_jax.inference.prompts import Rows, by_width
from gidd_jax.sampling.estimators import calls_per_row, num_draws
from gidd_jax.sampling.options import EstimatorOptions, SuspicionOptions

if TYPE_CHECKING:
    from gidd_jax.inference.gidd import Gidd


def log_likelihood_draws(
    model: "Gidd", rows: Rows, options: EstimatorOptions, batch_size: int, seed: int
) -> tuple[np.ndarray, int]:
    """Return draws of log p of the free tokens, float32 [K, N, L], and the network calls."""
    draws, calls = np.zeros((num_draws(options), *rows.ids.shape), np.float32), 0
    for numbers, part in by_width(rows):
        run = functools.partial(
            programs.log_likelihood,
            network=model.network,
            process=model.process,
            keep_padding_columns=model.keep_padding_columns,
            options=options,
        )
        scores = by_batches(run, model.params, part, batch_size, seed, numbers)
        found = np.concatenate(scores, axis=1)[:, : len(numbers)]
        draws[:, numbers, : part.ids.shape[1]] = found
        longest = int(part.free.sum(axis=-1).max())
        calls += len(scores) * (1 if model.process is None else calls_per_row(options, longest))
    return draws, calls


def suspicion(
    model: "Gidd", rows: Rows, options: SuspicionOptions, batch_size: int
) -> tuple[list[np.ndarray], int]:
    """Return wrong, proposals and proposal_probs, each [N, L], and the network calls."""
    assert model.process is not None
    kinds = (np.float32, np.int32, np.float32)
    found, calls = [np.zeros(rows.ids.shape, kind) for kind in kinds], 0
    for numbers, part in by_width(rows):
        run = functools.partial(
            programs.suspicion, network=model.network, process=model.process, options=options
        )
        parts = by_batches(run, model.params, part, batch_size, seed=0)
        for whole, *leaves in zip(found, *parts, strict=True):
            whole[numbers, : part.ids.shape[1]] = np.concatenate(leaves)[: len(numbers)]
        one_by_one = options.method == "leave_one_out"
        calls += len(parts) * (int(part.free.any(axis=0).sum()) if one_by_one else 1)
    return found, calls
