"""The figures of scored corpora as text, one line for each."""

from collections.abc import Iterable, Sequence
from typing import Any

from gidd_jax.evaluation.reports import table, written

BOUNDS = (
    "data",
    "quantity",
    "documents",
    "tokens",
    "nats/token",
    "+-",
    "perplexity",
    "bits/byte",
    "reconstr.",
    "middle",
    "prior",
    "original ppl",
    "calls/token",
    "seconds",
)
ESTIMATES = (
    "data",
    "quantity",
    "documents",
    "tokens",
    "nats/token",
    "+-",
    "perplexity",
    "bits/byte",
    "calls/token",
    "seconds",
)
COMPARISONS = ("data", "difference, nats/token", "+-", "95% interval", "better documents")


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def bounds_table(results: Sequence[dict[str, Any]]) -> str:
    """Return the bound of each corpus with its terms, and below what it is."""
    lines: list[list[str]] = [list(BOUNDS)]
    for result in results:
        original = result.get("original", {})
        lines.append(
            [
                result["data"],
                result["quantity"],
                _count(result["documents"]),
                str(result["tokens"]),
                written(result["nelbo"], 4),
                written(result["nelbo_standard_error"], 4),
                written(result["perplexity"], 2),
                written(result["bits_per_byte"], 4),
                *(written(result.get(k), 4) for k in ("reconstruction", "middle", "prior")),
                written(original.get("perplexity"), 2),
                written(result["calls_per_token"], 3),
                written(result["seconds"], 1),
            ]
        )
    return "\n".join([table(lines, num_names=2), *_says(results)])


def _says(figures: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each quantity: what it is to log p."""
    return [
        f"{name}: {what}"
        for name, what in {one["quantity"]: one["says"] for one in figures}.items()
    ]


def estimates_table(results: Sequence[dict[str, Any]]) -> str:
    """Return the quantities of each corpus, and below what each of them is."""
    lines: list[list[str]] = [list(ESTIMATES)]
    for result in results:
        for figure in result["quantities"]:
            lines.append(
                [
                    result["data"],
                    figure["quantity"],
                    _count(result["documents"]),
                    str(result["tokens"]),
                    written(figure["nats_per_token"], 4),
                    written(figure["standard_error"], 4),
                    written(figure["perplexity"], 2),
                    written(figure["bits_per_byte"], 4),
                    written(figure["calls_per_token"], 2),
                    written(result["seconds"], 1),
                ]
            )
    figures = (figure for result in results for figure in result["quantities"])
    return "\n".join([table(lines, num_names=2), *_says(figures)])


def comparisons_table(results: Sequence[dict[str, Any]], other: str) -> str:
    """Return the difference of two models on each corpus; negative: the first is better."""
    lines: list[list[str]] = [list(COMPARISONS)]
    for result in results:
        found = result["against"]
        interval = found["difference_interval"] or (None, None)
        shown = "-" if None in interval else " to ".join(written(v, 4, "+") for v in interval)
        lines.append(
            [
                result["data"],
                written(found["difference"], 4, "+"),
                written(found["difference_standard_error"], 4),
                shown,
                f"{found['share_better']:.0%}",
            ]
        )
    return "\n".join([f"against {other}, negative is better than it:", table(lines, num_names=1)])
