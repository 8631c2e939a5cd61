"""The three rates of mending: by hand, and of a corrector whose rates are known."""

import json

import numpy as np
import pytest

from gidd_jax.errors import InputError
from gidd_jax.evaluation.repair import RATES, repaired
from gidd_jax.evaluation.reports import finite

TOUCH, RECOVER, DAMAGE = 0.7, 0.45, 0.04  # of the hand-made corrector
VALUES = 9


def answers(rng: np.random.Generator, rows: int, length: int, share: float = 0.2):
    """Answers with a share of errors, and what a corrector with the rates above makes of them."""
    truth = rng.integers(VALUES, size=(rows, length))
    wrong = rng.random(truth.shape) < share
    before = np.where(wrong, (truth + rng.integers(1, VALUES, truth.shape)) % VALUES, truth)
    u = rng.random(truth.shape)
    another = truth + rng.integers(1, VALUES, truth.shape)
    another = np.where(another % VALUES == before, before + 1, another) % VALUES
    another = np.where(another == truth, another + 1, another) % VALUES
    another = np.where(another == before, another + 1, another) % VALUES
    of_wrong = np.where(u < RECOVER, truth, np.where(u < TOUCH, another, before))
    return before, np.where(wrong, of_wrong, np.where(u < DAMAGE, another, before)), truth


def test_rates_by_hand():
    truth = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    before = np.array([[1, 9, 9, 9], [5, 6, 9, 8]])  # 4 wrong, 4 right
    after = np.array([[1, 2, 8, 9], [0, 6, 7, 8]])  # mended, missed, left; damaged, and mended
    got = repaired(before, after, truth)
    assert got[:5] == (4, 4, 3, 2, 1)
    assert [getattr(got, name).value for name in RATES] == [0.75, 0.5, 0.25]
    assert got.wrong_after.value == 3 / 8
    assert got.notes == {}
    counted = np.array([[True, True, False, True], [False, True, True, True]])
    some = repaired(before, after, truth, counted)
    assert some[:5] == (3, 3, 2, 2, 0)
    assert [getattr(some, name).value for name in RATES] == [2 / 3, 2 / 3, 0]
    assert some.damage.interval == (0, 0)  # of no event: no width


def test_rates_of_a_corrector_that_is_known():
    """Frequencies within four standard errors of the rates, which are those of the bootstrap."""
    before, after, truth = answers(np.random.default_rng(0), 400, 50)
    got = repaired(before, after, truth)
    for name, rate in zip(RATES, (TOUCH, RECOVER, DAMAGE), strict=True):
        found = getattr(got, name)
        trials = got.right if name == "damage" else got.wrong
        error = np.sqrt(rate * (1 - rate) / trials)
        assert abs(found.value - rate) < 4 * error
        np.testing.assert_allclose(found.standard_error, error, rtol=0.15)
    left = (got.wrong - got.recovered + got.damaged) / before.size
    np.testing.assert_allclose(got.wrong_after.value, left, rtol=1e-12)


def test_intervals_cover():
    """Of 60 sets of answers nearly all intervals hold the rate of the corrector."""
    held = dict.fromkeys(RATES, 0)
    for seed in range(60):
        got = repaired(*answers(np.random.default_rng(seed), 60, 40), num_resamples=300, seed=seed)
        for name, rate in zip(RATES, (TOUCH, RECOVER, DAMAGE), strict=True):
            low, high = getattr(got, name).interval
            held[name] += low <= rate <= high
    assert min(held.values()) >= 51, held


def test_rows_of_one_group_are_resampled_together():
    before, after, truth = answers(np.random.default_rng(3), 30, 20)
    alone = repaired(before, after, truth)
    copies = (np.repeat(a, 5, axis=0) for a in (before, after, truth))
    together = repaired(*copies, groups=np.repeat(np.arange(30) + 7, 5))
    assert together.touch.interval == pytest.approx(alone.touch.interval, rel=1e-12)
    assert together.wrong == 5 * alone.wrong
    assert repaired(before, after, truth, groups=np.zeros(30)).touch.interval is None


def test_the_seed_decides():
    sets = answers(np.random.default_rng(4), 20, 20)
    assert repaired(*sets, seed=1) == repaired(*sets, seed=1)
    assert repaired(*sets, seed=1).touch.interval != repaired(*sets, seed=2).touch.interval


@pytest.mark.parametrize(
    ("before", "null", "note"),
    [
        ([[1, 2], [3, 4]], ["touch", "recover"], "none of 4 positions was wrong before"),
        ([[2, 1], [4, 3]], ["damage"], "none of 4 positions was right before"),
    ],
)
def test_what_is_not_determined_is_none_with_a_note(before, null, note):
    truth = np.array([[1, 2], [3, 4]])
    got = repaired(np.array(before), truth, truth)
    assert [name for name in RATES if getattr(got, name) is None] == null
    assert sorted(got.notes) == sorted(null)
    assert all(words.startswith(note) for words in got.notes.values())
    figures = got.figures()
    assert json.loads(json.dumps(finite(figures), allow_nan=False))["notes"] == got.notes
    assert [figures[name] for name in null] == [None] * len(null)
    assert figures["wrong_after"] == 0


def test_bad_answers_are_refused():
    ids = np.zeros((2, 3), int)
    with pytest.raises(InputError, match=r"one shape .*: before \(2, 3\), after \(2, 2\)"):
        repaired(ids, ids[:, :2], ids)
    with pytest.raises(InputError, match="of one shape"):
        repaired(ids[0], ids[0], ids[0])
    with pytest.raises(InputError, match="no position is counted"):
        repaired(ids, ids, ids, np.zeros((2, 3), bool))
