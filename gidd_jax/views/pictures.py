"""Pictures of runs, processes and judgements: pure functions from figures to a matplotlib Figure.

Colours are Petroff's (arXiv 2107.02270), which people with any colour vision tell apart; line
styles say the same a second time.
"""

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gidd_jax.checkpoints.workdir import CONFIG_FILE, recorded_process
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.own_process import Consent, recorded_source
from gidd_jax.process import InterpolatingProcess
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_process

Metrics = Sequence[Mapping[str, Any]]

FORMATS = ("png", "svg")
COLOURS = matplotlib.color_sequences["petroff10"]
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
PANELS = (  # of the training curves, row by row: key, title, unit, whether logarithmic
    ("train/loss", "Training loss", "nats per token, weighted", False),
    ("train/kl", "KL part, unweighted", "nats per token", True),
    ("train/is_div", "IS part, unweighted", "nats per token", True),
    ("train/elbo", "ELBO on training text", "nats per token", False),
    ("eval/nelbo", "Validation bound", "nats per token", False),
    ("eval/bits_per_byte", "Validation bound", "bits per byte", False),
    ("train/learning_rate", "Learning rate", "", False),
    ("train/grad_norm", "Gradient norm", "", True),
    ("train/tokens_per_second", "Speed", "tokens per second", False),
)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return the lines of WORKDIR/metrics.jsonl; raises InputError when it holds no metrics."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{workdir} holds no metrics.jsonl: give the workdir of a training run")
    lines = []
    for text in path.read_text("utf-8").splitlines():
        # A run that is at work, or was killed, may leave half a line at the end.
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    if not lines:
        raise InputError(f"{path} is empty: a run writes its first line after logging.every steps")
    return lines


def read_process(workdir: Path, consent: Consent) -> tuple[Settings, InterpolatingProcess | None]:
    """Return a run's settings and its process (None: autoregressive) from what it left to read.

    Raises InputError when the folder holds no settings.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{workdir} holds no {CONFIG_FILE}: give the workdir of a training run")
    try:
        settings = Settings.from_saved(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    tokenizer = load_tokenizer(workdir / "tokenizer")
    own = recorded_source(settings.process, workdir, lambda: recorded_process(workdir), consent)
    process = build_process(settings.process, tokenizer.vocab_size, tokenizer.mask_id, own)
    return settings, process


def run_pictures(
    workdir: Path, *, allow_code: bool = False, process: str | None = None
) -> dict[str, Figure]:
    """Return a run's pictures by name: its curves and, of diffusion models, its process.

    allow_code, process: as for `load_pretrained`.
    """
    pictures = {"training": training_curves({workdir.name: read_metrics(workdir)})}
    settings, drawn = read_process(workdir, Consent(allow_code, process))
    if drawn is not None:
        train = settings.train
        pictures["process"] = process_picture(
            drawn, train.weighting, train.min_weight, train.max_weight
        )
    return pictures


def training_curves(runs: Mapping[str, Metrics]) -> Figure:
    """Draw what runs logged over their steps, a colour a run: losses, bounds, rate, norm, speed."""
    with style():
        figure = Figure(figsize=(12, 9), layout="constrained")
        axes = figure.subplots(3, 3, sharex=True)
        for axis, (key, title, unit, logarithmic) in zip(axes.flat, PANELS, strict=True):
            axis.set(title=title, ylabel=unit)
            marked = zip(looks(), itertools.cycle(MARKERS), strict=True)
            for (label, lines), (look, marker) in zip(runs.items(), marked, strict=False):
                points = _points(lines, key)
                marker = marker if len(points) < 30 else ""
                axis.plot(*points.T, label=label, marker=marker, markersize=3.5, **look)
            drawn = np.concatenate([line.get_ydata() for line in axis.lines])
            if logarithmic and np.any(drawn > 0):
                _log_scale(axis)
            if not np.isfinite(drawn).any():
                axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center")
        for axis in axes[-1]:
            axis.set_xlabel("step")
        if len(runs) > 1:
            handles, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 4))
        else:
            figure.suptitle(next(iter(runs)))
    return figure


def loss_picture(workdir: Path) -> Figure:
    """Draw training loss and validation bits per byte over the steps."""
    lines = read_metrics(workdir)
    with style():
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axis, panel in zip(figure.subplots(1, 2), (PANELS[0], PANELS[5]), strict=True):
            key, title, unit, _ = panel
            points = _points(lines, key)
            axis.plot(*points.T, color=COLOURS[0], marker="o" if len(points) < 30 else "")
            axis.set(title=title, xlabel="step", ylabel=unit)
    return figure


def process_picture(
    process: InterpolatingProcess, weighting: str, min_weight: float, max_weight: float
) -> Figure:
    """Draw the mixing schedule over t, and the weights of the loss for each kind of noisy token."""
    t = np.linspace(process.t_min, process.t_max, 512, dtype=np.float32)
    curves = _process_curves(t, process, weighting, min_weight, max_weight)
    shares, elbo, training = map(np.asarray, curves)
    names = ("signal", "mask", "other tokens")
    kinds = ("z is the mask", "z is another token", "z = x")
    with style():
        figure = Figure(figsize=(12, 4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for name, values, look in zip(names, shares, looks(), strict=False):
            left.plot(t, values, label=name, **look)
        left.set(title="Mixing schedule", ylabel="share of the tokens", ylim=(-0.02, 1.02))
        panels = ((middle, "Weights of the ELBO", elbo), (right, f"Weights: {weighting}", training))
        for axis, title, weights in panels:
            # In the colours that mask and other tokens have on the left, and a third.
            for kind, values, look in zip(kinds, weights, looks(start=1), strict=False):
                axis.plot(t, np.where(values > 0, values, np.nan), label=kind, **look)
            axis.set(title=title, ylabel="weight of KL + IS")
            _log_scale(axis)
        for axis in (left, middle, right):
            axis.set_xlabel("time t")
            axis.legend()
        figure.suptitle(repr(process))
    return figure


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _process_curves(
    t: jax.Array,
    process: InterpolatingProcess,
    weighting: str,
    min_weight: float,
    max_weight: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """At times t [T]: shares of signal, mask and other tokens; weights of the ELBO and of training
    on a mask, on another token and on the token itself. Each [3, T]."""
    mass = process.beta_pi(t)
    shares = jnp.stack([process.alpha(t), mass.mask, process.num_noise_tokens * mass.uniform])
    clean, other = [token for token in range(3) if token != process.mask_id][:2]
    z = jnp.repeat(jnp.array([[process.mask_id, other, clean]]), len(t), axis=0)
    x = jnp.full_like(z, clean)
    training = process.loss_weights(
        x, z, t, weighting=weighting, min_weight=min_weight, max_weight=max_weight
    )
    return shares, process.elbo_weights(x, z, t).T, training.T


def profile_picture(profiles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the bound's integrand in bins of t, as `gidd_jax.evaluate --out` holds it by corpus."""
    with style():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axis = figure.subplots()
        for (label, profile), look in zip(profiles.items(), looks(), strict=False):
            values = np.array(profile["integrand"], float)  # null, where no time fell, is nan
            axis.stairs(values, profile["edges"], label=label, baseline=None, linewidth=1.8, **look)
        axis.set(title="Where the bound comes from", xlabel="time t (0: clean, 1: noise)")
        axis.set(ylabel="mean integrand, nats per token", xlim=(0, 1), ylim=(0, None))
        axis.legend()
    return figure


def frontier_picture(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw generative perplexity against token entropy, from reports of generative_ppl by label.

    Right and low is better: the line joins the reports that no other one beats in both.
    """
    with style():
        figure = Figure(figsize=(9, 5), layout="constrained")
        axis = figure.subplots()
        dots = zip(itertools.cycle(MARKERS), itertools.cycle(COLOURS), strict=True)
        for (label, report), (marker, colour) in zip(reports.items(), dots, strict=False):
            axis.errorbar(
                report["token_entropy"],
                report["gen_ppl"],
                xerr=error_bar(report, "token_entropy"),
                yerr=error_bar(report, "gen_ppl"),
                fmt=marker,
                color=colour,
                capsize=2,
                label=label,
            )
        best = frontier([(r["token_entropy"], r["gen_ppl"]) for r in reports.values()])
        axis.plot(*np.array(best).T, color="grey", linestyle=":", zorder=0, label="frontier")
        axis.set(xlabel="token entropy within a sample, nats (95% interval)")
        axis.set(ylabel="generative perplexity (95% interval)", title="Quality against diversity")
        _log_scale(axis)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    return figure


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (entropy, perplexity) that none beats in both, by falling entropy."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (-p[0], p[1])):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def error_bar(report: Mapping[str, Any], name: str) -> list[list[float]] | None:
    """The two lengths of an error bar, as matplotlib takes them."""
    value, interval = report[name], report[f"{name}_interval"]
    if interval is None or None in interval:  # a single sample has none
        return None
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]]


def calibration_picture(figures: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw how often tokens of a suspicion are wrong, from `figures` of `gidd_jax.highlight`."""
    with style():
        figure = Figure(figsize=(6, 5.5), layout="constrained")
        axis = figure.subplots()
        marked = zip(looks(), itertools.cycle(MARKERS), strict=True)
        for one, (look, marker) in zip(figures, marked, strict=False):
            bins = one["calibration"]
            label = f"{one['corruption']:.0%} replaced (error {one['calibration_error']:.3f})"
            axis.plot(bins["suspicion"], bins["share_wrong"], marker=marker, label=label, **look)
        axis.plot([0, 1], [0, 1], color="grey", linewidth=1, zorder=0, label="calibrated")
        axis.set(title="Calibration of suspicion", xlabel="mean suspicion of the bin")
        axis.set(
            ylabel="share of its tokens that are wrong", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02)
        )
        axis.legend()
    return figure


def sweep_picture(
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    figure_name: str,
    baseline: Mapping[str, float],
) -> Figure:
    """Draw a figure of the runs of a sweep over its first key, a colour for each of the others.

    Dots are runs, lines join the means over seeds; `baseline`: values to compare with, by name.
    """
    first, *others = [key for key in keys if key != "seed"] or ["seed"]
    places = {value: i for i, value in enumerate(dict.fromkeys(row[first] for row in rows))}
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in others), []).append(row)
    with style():
        figure = Figure(figsize=(8, 5), layout="constrained")
        axis = figure.subplots()
        marked = zip(looks(), itertools.cycle(MARKERS), strict=False)
        for (group, members), (look, marker) in zip(groups.items(), marked, strict=False):
            at = [places[row[first]] for row in members]
            values = [row[figure_name] for row in members]
            label = ", ".join(f"{k} = {v}" for k, v in zip(others, group, strict=True)) or None
            axis.scatter(at, values, color=look["color"], marker=marker, s=18, alpha=0.6)
            means = {x: np.mean([v for a, v in zip(at, values, strict=True) if a == x]) for x in at}
            axis.plot(list(means), list(means.values()), label=label, **look)
        for name, value in baseline.items():
            axis.axhline(value, color="grey", linewidth=1, label=name)
        axis.set_xticks(list(places.values()), [str(value) for value in places])
        axis.set(xlabel=first, ylabel=figure_name.replace("_", " "), title="Validation bound")
        axis.legend()
    return figure


def save_figures(
    figures: Mapping[str, Figure], out: Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write each figure as OUT/NAME.FORMAT, never half a file; return the paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for (name, figure), kind in itertools.product(figures.items(), formats):
        path = out / f"{name}.{kind}"
        part = path.with_name(path.name + ".part")
        # Without date and random ids the same figures make the same files.
        with matplotlib.rc_context({"svg.hashsalt": name}):
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(part, format=kind, dpi=120, metadata=metadata)
        part.replace(path)
        paths.append(path)
    return paths


def _points(lines: Metrics, key: str) -> np.ndarray:
    """Steps and values [N, 2] of what was logged; values that were not finite are nan."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    return np.array([(s, math.nan if v is None else v) for s, v in points], float).reshape(-1, 2)


def _log_scale(axis: Axes) -> None:
    """Make y logarithmic, with plain numbers where it spans less than a decade."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < 10 * low:
        axis.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.yaxis.set_major_formatter(ticker.ScalarFormatter())
        axis.yaxis.set_minor_locator(ticker.NullLocator())


def looks(start: int = 0) -> Iterator[dict[str, Any]]:
    """Colour and line style of one line after another, from number `start`."""
    for number in itertools.count(start):
        style = DASHES[(number // len(COLOURS) + number) % len(DASHES)]
        yield {"color": COLOURS[number % len(COLOURS)], "linestyle": style}


@contextlib.contextmanager
def style() -> Iterator[None]:
    settings: dict[Any, Any] = {
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "figure.titlesize": "medium",
        "lines.linewidth": 1.6,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        yield
