"""Quality against diversity of a model's samples, over samplers, temperatures and numbers of steps.

Every point is drawn and judged once, and its figures are kept in a file of its own: the same
frontier started again goes on with those that are missing.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from gidd_jax.errors import InputError
from gidd_jax.evaluation.generated import figures
from gidd_jax.evaluation.reports import NOTES, finite, table, write_report, written
from gidd_jax.inference.gidd import Gidd
from gidd_jax.sampling.options import SamplerOptions, changed_options

POINTS = "points"  # folder of the files of points
AXES = {"temperature": "given by --temperatures", "num_steps": "given by --steps"}


class Point(NamedTuple):
    """One way of sampling: its name, the method as it was written, and its options."""

    name: str
    method: str
    options: SamplerOptions


def plan_points(
    methods: Mapping[str, SamplerOptions], temperatures: Sequence[float], steps: Sequence[int]
) -> list[Point]:
    """Return every combination; a method without steps (first_hitting) counts once."""
    points = {}
    for (method, options), temperature, count in itertools.product(
        methods.items(), temperatures, steps
    ):
        reads = options.method != "first_hitting"
        changes: dict[str, Any] = {"temperature": temperature}
        changes |= {"num_steps": count} if reads else {}
        name = f"{method}+temperature={temperature:g}" + (f"+num_steps={count}" if reads else "")
        points[name] = Point(name, method, changed_options(options, changes))
    return list(points.values())


def measure_point(
    model: Gidd,
    scorer: Any,
    point: Point,
    folder: Path,
    *,
    made_with: Mapping[str, Any],
    num_samples: int,
    batch_size: int,
    seed: int,
    num_resamples: int,
) -> dict[str, Any]:
    """Return the figures of a point; what is measured already is only read.

    made_with: what else the figures depend on, kept with them. Raises InputError when the folder
    holds a point that was made otherwise.
    """
    path = folder / POINTS / f"{quote(point.name, safe='+=')}.json"
    made = {**made_with, "num_samples": num_samples, "seed": seed}
    if path.is_file():
        known = json.loads(path.read_text("utf-8"))
        if known.get("made_with") != made:
            raise InputError(f"{path} was made with {known.get('made_with')}: name another folder")
        return known
    samples = model.generate(num_samples, batch_size=batch_size, seed=seed, options=point.options)
    found = figures(
        scorer,
        samples.texts,
        max_length=min(1024, scorer.max_length),
        batch_size=8,
        num_resamples=num_resamples,
        seed=seed,
        name=point.name,
    )
    batches = -(-num_samples // batch_size)
    result = {
        "name": point.name,
        "method": point.method,
        "temperature": point.options.temperature,
        "calls": samples.network_calls / batches,
        "made_with": made,
        **{key: value for key, value in found.items() if key != "num_samples"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, result)
    return finite(result)


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each point."""
    lines = [["method", "temperature", "calls", "gen-PPL", "95% interval", "entropy", "distinct-2"]]
    for one in results:
        interval = one["gen_ppl_interval"]
        shown = "-" if interval is None else "{:.1f} to {:.1f}".format(*interval)
        lines.append(
            [
                one["method"],
                f"{one['temperature']:g}",
                f"{one['calls']:.0f}",
                written(one["gen_ppl"], 1),
                shown,
                written(one["token_entropy"], 3),
                written(one["distinct_2"], 3),
            ]
        )
    return table(lines, num_names=1)


def columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point's figures for a line of CSV: numbers and names, no nested ones."""
    flat = {key: value for key, value in result.items() if key not in (NOTES, "made_with")}
    for key in ("gen_ppl_interval", "token_entropy_interval"):
        low, high = flat.pop(key) or (None, None)
        flat |= {f"{key}_low": low, f"{key}_high": high}
    return {key: value for key, value in flat.items() if not isinstance(value, list | dict)}
