"""Replays in the terminal: the samples that fit side by side, call by call.

Masks are blocks; what a call wrote is green, with what it replaced struck through in red; noise is
italic and given tokens are cyan. Other tokens are dim, plain or bold by their probability. Without
colours (NO_COLOR) all but green and cyan still show.
"""

import math
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gidd_jax.cli import printable
from gidd_jax.errors import InputError
from gidd_jax.sampling.trace import Played, Trace, play, shown

SECONDS = 10.0
MOST_FRAMES = 200
COLUMNS = 56  # of characters, at least, for a sample
MASK = "▒▒ "
DIM_BELOW, BOLD_FROM = 0.1, 0.6


def check_terminal(console: Console) -> None:
    """Raise InputError when the output is no terminal."""
    if not console.is_terminal:
        raise InputError("--watch needs a terminal: write a page with --replay or --out instead")


def watch(trace: Trace, console: Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """Play the first samples that fit side by side, in about ten seconds; Ctrl-C ends it."""
    count = max(1, min(len(trace.texts), console.width // COLUMNS))
    samples = [play(trace.changes, n) for n in range(count)]
    num_calls = int(trace.changes.num_calls[:count].max())
    step = math.ceil(num_calls / MOST_FRAMES)
    calls = [*range(0, num_calls, step), num_calls]
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            for call in calls:
                row = Table.grid(expand=True)
                for _ in samples:
                    row.add_column(ratio=1)
                row.add_row(*(panel(trace, n, played, call) for n, played in enumerate(samples)))
                live.update(row, refresh=True)
                sleep(SECONDS / len(calls))
    except KeyboardInterrupt:
        return


def panel(trace: Trace, sample: int, played: Played, call: int) -> Panel:
    """Return one sample after `call`, in a frame that counts the calls and the masks left."""
    call = min(call, len(played.ids) - 1)
    length = trace.lengths[sample]
    masks = np.sum(played.ids[call, :length] == trace.mask_id)
    title = f"sample {sample}, call {call} / {len(played.ids) - 1}, {masks} masks"
    text = written(trace, sample, played, call)
    return Panel(text, title=title, title_align="left", border_style="dim")


def written(trace: Trace, sample: int, played: Played, call: int) -> Text:
    """Return the text of one sample after `call`, what was just replaced struck through."""
    length, linger = trace.lengths[sample], math.ceil((len(played.ids) - 1) / 24)
    ids = played.ids[: call + 1, :length]
    changed = np.diff(ids, axis=0, prepend=ids[:1]) != 0
    since = np.max(np.where(changed, np.arange(call + 1)[:, None], 0), axis=0)
    texts = dict(zip(trace.token_ids.tolist(), trace.token_texts, strict=True))
    text = Text()
    for i, part in enumerate(shown([texts[token] for token in ids[call].tolist()])):
        fresh = since[i] > 0 and call - since[i] < linger
        old = int(ids[max(since[i] - 1, 0), i])
        if fresh and old != trace.mask_id:
            text.append(printable(shown([texts[old]])[0]), style="red strike")
        if ids[call, i] == trace.mask_id:
            text.append(MASK, style="dim")
            continue
        style = _confidence(played.log_probs[call, i])
        if since[i] == 0:
            style = "cyan" if trace.given[sample, i] else "italic yellow"
        elif fresh:
            style += " green"
        text.append(printable(part), style=style)
    return text


def _confidence(log_prob: float) -> str:
    prob = math.exp(log_prob)
    return "dim" if prob < DIM_BELOW else "bold" if prob >= BOLD_FROM else "not bold"
