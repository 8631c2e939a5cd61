"""Reports of figures: JSON that every reader takes, whatever the figures came to."""

import json
import math
from pathlib import Path
from typing import Any

from gidd_jax.checkpoints.storage import write_atomically

NOTES = "notes"


def finite(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report in which every figure that is not finite is None, with a note on it.

    Notes stand under `notes` of the dictionary that holds the figure, by its name: those that are
    there already, which know the cause, and for the rest what the figure came to.
    """
    notes = dict(report.get(NOTES, {}))
    result = {}
    for name, value in report.items():
        if name == NOTES:
            continue
        result[name], found = _finite(value)
        if found:
            notes.setdefault(name, f"not a finite number: {found}")
    return result | ({NOTES: notes} if notes else {})


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the finite form of a report as a JSON file; never half a file."""
    write_atomically(path, json.dumps(finite(report), indent=2, allow_nan=False) + "\n")


def written(value: float | None, digits: int) -> str:
    """Return a figure as people read it: `digits` after the point, as a power of ten where it is
    large, and a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.4g}"


def _finite(value: Any) -> tuple[Any, str | None]:
    """The value without numbers that are not finite, and the first of these."""
    if isinstance(value, dict):
        return finite(value), None
    if isinstance(value, list | tuple):
        parts = [_finite(part) for part in value]
        return [part for part, _ in parts], next((bad for _, bad in parts if bad), None)
    if isinstance(value, float) and not math.isfinite(value):
        return None, str(value)
    return value, None
