"""Prompts that are believed, counted: puzzles that a small hybrid model solves by infilling."""

from pathlib import Path

import numpy as np
import pytest
import sudoku

from gidd_jax.inference.gidd import Gidd

# Shares of 128 puzzles with 20 and with 14 of 36 cells given, and the least that is right: those of
# a trial of the same model (other seeds) less what 128 puzzles vary by.
LEAST = {"ancestral": (0.55, 0.12), "mode_seeking": (0.9, 0.65)}


def test_grids_are_valid_and_errors_are_found():
    grids = sudoku.grids(20, seed=5)
    assert sudoku.is_valid(grids).all()
    assert len(np.unique(grids, axis=0)) == 20
    wrong = grids.copy()
    wrong[np.arange(20), np.arange(20)] = (wrong[np.arange(20), np.arange(20)] + 1) % sudoku.SIZE
    assert not sudoku.is_valid(wrong).any()
    swapped = grids[:, [1, 0, *range(2, sudoku.CELLS)]]  # rows stay right, columns do not
    assert not sudoku.is_valid(swapped).any()


@pytest.mark.slow
def test_puzzles_are_solved_by_rows_as_in_training_at_the_time_that_fits(tmp_path: Path):
    model = Gidd.from_pretrained(sudoku.train(tmp_path))
    found = {name: shares for name, shares in sudoku.table(model).items() if name in LEAST}
    before = sudoku.table(sudoku.as_before(model))
    for name, least in LEAST.items():
        for given, share in zip((20, 14), least, strict=True):
            assert found[name][given] >= share, found
            assert before[name][given] <= found[name][given] / 2, (before, found)
