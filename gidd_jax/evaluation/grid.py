"""A grid of runs: which runs it means, each of them trained to its end, and how good they are."""

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from gidd_jax.checkpoints.checkpoint import find_checkpoint
from gidd_jax.checkpoints.workdir import check_workdir
from gidd_jax.cli import nearest
from gidd_jax.data.arrays import with_marks
from gidd_jax.data.pipeline import unigram_nats, validation_batches
from gidd_jax.data.sources import run_tokenizer
from gidd_jax.errors import InputError, RunError
from gidd_jax.evaluation.reports import NOTES, table, write_report, written
from gidd_jax.inference.gidd import Gidd
from gidd_jax.interchange.start import from_start
from gidd_jax.own_process import PAPER_IDS, read_source
from gidd_jax.sections import split_own_process
from gidd_jax.settings import Settings, flatten
from gidd_jax.training import loop
from gidd_jax.training.build import build_process

RESULT_FILE = "result.json"  # in the folder of a finished run
Judge = Callable[[Gidd, Settings], Mapping[str, Any]]


class Measure(NamedTuple):
    """What runs are judged by: the name of the figure, its unit, and what it is compared with."""

    figure: str
    unit: str
    baseline: str
    value: float


TRUTH = Measure("excess", "nats per token", "the truth", 0.0)  # of runs on a source


class Run(NamedTuple):
    """A combination of the grid: the name of its folder, its values by key, its settings."""

    name: str
    values: dict[str, Any]
    settings: Settings


def plan_runs(config: Any) -> list[Run]:
    """Return the runs of a sweep's config: keys in alphabetical order, the seed varying fastest.

    Raises InputError before anything is trained when one of them is not legal.
    """
    if set(config) - {"source"} != {"base", "grid"}:
        raise InputError(
            "the config of a sweep has the sections base and grid, and source where rows of a "
            "known law are trained on: see configs/sweeps/"
        )
    legal = flatten(config.base.to_dict())
    grid = dict(sorted(flatten(config.grid.to_dict()).items(), key=lambda item: item[0] == "seed"))
    if not grid:
        raise InputError("the grid of the sweep is empty: give it keys of base with their values")
    for key, values in grid.items():
        if key not in legal:
            raise InputError(f"grid: base has no key {key}: {nearest(key, legal)}")
        if not isinstance(values, list | tuple) or not values or len(set(values)) < len(values):
            raise InputError(f"grid.{key} = {values!r}: must be a tuple of different values")
    runs = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        name = "+".join(quote(f"{key}={value}", safe="=") for key, value in values.items())
        changed = config.base.copy_and_resolve_references()
        try:
            changed.update_from_flattened_dict(values)
            settings = Settings.from_config(changed)
            own = read_source(settings.process.name)
            if own is not None:  # its code and options are tried before the first run
                build_process(settings.process, *PAPER_IDS, own)
            runs.append(Run(name, values, settings))
        except (TypeError, ValueError) as error:
            raise InputError(f"run {name}: {error}") from error
    return runs


def finish(one: Run, folder: Path, judge: Judge | None = None) -> dict[str, Any] | None:
    """Train a run to its end, or continue it, and return its step, seconds and figures.

    judge: gives more figures of the trained model. What is finished is only read. None: a signal
    stopped the run before its end. Raises InputError when the folder belongs to a run with other
    settings, RunError when training failed.
    """
    # As training makes them; not before: a sweep may be planned before its rows are written.
    settings, begin = from_start(with_marks(one.settings))
    one = one._replace(settings=settings)
    check_workdir(folder, one.settings, read_source(one.settings.process.name))
    path, num_steps = folder / RESULT_FILE, one.settings.train.num_steps
    if path.is_file():
        result = json.loads(path.read_text("utf-8"))
        if result["step"] == num_steps:
            result.pop(NOTES, None)
            return {name: math.nan if v is None else v for name, v in result.items()}
    start = time.monotonic()
    try:
        figures = loop.train(one.settings, folder, start=begin)
    except RunError as error:
        raise type(error)(f"run {one.name}: {error}") from error
    if find_checkpoint(folder).step < num_steps:
        return None
    result = {"step": num_steps, "seconds": round(time.monotonic() - start, 1), **figures}
    if judge is not None:
        own = one.settings.process.name
        consent = own if split_own_process(own) else None
        result |= judge(Gidd.from_pretrained(folder, process=consent), one.settings)
    write_report(path, result)
    return result


def measure_of(settings: Settings) -> Measure:
    """Return bits per byte, or nats per token where the rows of validation stand for no text,
    beside the unigram model on what the runs are validated on."""
    settings = from_start(settings)[0]
    tokenizer, train = run_tokenizer(settings.data), settings.train
    data = (settings.data, tokenizer, settings.model.max_seq_len)
    validation = validation_batches(*data, train.batch_size, max_batches=train.eval_batches)
    nats = unigram_nats(*data, validation)
    if validation.num_bytes:
        bits = nats / math.log(2) / validation.num_bytes
        return Measure("bits_per_byte", "bits per byte", "unigram model", bits)
    return Measure("nelbo", "nats per token", "unigram model", nats / validation.num_tokens)


def summary(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], figure: str) -> str:
    """Return a line for each combination but for the seed: runs, mean, deviation, perplexity."""
    shown = [key for key in keys if key != "seed"]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in shown), []).append(row)
    lines = [[*shown, "runs", figure, "+-", "perplexity"]]
    for values, members in groups.items():
        found = np.array([row[figure] for row in members])
        deviation = written(found.std(ddof=1), 4) if len(found) > 1 else "-"
        perplexity = np.mean([row["perplexity"] for row in members])
        lines.append(
            [
                *values,
                str(len(found)),
                written(found.mean(), 4),
                deviation,
                written(float(perplexity), 2),
            ]
        )
    return table(lines)
