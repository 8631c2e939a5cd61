"""Texts with their suspicious tokens marked: for the terminal, and as one self-contained page.

Without colours (NO_COLOR, no terminal) what is suspicious stands in brackets, with its probability.
"""

import html
import re
from importlib import resources

import numpy as np
from rich.console import Console
from rich.text import Text

from gidd_jax.cli import printable
from gidd_jax.evaluation.detection import JudgedText

MOST_LISTED = 50
FAINT = 0.1  # below it a token is shown as the others are


def suspicious(judged: JudgedText, threshold: float) -> list[int]:
    """Return the tokens of at least that probability, the worst first, at most 50."""
    order = np.argsort(-judged.wrong, kind="stable")
    return order[judged.wrong[order] >= threshold][:MOST_LISTED].tolist()


def summary(judged: JudgedText, threshold: float) -> str:
    """Return one line: how many tokens are suspicious, and how many are expected to be wrong."""
    count = int(np.sum(judged.wrong >= threshold))
    return (
        f"{count} of {len(judged.tokens)} tokens are wrong with probability {threshold:g} or more; "
        f"{judged.wrong.sum(dtype=np.float64):.1f} wrong ones are expected"
    )


def print_marked(judged: JudgedText, threshold: float, console: Console) -> None:
    """Print the text with its marks, and a list of what is suspicious."""
    colours = console.color_system is not None and not console.no_color
    text = Text()
    for token, wrong in zip(map(printable, judged.tokens), judged.wrong, strict=True):
        if wrong >= threshold and not colours:
            text.append(f"[{token} {percent(wrong)}]")
        else:
            style = "bold white on red" if wrong >= threshold else "yellow"
            text.append(token, style=style if wrong >= min(FAINT, threshold) else None)
    console.print(text, soft_wrap=True)
    lines = [
        f"{percent(judged.wrong[i]):>5}  token {i + 1}: {_quoted(judged.tokens[i])}, rather "
        f"{_quoted(judged.proposals[i])} ({percent(judged.proposal_probs[i])})"
        for i in suspicious(judged, threshold)
    ]
    console.print(Text("\n".join(["", *lines, summary(judged, threshold)])), soft_wrap=True)


def marked_page(judged: JudgedText, threshold: float, title: str) -> str:
    """Return the page: no script, nothing to fetch, and every text escaped."""
    template = (resources.files("gidd_jax") / "assets/highlight.html").read_text("utf-8")
    listed = "\n".join(
        f'<tr><td class="number">{percent(judged.wrong[i])}</td><td><a href="#t{i + 1}">{i + 1}</a>'
        f"</td><td><code>{_escaped(_quoted(judged.tokens[i]))}</code></td><td><code>"
        f"{_escaped(_quoted(judged.proposals[i]))}</code></td>"
        f'<td class="number">{percent(judged.proposal_probs[i])}</td></tr>'
        for i in suspicious(judged, threshold)
    )
    values = {
        "title": _escaped(title),
        "summary": _escaped(summary(judged, threshold)),
        "text": "".join(_marked(judged, i, threshold) for i in range(len(judged.tokens))),
        "rows": listed,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def percent(probability: float | np.floating) -> str:
    """Return a probability as a whole percentage; 100% and 0% are said of nothing uncertain."""
    if 0.995 <= probability < 1:
        return ">99%"
    return "<1%" if 0 < probability < 0.005 else f"{probability:.0%}"


def _marked(judged: JudgedText, i: int, threshold: float) -> str:
    token, wrong = _escaped(judged.tokens[i]), judged.wrong[i]
    if wrong < min(FAINT, threshold):
        return token
    note = f"wrong: {percent(wrong)}; rather {_quoted(judged.proposals[i])}"
    note += f" ({percent(judged.proposal_probs[i])})"
    kind = ' class="sure"' if wrong >= threshold else ""
    # A line break alone would be an empty mark.
    token = token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n") or "\u2205"
    style = f"--p:{wrong:.2f}"
    return f'<mark id="t{i + 1}"{kind} style="{style}" title="{_escaped(note)}">{token}</mark>'


def _quoted(token: str) -> str:
    """Return what a token writes, with its blanks, on one line."""
    return f"“{printable(token)}”".replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")


def _escaped(text: str) -> str:
    return html.escape(printable(text))
