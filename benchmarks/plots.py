"""Results as plots."""

from pathlib import Path
from typing import Any

from benchmarks.plan import OURS
from benchmarks.tables import describe, series


def plot(line: dict[str, Any], path: Path) -> None:
    """Draw a suite: times of the compared variants beside the series over sizes, as PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    measurements, curves = line["measurements"], series(line["measurements"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    cases = [one["case"] for one in measurements if not one["sweep"] and one["variant"] == OURS]
    variants = list(dict.fromkeys(one["variant"] for one in measurements))
    for offset, variant in enumerate(variants):
        of = {one["case"]: one["seconds"] for one in measurements if one["variant"] == variant}
        drawn = [(i, of[case]) for i, case in enumerate(cases) if case in of]
        left.barh([i + 0.25 * offset for i, _ in drawn], [s for _, s in drawn], 0.25, label=variant)
    left.set_yticks(range(len(cases)), cases)
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlabel("seconds")
    left.legend()
    for name, points in curves.items():
        right.plot(*zip(*points, strict=True), marker="o", label=name)
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set_xlabel("size")
    right.set_ylabel("seconds")
    right.grid(alpha=0.3)
    if curves:
        right.legend()
    figure.suptitle(f"{line['suite']}: {describe(line)}", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
