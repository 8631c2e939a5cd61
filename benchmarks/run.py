"""Measure gidd_jax on this machine, against its limits and, if asked, a PyTorch twin.

Examples:
  python -m benchmarks.run --out=benchmarks.json
  python -m benchmarks.run --suite=loss --vs-torch --out=loss.json   # pip install -e '.[bench]'
  python -m benchmarks.run --small --results=/tmp/results            # does everything run?

Each case is warmed up, then timed five times; with --vs-torch in turn with the twin, eager and
compiled, which runs in a process of its own. The matmul and copy ceilings of the machine are
measured first, in the same run. Prints a table, and every target beside what was measured; the
exit code is 1 where one is missed, 0 where all that were measured are met. Appends one JSON line
per suite to RESULTS/SUITE.jsonl and draws RESULTS/SUITE.png; --out gets the same lines as a list.
Leave the machine alone meanwhile: ratios stand up to some noise, times do not.
"""

import dataclasses
import datetime
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.plan import OURS, ROUNDS, Case, Ceilings, Check, Found, Measurement, measurement
from gidd_jax.cli import run
from gidd_jax.errors import InputError

SUITES = ("loss", "noising", "step", "sampler", "data")
FORMAT = 1  # of a line of results

SUITE = flags.DEFINE_enum("suite", "all", [*SUITES, "all"], "What to measure.")
VS_TORCH = flags.DEFINE_bool(
    "vs-torch", False, "Measure the PyTorch twin too; targets are ratios to it."
)
SMALL = flags.DEFINE_bool("small", False, "Small sizes, without targets: to try it out.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the networks. Default: bfloat16 on GPU and TPU."
)
OUT = flags.DEFINE_string("out", None, "File to write, ending in .json.")
RESULTS = flags.DEFINE_string("results", "benchmarks/results", "Folder to append results to.")


def main(argv: list[str]) -> None:
    del argv
    if VS_TORCH.value and importlib.util.find_spec("torch") is None:
        raise InputError("--vs-torch needs PyTorch: pip install -e '.[bench]'")
    if OUT.value and Path(OUT.value).suffix != ".json":
        raise InputError(f"--out must end in .json: {OUT.value}")
    from benchmarks.measure import host
    from benchmarks.plots import plot
    from benchmarks.tables import check_table

    machine, sides, lines = host(), Sides(VS_TORCH.value), []
    if machine["load_before"] > 0.5:
        print(f"warning: other work runs here, load {machine['load_before']}", file=sys.stderr)
    try:
        platform, machine["device"] = sides.of(OURS).ask("device")
        dtype = DTYPE.value or ("float32" if platform == "cpu" else "bfloat16")
        ceilings = sides.ceilings(dtype)
        print(f"{machine['device']}: {ceilings.matmul:.3g} FLOP/s {dtype} {ceilings.copy:.3g} B/s")
        scale = "small" if SMALL.value else "cpu" if platform == "cpu" else "gpu"
        for suite in SUITES if SUITE.value == "all" else (SUITE.value,):
            lines.append(run_suite(suite, scale, dtype, sides, ceilings, machine))
            folder = Path(RESULTS.value)
            append(folder / f"{suite}.jsonl", lines[-1])
            plot(lines[-1], folder / f"{suite}.png")
    finally:
        sides.close()
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(lines, indent=1) + "\n")
    checks = [Check(**check) for line in lines for check in line["checks"]]
    print("\n" + check_table(checks))
    sys.exit(exit_code(checks))


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
        from benchmarks.pair import Worker

        key = (variant == OURS, virtual_devices if variant == OURS else 1)
        if key not in self._workers:
            self._workers[key] = Worker(variant, key[1])
        return self._workers[key]

    def variants(self, case: Case) -> list[str]:
        """Return which variants of a case are measured."""
        return [v for v in case.variants if v == OURS or self._vs_torch]

    def ceilings(self, dtype: str) -> Ceilings:
        """Measure the ceilings; those of the faster side where there are two."""
        asked = [OURS, *(["eager"] if self._vs_torch else [])]
        found = [self.of(side).ask("ceilings", dtype) for side in asked]
        return Ceilings(max(c.matmul for c in found), max(c.copy for c in found))

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def run_suite(
    suite: str, scale: str, dtype: str, sides: Sides, ceilings: Ceilings, machine: dict[str, Any]
) -> dict[str, Any]:
    """Measure the cases of a suite and print them; return the line of results."""
    from benchmarks.tables import measurement_row

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
    for _ in range(ROUNDS):
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


if __name__ == "__main__":
    run(main)
