"""Train a GIDD, MDLM or autoregressive language model; a run in an existing workdir continues.

Examples:
  python -m gidd_jax.train --config=configs/quickstart.py --workdir=outputs/quickstart
  python -m gidd_jax.train --config=gidd:small --config.data.path='texts/*.jsonl'
  python -m gidd_jax.train --config=mdlm --config.mesh.fsdp=8 --config.train.batch_size=64
  python -m gidd_jax.train --config=adapt --config.model.start=FOLDER_OR_HUB_NAME
  python -m gidd_jax.train --config=gidd:1B --config.mesh.fsdp=8 --plan=8xH200   # does it fit?
  python -m gidd_jax.train --config=gidd:base --distributed   # on every host of a cluster
"""

import datetime
from typing import TYPE_CHECKING

from absl.flags import ArgumentParser, Flag, FlagHolder

from gidd_jax.cli import CommandFlags, config_flag, run
from gidd_jax.errors import InputError
from gidd_jax.parallel.distributed import distributed_flags, refused_together

if TYPE_CHECKING:
    from gidd_jax.settings import Settings

flags = CommandFlags()


def _plan_flag() -> FlagHolder[str | None]:
    """Define `--plan[=TOPOLOGY]`: `--plan` alone plans for the devices of this machine."""

    class PlanFlag(Flag):
        def parse(self, argument: str) -> None:
            super().parse("here" if argument == "true" else argument)

    flag = PlanFlag(
        ArgumentParser(),
        None,
        "plan",
        None,
        "Say what the run needs on a topology (8xH200, v5e-256, v4-128, cpu-8; alone: on the "
        "devices of this machine), whether it fits and how fast it can be at most; train nothing.",
        boolean=True,  # it may stand without a value, which is then "true"
    )
    return flags.DEFINE_flag(flag)


CONFIG = config_flag(flags, "gidd")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, or gs://BUCKET/FOLDER. Default: outputs/DATE/TIME."
)
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in a workdir that was made with another config."
)
ALLOW_CODE = flags.DEFINE_bool(
    "allow_code",
    False,
    "Go on with the text of a process of your own that the run recorded, where its file is gone.",
)
PROFILE = flags.DEFINE_bool(
    "profile",
    False,
    "Write a trace of five steps, from the second of this start on, to WORKDIR/tensorboard.",
)
PLAN = _plan_flag()
OUT = flags.DEFINE_string("out", None, "--plan: file to write, ending in .json.")
DISTRIBUTED = distributed_flags(flags)


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.checkpoints.storage import run_folder
    from gidd_jax.evaluation.reports import written
    from gidd_jax.interchange.start import from_start
    from gidd_jax.settings import Settings
    from gidd_jax.training.loop import train

    settings = Settings.from_config(CONFIG.value)
    if PLAN.value is not None:
        plan(settings, PLAN.value)
        return
    if OUT.value:
        raise InputError("--out belongs to --plan: add it, or leave --out out")
    if DISTRIBUTED.distributed.value and WORKDIR.value is None:
        raise InputError("--distributed needs --workdir, the same folder for every process")
    workdir = WORKDIR.value or f"outputs/{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}"
    run_folder(workdir)  # what is wrong with it is said before the processes find each other
    DISTRIBUTED.start()
    with refused_together():
        settings, start = from_start(settings, allow_code=ALLOW_CODE.value)
    options = ALLOW_CONFIG_CHANGE.value, PROFILE.value, ALLOW_CODE.value
    figures = train(settings, workdir, *options, start)
    words = ", ".join(f"{name} {written(value, 4)}" for name, value in figures.items())
    print(f"validation: {words or 'none since this start'}\nworkdir: {workdir}")


def plan(settings: "Settings", topology: str) -> None:
    """Print what a run needs on a topology, and write it where --out says."""
    from gidd_jax.evaluation.reports import write_report
    from gidd_jax.inference.samples import check_output
    from gidd_jax.interchange.start import from_start
    from gidd_jax.planning.plan import make_plan, set_devices
    from gidd_jax.planning.report import as_report, describe

    out = check_output(OUT.value, ".json") if OUT.value else None
    set_devices(topology)
    found = make_plan(from_start(settings)[0], topology)
    print(describe(found))
    if out:
        write_report(out, as_report(found))
        print(f"wrote {out}")


if __name__ == "__main__":
    run(main, flags, resumes=True)
