"""Draw pictures of runs and of what was measured on them, as PNG and SVG.

Examples:
  python -m gidd_jax.plots --workdir=outputs/quickstart
  python -m gidd_jax.plots --workdir=RUN --evaluation=evaluation.json --out=pictures
  python -m gidd_jax.plots --compare=RUN_A,RUN_B,RUN_C --out=pictures
  python -m gidd_jax.plots --frontier=t0.8.json,t0.9.json,t1.0.json --out=pictures

Files of --out (each as .png and .svg):
  training   of --workdir: losses, KL and IS parts, bounds, learning rate, gradient norm, speed
  process    of --workdir (diffusion): mixing schedule, weights of the ELBO and of training
  compare    the curves of several runs in one picture
  profile    of --evaluation: which times the bound comes from
  frontier   of --frontier: generative perplexity against token entropy, with 95% intervals
  calibration   of --calibration: how often tokens of a suspicion are wrong
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gidd_jax.cli import CommandFlags, code_flags, run
from gidd_jax.errors import InputError

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
CODE = code_flags(flags)
OUT = flags.DEFINE_string("out", None, "Folder to write to. Default: WORKDIR/plots.")


def main(argv: list[str]) -> None:
    del argv
    sources = (WORKDIR, COMPARE, EVALUATION, FRONTIER, CALIBRATION)
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

    from gidd_jax.views import pictures

    figures = {}
    if WORKDIR.value:
        figures = pictures.run_pictures(Path(WORKDIR.value), **CODE.values)
    if COMPARE.value:
        runs = zip(labels(COMPARE.value), COMPARE.value, strict=True)
        figures["compare"] = pictures.training_curves(
            {label: pictures.read_metrics(Path(folder)) for label, folder in runs}
        )
    if EVALUATION.value:
        figures["profile"] = pictures.profile_picture(load_profiles(EVALUATION.value))
    if FRONTIER.value:
        reports = zip(labels(FRONTIER.value), FRONTIER.value, strict=True)
        figures["frontier"] = pictures.frontier_picture(
            {label: load_report(file) for label, file in reports}
        )
    if CALIBRATION.value:
        figures["calibration"] = pictures.calibration_picture(load_detection(CALIBRATION.value))
    for path in pictures.save_figures(figures, out):
        print(f"wrote {path}")


def labels(paths: Sequence[str]) -> list[str]:
    """Return the last parts of paths that tell them apart; raises InputError for a path twice."""
    parts = [Path(path.removesuffix(".json")).absolute().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise InputError(f"{','.join(paths)}: name each only once")
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    raise AssertionError("different paths have different parts")


def load_profiles(path: str) -> dict[str, dict[str, Any]]:
    """Return the profile over t of each corpus by its name; raises InputError if there is none."""
    corpora = _load_json(path).get("corpora", [])
    profiles = {
        f"{corpus['data']} ({corpus['split']})": corpus["profile"]
        for corpus in corpora
        if "profile" in corpus
    }
    if not profiles:
        raise InputError(
            f"--evaluation={path} holds no profile over t: give what gidd_jax.evaluate --out wrote "
            "of a diffusion model"
        )
    return profiles


def load_report(path: str) -> dict[str, Any]:
    """Return a report of generative_ppl; raises InputError when a figure is missing."""
    report = _load_json(path)
    for name in ("gen_ppl", "gen_ppl_interval", "token_entropy", "token_entropy_interval"):
        if name not in report or report[name.removesuffix("_interval")] is None:
            raise InputError(
                f"--frontier: {path} holds no {name}: give what gidd_jax.generative_ppl --out wrote"
            )
    return report


def load_detection(path: str) -> list[dict[str, Any]]:
    """Return the figures of each share of wrong tokens; raises InputError if there are none."""
    figures = _load_json(path).get("figures", [])
    if not figures:
        raise InputError(
            f"--calibration={path} holds no figures: give what gidd_jax.highlight --evaluate --out "
            "wrote"
        )
    return figures


def _load_json(path: str) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is no report: give a file that --out of a command wrote")
    return value


if __name__ == "__main__":
    run(main, flags)
