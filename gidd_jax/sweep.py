"""Train a grid of small runs, one after another; one table and one figure of them all.

Examples:
  python -m gidd_jax.sweep --config=ablation --workdir=outputs/study
  python -m gidd_jax.sweep --config=my_sweep.py --workdir=outputs/mine \\
      --config.base.train.num_steps=200 --config.grid.seed='(0, 1, 2)'

The config has two sections: `base`, a config of gidd_jax.train, and `grid`, which names keys of it
and gives each a tuple of values. Every combination is a run of its own, in a workdir as
gidd_jax.train makes it: WORKDIR/runs/KEY=VALUE+... The same command goes on after a stop; what is
finished is not repeated.
Programs are compiled once for all runs that they fit, such as those that differ in the seed: JAX
keeps them on disk. Runs go in turn: several seeds as one program were no faster on CPU
(docs/scaling.md has the figures).

Prints the bound on the validation text, mean and standard deviation over seeds. Files of WORKDIR:
  sweep.csv   a line for each finished run: its values of the grid, step, seconds (of its last
      start) and the figures of its last validation: nats per token, perplexity, bits per byte
  sweep.png, sweep.svg   bits per byte over the first key of the grid, beside the unigram model
"""

import csv
import io
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from absl import logging

from gidd_jax.cli import CommandFlags, config_flag, nearest, run
from gidd_jax.errors import InputError, RunError

if TYPE_CHECKING:
    from gidd_jax.settings import Settings

flags = CommandFlags()
CONFIG = config_flag(flags)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True)
RESULT_FILE = "result.json"  # in the folder of a finished run
JUDGED_BY = "bits_per_byte"


class Run(NamedTuple):
    """A combination of the grid: the name of its folder, its values by key, its settings."""

    name: str
    values: dict[str, Any]
    settings: "Settings"


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.views import pictures

    runs, workdir = plan_runs(CONFIG.value), Path(WORKDIR.value or "")
    rows = []
    for number, one in enumerate(runs, 1):
        logging.info("Run %d of %d: %s", number, len(runs), one.name)
        result = finish(one, workdir / "runs" / one.name)
        if result is None:
            return  # stopped by a signal; the same command goes on
        rows.append({**one.values, **result})
        write_table(rows, workdir / "sweep.csv")
    keys, unigram = list(runs[0].values), unigram_baseline(runs[0].settings)
    figure = pictures.sweep_picture(rows, keys, JUDGED_BY, unigram)
    pictures.save_figures({"sweep": figure}, workdir)
    print(f"{summary(rows, keys)}\nunigram model: {unigram:.4f} bits per byte")
    print(f"written to {workdir}: sweep.csv, sweep.png, sweep.svg")


def plan_runs(config: Any) -> list[Run]:
    """Return the runs of a sweep's config: keys in alphabetical order, the seed varying fastest.

    Raises InputError before anything is trained when one of them is not legal.
    """
    from gidd_jax.own_process import PAPER_IDS, read_source
    from gidd_jax.settings import Settings, flatten
    from gidd_jax.training.build import build_process

    if set(config) != {"base", "grid"}:
        raise InputError(
            "the config of a sweep has the sections base and grid: see configs/sweeps/ablation.py"
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


def finish(one: Run, folder: Path) -> dict[str, Any] | None:
    """Train a run to its end, or go on with it, and return its step, seconds and figures.

    What is finished is only read. None: a signal stopped the run before its end. Raises InputError
    when the folder belongs to a run with other settings, RunError when training failed.
    """
    from gidd_jax.checkpoints.checkpoint import find_checkpoint
    from gidd_jax.checkpoints.workdir import check_workdir
    from gidd_jax.evaluation.reports import NOTES, write_report
    from gidd_jax.own_process import read_source
    from gidd_jax.training.loop import train

    check_workdir(folder, one.settings, read_source(one.settings.process.name))
    path, num_steps = folder / RESULT_FILE, one.settings.train.num_steps
    if path.is_file():
        result = json.loads(path.read_text("utf-8"))
        if result["step"] == num_steps:
            result.pop(NOTES, None)
            return {name: math.nan if v is None else v for name, v in result.items()}
    start = time.monotonic()
    try:
        figures = train(one.settings, folder)
    except RunError as error:
        raise type(error)(f"run {one.name}: {error}") from error
    if find_checkpoint(folder).step < num_steps:
        return None
    result = {"step": num_steps, "seconds": round(time.monotonic() - start, 1), **figures}
    write_report(path, result)
    return result


def unigram_baseline(settings: "Settings") -> float:
    """Return the bits per byte of the unigram model on what the runs are validated on."""
    from gidd_jax.data.pipeline import unigram_bits_per_byte, validation_batches
    from gidd_jax.data.tokenizer import load_tokenizer

    tokenizer, train = load_tokenizer(settings.data.tokenizer), settings.train
    data = (settings.data, tokenizer, settings.model.max_seq_len)
    validation = validation_batches(*data, train.batch_size, max_batches=train.eval_batches)
    return unigram_bits_per_byte(*data, validation)


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows as CSV, with a column for everything that one of them holds."""
    from gidd_jax.checkpoints.storage import write_atomically

    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def summary(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Return a line for each combination but for the seed: runs, mean, deviation, perplexity."""
    import numpy as np

    from gidd_jax.evaluation.reports import written

    shown = [key for key in keys if key != "seed"]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in shown), []).append(row)
    lines = [[*shown, "runs", "bits/byte", "+-", "perplexity"]]
    for values, members in groups.items():
        bits = np.array([row[JUDGED_BY] for row in members])
        deviation = written(bits.std(ddof=1), 4) if len(bits) > 1 else "-"
        perplexity = np.mean([row["perplexity"] for row in members])
        lines.append(
            [
                *values,
                str(len(bits)),
                written(bits.mean(), 4),
                deviation,
                written(float(perplexity), 2),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


if __name__ == "__main__":
    run(main, flags, resumes=True)
