"""Picture of a coordinate check: do activations and their changes keep as a network grows?"""

from collections.abc import Mapping
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure

from gidd_jax.evaluation.transfer import PARTS, Sizes
from gidd_jax.views.pictures import MARKERS, looks, style


def transfer_picture(report: Mapping[str, Any]) -> Figure:
    """Draw a report of `check --transfer`: a column for width and one for depth, a row a part.

    A look for each parametrization; both axes are logarithmic, so a law is a line.
    """
    sizes = [Sizes(**one) for one in report["networks"]]
    small = min(sizes, key=lambda one: (one.width, one.depth))
    with style():
        figure = Figure(figsize=(8, 2.6 * len(PARTS)), layout="constrained")
        axes = figure.subplots(len(PARTS), 2, sharex="col", sharey="row")
        for name, look, marker in zip(report["parametrizations"], looks(), MARKERS, strict=False):
            own = [one for one in sizes if one.parametrization == name]
            lines = {
                "width": [one for one in own if one.depth == small.depth],
                "depth": [one for one in own if one.width == small.width],
            }
            for row, part in zip(axes, PARTS, strict=True):
                for axis, (key, line) in zip(row, lines.items(), strict=True):
                    points = sorted((getattr(one, key), one.part(part)) for one in line)
                    axis.loglog(*zip(*points, strict=True), label=name, marker=marker, **look)
                    axis.set_xticks([x for x, _ in points])
                    axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
                    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
                    axis.set(title=PARTS[part])
        for axis, key in zip(axes[-1], ("width", "depth"), strict=True):
            axis.set_xlabel(key)
        for axis in axes[:, 0]:
            axis.set_ylabel("root mean square")
        axes[0, 0].legend()
    return figure
