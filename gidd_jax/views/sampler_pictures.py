"""Pictures of samplers: how far from an exact model they are, and the frontier of a real one."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure

from gidd_jax.views.pictures import MARKERS, error_bar, looks, style


def sampler_picture(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw total variation against network calls, a panel for each report of `check --sampler`.

    A method keeps its look in all panels; one that takes a single number of calls is a point.
    """
    names = dict.fromkeys(name for report in reports.values() for name in report["methods"])
    marked = dict(zip(names, zip(looks(), itertools.cycle(MARKERS), strict=False), strict=False))
    with style():
        columns = min(2, len(reports))
        height = -(-len(reports) // columns)
        figure = Figure(figsize=(4.6 * columns + 3, 3.6 * height), layout="constrained")
        axes = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
        for axis, (title, report) in zip(axes.flat, reports.items(), strict=False):
            last = max(report["methods"].values(), key=lambda found: found["laws"][-1]["calls"])
            for name, found in report["methods"].items():
                calls, distances = zip(
                    *((law["calls"], law["total_variation"]) for law in found["laws"]), strict=True
                )
                look, marker = marked[name]
                axis.loglog(calls, distances, marker=marker, markersize=4, label=name, **look)
            axis.axhline(report["floor"], color="grey", linestyle=":", label="exact draws")
            axis.set(title=title)
            axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.set_xticks(sorted({law["calls"] for law in last["laws"]}))
            axis.set(xlabel="network calls", ylabel="total variation")
        handles = {}
        for axis in axes.flat:
            handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def frontier_picture(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw generative perplexity against entropy and against calls, a look for each method."""
    names = dict.fromkeys(one["method"] for one in results)
    with style():
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        by_entropy, by_calls = figure.subplots(1, 2, sharey=True)
        for name, (look, marker) in zip(names, _marked(), strict=False):
            own = [one for one in results if one["method"] == name and one["gen_ppl"] is not None]
            for one in own:
                errors = {"yerr": error_bar(one, "gen_ppl"), "capsize": 2, "linestyle": ""}
                drawn = {"color": look["color"], "marker": marker, "markersize": 4, **errors}
                by_entropy.errorbar(
                    one["token_entropy"],
                    one["gen_ppl"],
                    xerr=error_bar(one, "token_entropy"),
                    **drawn,
                )
                by_calls.errorbar(one["calls"], one["gen_ppl"], **drawn)
            by_entropy.plot([], [], color=look["color"], marker=marker, linestyle="", label=name)
        by_entropy.set(xlabel="token entropy within a sample, nats", ylabel="generative perplexity")
        by_calls.set(xlabel="network calls")
        by_calls.set_xscale("log")
        by_entropy.set_yscale("log")
        figure.legend(loc="outside right upper")
    return figure


def _marked() -> Iterator[tuple[dict[str, Any], str]]:
    return zip(looks(), itertools.cycle(MARKERS), strict=False)
