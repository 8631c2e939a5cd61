"""Train a grid of small runs, one after another; one table and one figure of them all.

Examples:
  python -m gidd_jax.sweep --config=ablation --workdir=outputs/study
  python -m gidd_jax.sweep --config=my_sweep.py --workdir=outputs/mine \\
      --config.base.train.num_steps=200 --config.grid.seed='(0, 1, 2)'

The config has two sections: `base`, a config of gidd_jax.train, and `grid`, which names keys of it
and gives each a tuple of values. Every combination is a run of its own, in a workdir as
gidd_jax.train makes it: WORKDIR/runs/KEY=VALUE+... The same command continues after a stop; what is
finished is not repeated.
A third section, `source`, trains the runs on rows of a law that is known, a Markov chain or a
hidden Markov model, and judges them against it (configs/sweeps/chain.py).
Programs are compiled once for all runs that they fit, such as those that differ in the seed: JAX
keeps them on disk. Runs go in turn: several seeds as one program were no faster on CPU
(docs/scaling.md has the figures).

Prints the bound on the validation text, mean and standard deviation over seeds. Files of WORKDIR:
  sweep.csv   a line for each finished run: its values of the grid, step, seconds (of its last
      start) and the figures of its last validation: nats per token, perplexity, bits per byte
  sweep.png, sweep.svg   bits per byte (nats per token where rows are no text) over the first key of
      the grid, beside the unigram model; with a source, the excess of the bound over its entropy
  samples.png, samples.svg   with a source: how probable under the truth generated rows are, and
      how far their neighbouring tokens are from it, by network calls, before and after correction
"""

from pathlib import Path

from absl import logging

from gidd_jax.cli import CommandFlags, config_flag, run

flags = CommandFlags()
CONFIG = config_flag(flags)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True)


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.evaluation import grid, truth
    from gidd_jax.evaluation.reports import write_csv
    from gidd_jax.views import pictures, sampler_pictures

    workdir = Path(WORKDIR.value or "")
    source = truth.open_source(CONFIG.value, workdir)
    runs, rows = grid.plan_runs(CONFIG.value), []
    judge = None if source is None else source.start()
    for number, one in enumerate(runs, 1):
        logging.info("Run %d of %d: %s", number, len(runs), one.name)
        result = grid.finish(one, workdir / "runs" / one.name, judge)
        if result is None:
            return  # stopped by a signal; the same command continues
        rows.append({**one.values, **result})
        write_csv(workdir / "sweep.csv", rows)
    keys, drawn = list(runs[0].values), {}
    measure = grid.measure_of(runs[0].settings) if source is None else grid.TRUTH
    drawn["sweep"] = pictures.sweep_picture(
        rows, keys, measure.figure, {measure.baseline: measure.value}
    )
    print(grid.summary(rows, keys, measure.figure))
    if source is None:
        print(f"{measure.baseline}: {measure.value:.4f} {measure.unit}")
    else:
        drawn["samples"] = sampler_pictures.samples_picture(rows, keys, source.settings.calls)
        print(f"entropy of the source: {rows[0]['entropy']:.4f} {measure.unit}")
    pictures.save_figures(drawn, workdir)
    files = ", ".join(f"{name}.png, {name}.svg" for name in drawn)
    print(f"written to {workdir}: sweep.csv, {files}")


if __name__ == "__main__":
    run(main, flags, resumes=True)
