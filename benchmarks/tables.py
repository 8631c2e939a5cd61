"""Results as tables: of the terminal, and of Markdown. Lines of results as run.py writes them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.plan import OURS, Check, Measurement
from gidd_jax.errors import InputError

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
COLUMNS = (
    "case",
    "variant",
    "time",
    "tokens/s",
    "peak memory",
    "XLA's",
    "matmul",
    "copy",
    "roofline",
    "compile",
)


def newest_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the last line of every suite and machine.

    Trials with small sizes do not count, nor do estimates for chips that are not here (tpu.jsonl).
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for text in file.read_text("utf-8").splitlines():
            line = json.loads(text)
            if "suite" in line and line["scale"] != "small":
                machine = line["machine"]
                found[line["suite"], machine["cpu"], machine["device"], line["dtype"]] = line
    if not found:
        raise InputError(f"--results={folder}: no results there; run python -m benchmarks.run")
    return list(found.values())


def replace_marked(text: str, tables: str) -> str:
    """Put the tables between the marks; raises InputError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"the document has no lines {BEGIN} and {END}: put them in")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def markdown(lines: list[dict[str, Any]]) -> str:
    """Return the tables of targets and of measurements for each machine."""
    parts = []
    machines: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        machines.setdefault(describe(line), []).append(line)
    for description, group in machines.items():
        parts.append(f"### {description}")
        checks = [Check(**check) for line in group for check in line["checks"]]
        parts.append(check_table(checks, markdown=True))
        for line in group:
            made = f"Suite {line['suite']}, {line['time'][:10]}; ceilings "
            parts.append(made + ceiling_words(line["ceilings"]) + ":")
            rows = [columns_of(one) for one in line["measurements"]]
            parts.append(_markdown_table(COLUMNS, rows))
            growth = growth_words(line["measurements"])
            if growth:
                parts.append("Growth of the time: " + "; ".join(growth) + ".")
    return "\n\n".join(parts)


def describe(line: dict[str, Any]) -> str:
    """Return the machine and software in one line."""
    machine = line["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if k != "jaxlib")
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    cpu = f"{machine['cpu']}, {machine['cores']} cores"
    return f"{device}{cpu}, {line['dtype']} ({versions})"


def ceiling_words(ceilings: dict[str, float]) -> str:
    return f"{ceilings['matmul'] / 1e9:,.0f} GFLOP/s and {ceilings['copy'] / 1e9:,.1f} GB/s"


def check_table(checks: list[Check], markdown: bool = False) -> str:
    """Return the targets beside what was measured, one a line."""
    headers = ("target", "asked", "measured", "met")
    words = {True: "yes", False: "NO", None: "-"}
    rows = []
    for check in checks:
        sign = "<=" if check.at_most else ">="
        asked = "-" if check.bound is None else f"{sign} {check.bound:,.3g}"
        measured = "-" if check.measured is None else f"{check.measured:,.3g}"
        rows.append([check.name, asked, measured, words[check.met]])
    return _markdown_table(headers, rows) if markdown else _aligned(headers, rows)


def columns_of(one: dict[str, Any]) -> list[str]:
    """Return a measurement, a mapping, as the words of its columns."""
    facts = one["facts"]
    compile_seconds = facts.get("compile_seconds")
    return [
        one["case"],
        one["variant"],
        seconds_words(one["seconds"]),
        f"{one['tokens_per_second']:,.0f}",
        bytes_words(one["peak_bytes"]),
        bytes_words(facts.get("xla_temp_bytes")),
        f"{one['matmul_fraction']:.0%}" if one["flops"] else "-",
        f"{one['copy_fraction']:.1%}" if one["bytes_moved"] else "-",
        f"{one['roofline_fraction']:.0%}" if one["flops"] else "-",
        "-" if compile_seconds is None else f"{compile_seconds:.1f} s",
    ]


def measurement_row(one: Measurement | None) -> str:
    """Return a Measurement (None: the headers) as a line of text in columns."""
    words = COLUMNS if one is None else columns_of(dataclasses.asdict(one))
    return f"{words[0]:<44}{words[1]:<10}" + "".join(f"{word:>13}" for word in words[2:])


def seconds_words(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def bytes_words(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f} MB"


def series(measurements: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return points (size, seconds) of every series, by what varies and the kind of the case."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in measurements:
        if one["sweep"] and one["variant"] == OURS:
            name = f"{one['kind']} by {one['sweep']}"
            found.setdefault(name, []).append((one["shape"][one["sweep"]], one["seconds"]))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def growth_words(measurements: list[dict[str, Any]]) -> list[str]:
    """Return for every series by what factor the time grows as the size does, first to last."""
    words = []
    for name, points in series(measurements).items():
        (first, fast), (last, slow) = points[0], points[-1]
        words.append(f"{name} x{last / first:.3g}: x{slow / fast:.3g}")
    return words


def _markdown_table(headers: tuple[str, ...], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(headers), rule, *rows])


def _aligned(headers: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(headers), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )
