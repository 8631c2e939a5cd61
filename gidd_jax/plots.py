"""Pictures of a run, drawn from the figures that it wrote."""

import json
from pathlib import Path
from typing import Any

from gidd_jax.errors import InputError


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return the lines of WORKDIR/metrics.jsonl; raises InputError when there is no such file."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{workdir} holds no metrics.jsonl: give the workdir of a training run")
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_loss(workdir: Path) -> Path:
    """Draw training loss and validation bits per byte over the steps to WORKDIR/loss.png."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = read_metrics(workdir)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = ((left, "train/loss", "training loss"), (right, "eval/bits_per_byte", "bits per byte"))
    for axis, name, label in panels:
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    left.set_title("training loss")
    right.set_title("validation bound")
    path = workdir / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
