"""Measure gidd_jax on this machine, against its limits and, if asked, a PyTorch twin.

Examples:
  python -m benchmarks.run --out=benchmarks.json
  python -m benchmarks.run --suite=loss --vs-torch --out=loss.json   # pip install -e '.[bench]'
  python -m benchmarks.run --small --results=outputs/bench            # does everything run?

Each case is warmed up, then timed five times; with --vs-torch in turn with the twin, eager and
compiled, which runs in a process of its own. The matmul and copy ceilings of the machine are
measured first, in the same run. Prints a table, and every target beside what was measured; the
exit code is 1 where one is missed, 0 where all that were measured are met. Appends one JSON line
per suite to RESULTS/SUITE.jsonl and draws RESULTS/SUITE.png; --out gets the same lines as a list.
Leave the machine alone meanwhile: ratios stand up to some noise, times do not.
"""

import importlib.util
import json
import sys
from pathlib import Path

from benchmarks.plan import OURS, Check
from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError

flags = CommandFlags()
SUITES = ("loss", "noising", "step", "sampler", "blocks", "data")

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
    from benchmarks.comparison import Sides, append, exit_code, run_suite
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


if __name__ == "__main__":
    run(main, flags)
