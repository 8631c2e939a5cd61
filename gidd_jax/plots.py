"""Draw pictures of runs and of what was measured on them, as PNG and SVG.

Examples:
  python -m gidd_jax.plots --workdir=outputs/quickstart
  python -m gidd_jax.plots --workdir=RUN --evaluation=evaluation.json --out=pictures
  python -m gidd_jax.plots --compare=RUN_A,RUN_B,RUN_C --out=pictures
  python -m gidd_jax.plots --frontier=t0.8.json,t0.9.json,t1.0.json --out=pictures
  python -m gidd_jax.plots --samplers=masks.json,hybrid.json --out=pictures
  python -m gidd_jax.plots --transfer=transfer.json --out=pictures

Files of --out (each as .png and .svg):
  training   of --workdir: losses, KL and IS parts, bounds, learning rate, gradient norm, speed
  process    of --workdir (diffusion): mixing schedule, weights of the ELBO and of training
  compare    the curves of several runs in one picture
  profile    of --evaluation: which times the bound comes from
  frontier   of --frontier: generative perplexity against token entropy, with 95% intervals
  calibration   of --calibration: how often tokens of a suspicion are wrong
  samplers   of --samplers: how far samplers are from an exact model, by network calls
  transfer   of --transfer: sizes of activations and of their changes, by width and depth
"""

from pathlib import Path

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError
from gidd_jax.model_flags import code_flags

flags = CommandFlags()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
COMPARE = flags.DEFINE_list("compare", [], "Folders of runs, separated by commas.")
EVALUATION = flags.DEFINE_string("evaluation", None, "File that gidd_jax.evaluate --out wrote.")
FRONTIER = flags.DEFINE_list(
    "frontier", [], "Files that gidd_jax.generative_ppl --out wrote, separated by commas."
)
CALIBRATION = flags.DEFINE_string(
    "calibration", None, "File that gidd_jax.highlight --evaluate --out wrote."
)
SAMPLERS = flags.DEFINE_list(
    "samplers", [], "Files that gidd_jax.check --sampler --out wrote, separated by commas."
)
TRANSFER = flags.DEFINE_string("transfer", None, "File that gidd_jax.check --transfer --out wrote.")
CODE = code_flags(flags)
OUT = flags.DEFINE_string("out", None, "Folder to write to. Default: WORKDIR/plots.")


def main(argv: list[str]) -> None:
    del argv
    sources = (WORKDIR, COMPARE, EVALUATION, FRONTIER, CALIBRATION, SAMPLERS, TRANSFER)
    if not any(source.value for source in sources):
        names = ", ".join(f"--{source.name}" for source in sources)
        raise InputError(f"nothing to draw: give one or more of {names}")
    if OUT.value:
        out = Path(OUT.value)
    elif WORKDIR.value:
        out = Path(WORKDIR.value) / "plots"
    else:
        raise InputError("--out is required without --workdir: name a folder for the pictures")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file: name a folder")

    from gidd_jax.evaluation import reports
    from gidd_jax.views import pictures, sampler_pictures, transfer_picture

    figures = {}
    if WORKDIR.value:
        figures = pictures.run_pictures(Path(WORKDIR.value), **CODE.values)
    if COMPARE.value:
        runs = zip(reports.labels(COMPARE.value), COMPARE.value, strict=True)
        figures["compare"] = pictures.training_curves(
            {label: pictures.read_metrics(Path(folder)) for label, folder in runs}
        )
    if EVALUATION.value:
        figures["profile"] = pictures.profile_picture(reports.load_profiles(EVALUATION.value))
    if FRONTIER.value:
        files = zip(reports.labels(FRONTIER.value), FRONTIER.value, strict=True)
        figures["frontier"] = pictures.frontier_picture(
            {label: reports.load_samples(file) for label, file in files}
        )
    if CALIBRATION.value:
        figures["calibration"] = pictures.calibration_picture(
            reports.load_detection(CALIBRATION.value)
        )
    if SAMPLERS.value:
        figures["samplers"] = sampler_pictures.sampler_picture(
            {
                label: reports.load_sampler_laws(file)
                for label, file in zip(reports.labels(SAMPLERS.value), SAMPLERS.value, strict=True)
            }
        )
    if TRANSFER.value:
        figures["transfer"] = transfer_picture.transfer_picture(
            reports.load_transfer(TRANSFER.value)
        )
    for path in pictures.save_figures(figures, out):
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main, flags)
