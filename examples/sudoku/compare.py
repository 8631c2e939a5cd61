"""Put reports of solve.py side by side: runs of one process are averaged over their seeds.

Examples:
  python examples/sudoku/compare.py --reports=p0.json,p0.2.json
  python examples/sudoku/compare.py --reports='outputs/sudoku/6/*.json' --out=table.txt

Shares in percent, mean and standard deviation over the runs of a process. All reports must be of
the same size of grid; what they mean is said by solve.py --help.
"""

import glob
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError

flags = CommandFlags()
REPORTS = flags.DEFINE_list("reports", None, "Reports, separated by commas; or a pattern.")
OUT = flags.DEFINE_string("out", None, "File to write the tables to, too.")
AFTER = "after self_correct"
PARTS = {  # of a report: what makes a line, its figures, their titles
    "grids": (("process", "method"), ("valid", "corrected_valid"), ("runs", "valid %", AFTER)),
    "solved": (
        ("process", "method", "givens"),
        ("solved", "corrected_solved"),
        ("solved %", AFTER),
    ),
    "mending": (
        ("process", "method", "mended"),
        ("touch", "recover", "damage"),
        ("touch %", "recover %", "damage %"),
    ),
}


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.checkpoints.storage import write_atomically

    words = REPORTS.value or []
    found = [Path(file) for word in words for file in sorted(glob.glob(word)) or [word]]
    text = compared(found)
    print(text)
    if OUT.value:
        write_atomically(Path(OUT.value), text + "\n")


def compared(paths: Sequence[Path]) -> str:
    """Return tables of grids, puzzles and mending; raises InputError for what is no report."""
    from gidd_jax.evaluation.reports import table

    if not paths:
        raise InputError("--reports is empty: give some files that solve.py --out wrote")
    reports = [_read(path) for path in paths]
    sizes = sorted({report["size"] for report in reports})
    if len(sizes) > 1:
        raise InputError(f"--reports: grids of sizes {', '.join(map(str, sizes))}: give one size")
    texts = []
    for part, (keys, shares, titles) in PARTS.items():
        rows = [{"process": one["process"], **row} for one in reports for row in one[part]]
        lines = [[*keys, *titles]]
        for values, members in _groups(rows, keys):
            runs = [str(len(members))] if "runs" in titles else []
            lines.append([*values, *runs, *(_mean(members, share) for share in shares)])
        if len(lines) > 1:
            texts.append(f"{part}\n{table(lines, num_names=len(keys))}")
    return "\n\n".join(texts)


def _read(path: Path) -> dict[str, Any]:
    from gidd_jax.evaluation.reports import read_report

    found = read_report(str(path))
    if not {"process", "size", "grids", "solved", "mending"} <= found.keys():
        raise InputError(f"{path} is no report of solve.py: write one with its --out")
    return found


def _groups(
    rows: Iterable[Mapping[str, Any]], keys: Sequence[str]
) -> list[tuple[tuple[str, ...], list[Mapping[str, Any]]]]:
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    return list(found.items())


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    import numpy as np

    values = 100 * np.array([row[name] for row in rows if row[name] is not None], float)
    if not len(values):
        return "-"
    spread = f" +- {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


if __name__ == "__main__":
    run(main, flags)
