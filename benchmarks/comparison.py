"""One run of a suite: both sides in turn, the figures, and the line of results."""

import dataclasses
import datetime
import importlib
import json
from pathlib import Path
from typing import Any

from benchmarks.pair import Worker
from benchmarks.plan import (
    EAGER,
    OURS,
    Case,
    Ceilings,
    Check,
    Found,
    Measurement,
    measurement,
)
from benchmarks.tables import measurement_row

FORMAT = 1  # of a line of results


def exit_code(checks: list[Check]) -> int:
    """Return 1 where a target is missed, else 0; what was not measured is not missed."""
    return int(any(check.met is False for check in checks))


class Sides:
    """The workers, started when they are first needed."""

    def __init__(self, vs_torch: bool) -> None:
        self._vs_torch = vs_torch
        self._workers: dict[tuple[bool, int], Any] = {}

    def of(self, variant: str, virtual_devices: int = 1) -> Any:
        """Return the worker that runs a variant."""
        key = (variant == OURS, virtual_devices if variant == OURS else 1)
        if key not in self._workers:
            self._workers[key] = Worker(variant, key[1])
        return self._workers[key]

    def variants(self, case: Case) -> list[str]:
        """Return which variants of a case are measured."""
        return [v for v in case.variants if v == OURS or self._vs_torch]

    def ceilings(self, dtype: str) -> Ceilings:
        """Measure the ceilings; those of the faster side where there are two."""
        asked = [OURS, *([EAGER] if self._vs_torch else [])]
        found = [self.of(side).ask("ceilings", dtype) for side in asked]
        return Ceilings(max(c.matmul for c in found), max(c.copy for c in found))

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def run_suite(
    suite: str, scale: str, dtype: str, sides: Sides, ceilings: Ceilings, machine: dict[str, Any]
) -> dict[str, Any]:
    """Measure the cases of a suite and print them; return the line of results."""
    module = importlib.import_module(f"benchmarks.{suite}")
    print(f"\n== {suite} ==\n" + measurement_row(None), flush=True)
    found: list[Measurement] = []
    for case in module.cases(scale, dtype):
        for one in measure_case(suite, case, sides, ceilings):
            print(measurement_row(one), flush=True)
            found.append(one)
    checks = [] if scale == "small" else module.checks(scale, Found(found))
    return {
        "format": FORMAT,
        "suite": suite,
        "scale": scale,
        "dtype": dtype,
        "time": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine,
        "ceilings": dataclasses.asdict(ceilings),
        "measurements": [dataclasses.asdict(m) for m in found],
        "checks": [dataclasses.asdict(c) for c in checks],
    }


def measure_case(suite: str, case: Case, sides: Sides, ceilings: Ceilings) -> list[Measurement]:
    """Make the variants of a case, run them in turn, and return their figures."""
    variants = sides.variants(case)
    workers = {v: sides.of(v, case.virtual_devices) for v in variants}
    facts = {v: workers[v].ask("make", suite, case, v) for v in variants}
    seconds: dict[str, list[float]] = {v: [] for v in variants}
    peaks: dict[str, list[int]] = {v: [] for v in variants}
    for _ in range(case.rounds):
        for variant in variants:
            taken, peak = workers[variant].ask("time", variant)
            seconds[variant].append(taken)
            if peak is not None:
                peaks[variant].append(peak)
    for worker in workers.values():
        worker.ask("drop")
    return [
        measurement(case, v, seconds[v], max(peaks[v], default=None), facts[v], ceilings)
        for v in variants
    ]


def append(file: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, allow_nan=False) + "\n")
