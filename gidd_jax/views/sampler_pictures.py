"""Pictures of samplers: how far from an exact model they are, and the frontier of a real one."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
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


def samples_picture(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], calls: Sequence[int]
) -> Figure:
    """Draw what generated rows of a sweep are worth under the truth, over network calls.

    A colour for each value of the first key, a line of panels for each combination of the others,
    means over seeds; dashed is after self-correction.
    """
    first, *others = [key for key in keys if key != "seed"] or ["seed"]
    groups = dict.fromkeys(tuple(row[key] for key in others) for row in rows)
    values = list(dict.fromkeys(row[first] for row in rows))
    shown = (
        ("surprise", "-log p less the entropy, nats a token"),
        ("bigrams", "total variation of neighbours"),
    )
    with style():
        figure = Figure(figsize=(11, 3.4 * len(groups)), layout="constrained")
        axes = figure.subplots(len(groups), 2, sharex=True, sharey="col", squeeze=False)
        for group, pair in zip(groups, axes, strict=True):
            here = [row for row in rows if tuple(row[key] for key in others) == group]
            for axis, (name, label) in zip(pair, shown, strict=True):
                for value, (look, marker) in zip(values, _marked(), strict=False):
                    own = [row for row in here if row[first] == value]
                    for prefix, dashes in (("", "-"), ("corrected_", "--")):
                        means = [
                            np.mean([row[f"{prefix}{name}_{n}"] for row in own]) for n in calls
                        ]
                        drawn = {"color": look["color"], "marker": marker, "markersize": 4}
                        title = None if prefix else f"{first} = {value}"
                        axis.plot(calls, means, linestyle=dashes, label=title, **drawn)
                axis.set_xscale("log")
                axis.set_xticks(calls, [str(n) for n in calls])
                axis.xaxis.set_minor_locator(ticker.NullLocator())
                words = ", ".join(f"{k} = {v}" for k, v in zip(others, group, strict=True))
                axis.set(xlabel="network calls", ylabel=label, title=words)
            pair[0].axhline(0, color="grey", linestyle=":", label="exact draws")
            pair[1].axhline(rows[0]["bigrams_floor"], color="grey", linestyle=":")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", title="dashed: corrected")
    return figure


def _marked() -> Iterator[tuple[dict[str, Any], str]]:
    return zip(looks(), itertools.cycle(MARKERS), strict=False)
