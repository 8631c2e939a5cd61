"""How a first answer with errors is mended: three rates, which together say what a corrector does.

    touch    P(changed | wrong before)        does it find the errors,
    recover  P(right after | wrong before)    does it know what belongs there,
    damage   P(changed | right before)        and does it leave alone what was right?

They hold for any answer whose truth is known, position by position: text with planted errors, and
puzzles. Rows are what the bootstrap resamples, or groups of rows that depend on each other.
"""

from typing import Any, NamedTuple

import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.evaluation.reports import NOTES
from gidd_jax.evaluation.text_metrics import Estimate, ratio_estimate

RATES = ("touch", "recover", "damage")


class Repairs(NamedTuple):
    """Counts of positions, and rates with standard errors and 95% intervals.

    wrong, right: before; touched, recovered: of the wrong ones; damaged: of the right ones. touch
    and recover are None where nothing was wrong, damage where nothing was right (`notes` says
    which); wrong_after: the share of all counted positions that is wrong afterwards. An interval is
    None for one row or group, and of no width where the resampled rows agree, as with no event at
    all.
    """

    wrong: int
    right: int
    touched: int
    recovered: int
    damaged: int
    touch: Estimate | None
    recover: Estimate | None
    damage: Estimate | None
    wrong_after: Estimate

    @property
    def notes(self) -> dict[str, str]:
        """Why rates are None, by their names."""
        notes = {}
        if not self.wrong:
            cause = f"none of {self.right} positions was wrong before: there is nothing to mend"
            notes |= dict.fromkeys(("touch", "recover"), cause)
        if not self.right:
            notes["damage"] = (
                f"none of {self.wrong} positions was right before: none can be damaged"
            )
        return notes

    def figures(self) -> dict[str, Any]:
        """Return the counts and rates ready for JSON, with the notes where there are some."""
        found: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("wrong", "right", "touched", "recovered", "damaged")
        }
        for name in (*RATES, "wrong_after"):
            value, error, interval = getattr(self, name) or (None, None, None)
            found |= {name: value, f"{name}_standard_error": error, f"{name}_interval": interval}
        return found | ({NOTES: self.notes} if self.notes else {})


def repaired(
    before: np.ndarray,
    after: np.ndarray,
    truth: np.ndarray,
    counted: np.ndarray | None = None,
    *,
    groups: np.ndarray | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Repairs:
    """Return how answers int [N, L] were mended, at the positions counted bool [N, L] (None: all).

    groups int [N]: rows of one number are resampled together; None: each row alone. Raises
    InputError when shapes differ or no position is counted.
    """
    before, after, truth = (np.asarray(a) for a in (before, after, truth))
    counted = np.ones(before.shape, bool) if counted is None else np.asarray(counted, bool)
    shapes = {"before": before, "after": after, "truth": truth, "counted": counted}
    if before.ndim != 2 or len({a.shape for a in shapes.values()}) > 1:
        words = ", ".join(f"{name} {a.shape}" for name, a in shapes.items())
        raise InputError(f"answers must be of one shape [rows, positions]: {words}")
    if not counted.any():
        raise InputError("no position is counted: give answers with at least one that counts")
    wrong, changed, right_after = before != truth, before != after, after == truth
    events = {
        "wrong": wrong,
        "right": ~wrong,
        "touched": wrong & changed,
        "recovered": wrong & right_after,
        "damaged": ~wrong & changed,
        "wrong_after": ~right_after,
        "counted": counted,
    }
    numbers = (
        np.arange(len(before)) if groups is None else np.unique(groups, return_inverse=True)[1]
    )
    sums = {
        name: np.bincount(numbers, np.sum(event & counted, axis=-1))
        for name, event in events.items()
    }

    def rate(event: str, among: str) -> Estimate:
        return ratio_estimate(sums[event], sums[among], num_resamples, seed)

    counts = {name: int(sums[name].sum()) for name in ("wrong", "right", "touched", "recovered")}
    return Repairs(
        **counts,
        damaged=int(sums["damaged"].sum()),
        touch=rate("touched", "wrong") if counts["wrong"] else None,
        recover=rate("recovered", "wrong") if counts["wrong"] else None,
        damage=rate("damaged", "right") if counts["right"] else None,
        wrong_after=rate("wrong_after", "counted"),
    )
