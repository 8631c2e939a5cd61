"""Replays of traces: one HTML page that plays how texts came about, with nothing to fetch or build.

The page (assets/replay.html) holds the trace as JSON, changes only: `tokens` (K texts, with lone
surrogates for the bytes of incomplete characters), the index of `mask` and of `special` ones, and
for each of `samples` the indices at the `start`, the positions that were `given`, the number of
changes of each call (`counts`), their `positions`, `tokens` and probabilities (`percents`), and
the final `text`; `columns` where tokens stand in a grid, and after how many rows and columns a line
is drawn there (`box`). `PAGE#call=40` opens at call 40.
"""

import html
import itertools
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.sampling.trace import Trace, save_trace


class Grid(NamedTuple):
    """Sequences as rows of so many columns, with a line after each `box` of rows and columns."""

    columns: int
    box: tuple[int, int] | None = None


def parse_grid(columns: int, box: str | None) -> Grid:
    """Return a grid of columns and a box written as ROWSxCOLUMNS; raises InputError for others."""
    if box is None:
        return Grid(columns)
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", box)
    if found is None or int(found[2]) > columns:
        raise InputError(
            f"--box={box}: must be ROWSxCOLUMNS, as in 3x3, with at most --columns={columns}"
        )
    return Grid(columns, (int(found[1]), int(found[2])))


def write_replay(path: str | Path, trace: Trace, title: str, grid: Grid | None = None) -> None:
    """Write the page that plays a trace, as text or in a grid; never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(replay_page(trace, title, grid), "utf-8")
    os.replace(part, path)


def write_files(trace: Trace, file: Path | None, page: Path | None, title: str) -> list[Path]:
    """Write the file of a trace and the page that plays it, where asked for; return the paths."""
    if file is not None:
        save_trace(file, trace)
    if page is not None:
        write_replay(page, trace, title)
    return [path for path in (file, page) if path is not None]


def replay_page(trace: Trace, title: str, grid: Grid | None = None) -> str:
    """Return the page. Texts are data: no token ends the script, and the page makes none markup."""
    template = (resources.files("gidd_jax") / "assets/replay.html").read_text("utf-8")
    data = json.dumps(page_data(trace, grid), separators=(",", ":"))
    data = data.replace("<", r"\u003c")  # else "</script>" in a text would end the data
    values = {"title": html.escape(title), "trace": data}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def page_data(trace: Trace, grid: Grid | None = None) -> dict[str, Any]:
    """Return what the page holds, ready for JSON."""

    def index(ids: np.ndarray | list[int]) -> list[int]:
        return np.searchsorted(trace.token_ids, ids).tolist()

    changes, samples = trace.changes, []
    percents = np.rint(100 * np.exp(changes.log_prob)).astype(int)
    ends = np.searchsorted(changes.sample, np.arange(len(trace.texts) + 1))
    for n, (low, high) in enumerate(itertools.pairwise(ends)):
        num_calls, length = changes.num_calls[n], trace.lengths[n]
        samples.append(
            {
                "start": index(changes.start[n, :length]),
                "given": np.flatnonzero(trace.given[n, :length]).tolist(),
                "counts": np.bincount(changes.call[low:high], minlength=num_calls + 1)[1:].tolist(),
                "positions": changes.position[low:high].tolist(),
                "tokens": index(changes.token[low:high]),
                "percents": percents[low:high].tolist(),
                "text": trace.texts[n],
            }
        )
    special = trace.special_ids[np.isin(trace.special_ids, trace.token_ids)]
    return {
        "tokens": trace.token_texts,
        "mask": index([trace.mask_id])[0],
        "special": index(special),
        "samples": samples,
        **({} if grid is None else {"columns": grid.columns, "box": grid.box}),
    }
