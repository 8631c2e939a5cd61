"""Train a grid of small runs, one after another; one table and one figure of them all.

Examples:
  python -m gidd_jax.sweep --config=ablation --workdir=outputs/study
  python -m gidd_jax.sweep --config=my_sweep.py --workdir=outputs/mine \\
      --config.base.train.num_steps=200 --config.grid.seed='(0, 1, 2)'

The config has two sections: `base`, a config of gidd_jax.train, and `grid`, which names keys of it
and gives each a tuple of values. Every combination is a run of its own, in a workdir as
gidd_jax.train makes it: WORKDIR/runs/KEY=VALUE+... The same command continues after a stop; what is
finished is not repeated.
Programs are compiled once for all runs that they fit, such as those that differ in the seed: JAX
keeps them on disk. Runs go in turn: several seeds as one program were no faster on CPU
(docs/scaling.md has the figures).

Prints the bound on the validation text, mean and standard deviation over seeds. Files of WORKDIR:
  sweep.csv   a line for each finished run: its values of the grid, step, seconds (of its last
      start) and the figures of its last validation: nats per token, perplexity, bits per byte
  sweep.png, sweep.svg   bits per byte over the first key of the grid, beside the unigram model
"""

from pathlib import Path

from absl import logging

from gidd_jax.cli import CommandFlags, config_flag, run

flags = CommandFlags()
CONFIG = config_flag(flags)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True)


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.evaluation import grid
    from gidd_jax.evaluation.reports import write_csv
    from gidd_jax.views import pictures

    runs, workdir = grid.plan_runs(CONFIG.value), Path(WORKDIR.value or "")
    rows = []
    for number, one in enumerate(runs, 1):
        logging.info("Run %d of %d: %s", number, len(runs), one.name)
        result = grid.finish(one, workdir / "runs" / one.name)
        if result is None:
            return  # stopped by a signal; the same command continues
        rows.append({**one.values, **result})
        write_csv(workdir / "sweep.csv", rows)
    keys, unigram = list(runs[0].values), grid.unigram_baseline(runs[0].settings)
    figure = pictures.sweep_picture(rows, keys, grid.JUDGED_BY, unigram)
    pictures.save_figures({"sweep": figure}, workdir)
    print(f"{grid.summary(rows, keys)}\nunigram model: {unigram:.4f} bits per byte")
    print(f"written to {workdir}: sweep.csv, sweep.png, sweep.svg")


if __name__ == "__main__":
    run(main, flags, resumes=True)
