"""Figures of grids, puzzles and mended answers as text, one line for each."""

from collections.abc import Mapping, Sequence
from typing import Any

from gidd_jax.evaluation.reports import table, written

Figures = Sequence[Mapping[str, Any]]


def share(found: Mapping[str, Any], name: str) -> str:
    """Return a share with its interval, as `89 % (85 to 92)`."""
    value, interval = found[name], found[f"{name}_interval"]
    if value is None:
        return "-"
    if interval is None:
        return f"{100 * value:.1f} %"
    low, high = interval
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def grid_table(found: Figures) -> str:
    """Return a line for each method: what is valid of grids without givens."""
    lines = [["method", "valid", "calls", "after self_correct", "calls"]]
    for one in found:
        lines.append(
            [
                one["method"],
                share(one, "valid"),
                written(one["calls"], 0),
                share(one, "corrected_valid"),
                written(one["correction_calls"], 0),
            ]
        )
    return table(lines, num_names=1)


def puzzle_table(found: Figures) -> str:
    """Return a line for each method and number of givens: what is solved, and cells wrong."""
    names = ("solved", "cells wrong", "calls", "after self_correct", "cells wrong", "calls")
    lines = [["method", "givens", *names]]
    for one in found:
        lines.append(
            [
                one["method"],
                str(one["givens"]),
                share(one, "solved"),
                written(one["cells_wrong"], 2),
                written(one["calls"], 0),
                share(one, "corrected_solved"),
                written(one["corrected_cells_wrong"], 2),
                written(one["correction_calls"], 0),
            ]
        )
    return table(lines, num_names=1)


def mending_table(found: Figures) -> str:
    """Return a line for each method and way of mending: touch, recover and damage."""
    lines = [["method", "mended", "wrong cells", "touch", "recover", "damage"]]
    for one in found:
        rates = [share(one, name) for name in ("touch", "recover", "damage")]
        lines.append([one["method"], one["mended"], str(one["wrong"]), *rates])
    return table(lines, num_names=2)
