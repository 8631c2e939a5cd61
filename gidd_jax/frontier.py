"""Draw a model's frontier: generative perplexity against entropy and network calls, by sampler.

Examples:
  python -m gidd_jax.frontier --checkpoint=outputs/quickstart --scorer=outputs/demo/scorer \\
      --methods=ancestral,confidence --temperatures=0.8,1 --steps=16,64 --workdir=outputs/frontier
  python -m gidd_jax.frontier --checkpoint=RUN --scorer=gpt2-large --workdir=FOLDER \\
      --methods=ancestral,entropy_bound:epsilon=0.3:edit_above=0.5

Samples with every method at every temperature and number of steps, and judges the texts as
gidd_jax.generative_ppl does. Low perplexity alone says little: repetitive texts have it. A method
is better where it has less at the same entropy. The same command goes on after a stop.

Written to --workdir:
  points/       a file of figures for each point
  frontier.csv  a line for each: method, temperature, calls (of the network, for a batch) and the
                figures of gidd_jax.generative_ppl
  frontier.png, frontier.svg  perplexity against entropy, and against calls, with 95% intervals
"""

from pathlib import Path

from absl import logging

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError
from gidd_jax.model_flags import checkpoint_flag, code_flags

flags = CommandFlags()
CHECKPOINT = checkpoint_flag(flags)
SCORER = flags.DEFINE_string(
    "scorer", None, "Judge, given as for gidd_jax.generative_ppl.", required=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder to write to.", required=True)
METHODS = flags.DEFINE_string(
    "methods",
    "ancestral",
    "Samplers, separated by commas, each with options as in NAME:KEY=VALUE:KEY=VALUE.",
)
TEMPERATURES = flags.DEFINE_list("temperatures", ["1"], "Temperatures, separated by commas.")
STEPS = flags.DEFINE_list("steps", ["128"], "Numbers of steps, separated by commas.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 64, "Texts of each point.", lower_bound=2)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Texts drawn together.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of samples and bootstrap.", lower_bound=0)
BOOTSTRAP = flags.DEFINE_integer("bootstrap", 1000, "Resamples of the texts.", lower_bound=2)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")
CODE = code_flags(flags)


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.evaluation import frontier
    from gidd_jax.evaluation.reports import write_csv
    from gidd_jax.evaluation.sampler_laws import parse_methods
    from gidd_jax.evaluation.scorers import load_scorer
    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.sampling.options import numbers
    from gidd_jax.sampling.schedule import check_options
    from gidd_jax.views.pictures import save_figures
    from gidd_jax.views.sampler_pictures import frontier_picture

    points = frontier.plan_points(
        parse_methods(METHODS.value, frontier.AXES),
        numbers("temperatures", TEMPERATURES.value, float),
        numbers("steps", STEPS.value, int),
    )
    workdir = Path(WORKDIR.value or "")
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file: name a folder")
    model = Gidd.from_pretrained(CHECKPOINT.value, ema=EMA.value, **CODE.values)
    if model.process is None:
        raise InputError(f"{CHECKPOINT.value} is autoregressive: only diffusion has these samplers")
    for point in points:
        check_options(model.process, point.options)
    scorer = load_scorer(SCORER.value, "auto", "float32")
    made_with = {"checkpoint": CHECKPOINT.value, "scorer": SCORER.value, "ema": EMA.value}
    results = []
    for number, point in enumerate(points, 1):
        logging.info("Point %d of %d: %s", number, len(points), point.name)
        results.append(
            frontier.measure_point(
                model,
                scorer,
                point,
                workdir,
                made_with=made_with,
                num_samples=NUM_SAMPLES.value,
                batch_size=BATCH_SIZE.value,
                seed=SEED.value,
                num_resamples=BOOTSTRAP.value,
            )
        )
        write_csv(workdir / "frontier.csv", [frontier.columns(one) for one in results])
    save_figures({"frontier": frontier_picture(results)}, workdir)
    print(frontier.summary(results))
    print(f"written to {workdir}: frontier.csv, frontier.png, frontier.svg")


if __name__ == "__main__":
    run(main, flags)
