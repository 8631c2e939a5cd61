"""Reports of figures: JSON that every reader takes, whatever the figures came to; tables."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gidd_jax.checkpoints.storage import write_atomically
from gidd_jax.errors import InputError

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


def written(value: float | None, digits: int, sign: str = "-") -> str:
    """Return a figure as people read it: `digits` after the point, as a power of ten where it is
    large, and a dash where there is none. sign "+": with its sign where it is positive, too."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:{sign}.{digits}f}" if abs(value) < 1e6 else f"{value:{sign}.4g}"


def table(lines: Sequence[Sequence[str]], num_names: int = 0) -> str:
    """Return lines of cells as text: the first `num_names` columns begin on the left, the others
    end on the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust] * num_names + [str.rjust] * (len(widths) - num_names)
    return "\n".join(
        "  ".join(
            side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as CSV, with a column for everything that one of them holds."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def labels(paths: Sequence[str]) -> list[str]:
    """Return the last parts of paths that tell them apart; raises InputError for a path twice."""
    parts = [Path(path.removesuffix(".json")).absolute().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise InputError(f"{','.join(paths)}: name each only once")
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    raise AssertionError("different paths have different parts")


def load_profiles(path: str) -> dict[str, dict[str, Any]]:
    """Return the profile over t of each corpus by its name; raises InputError if there is none."""
    corpora = read_report(path).get("corpora", [])
    profiles = {
        f"{corpus['data']} ({corpus['split']})": corpus["profile"]
        for corpus in corpora
        if "profile" in corpus
    }
    if not profiles:
        raise InputError(
            f"{path} holds no profile over t: give what gidd_jax.evaluate --out wrote "
            "of a diffusion model"
        )
    return profiles


def load_samples(path: str) -> dict[str, Any]:
    """Return the figures of generated texts; raises InputError when a figure is missing."""
    report = read_report(path)
    for name in ("gen_ppl", "gen_ppl_interval", "token_entropy", "token_entropy_interval"):
        if name not in report or report[name.removesuffix("_interval")] is None:
            raise InputError(
                f"{path} holds no {name}: give what gidd_jax.generative_ppl --out wrote"
            )
    return report


def load_detection(path: str) -> list[dict[str, Any]]:
    """Return the figures of each share of wrong tokens; raises InputError if there are none."""
    figures = read_report(path).get("figures", [])
    if not figures:
        raise InputError(
            f"{path} holds no figures: give what gidd_jax.highlight --evaluate --out wrote"
        )
    return figures


def load_sampler_laws(path: str) -> dict[str, Any]:
    """Return what samplers draw; raises InputError when the file holds no such thing."""
    report = read_report(path)
    if not report.get("methods") or not {"process", "floor"} <= report.keys():
        raise InputError(
            f"{path} measures no samplers: give what gidd_jax.check --sampler --out wrote"
        )
    return report


def load_transfer(path: str) -> dict[str, Any]:
    """Return how activations go with size; raises InputError when the file holds no such thing."""
    report = read_report(path)
    if not report.get("networks") or not report.get("parametrizations"):
        raise InputError(
            f"{path} measures no transfer: give what gidd_jax.check --transfer --out wrote"
        )
    return report


def read_report(path: str) -> dict[str, Any]:
    """Return a report that a command wrote; raises InputError when the file holds none."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is no report: give a file that --out of a command wrote")
    return value


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
