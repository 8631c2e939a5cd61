"""Train a GIDD, MDLM or autoregressive language model; a run in an existing workdir goes on.

Examples:
  python -m gidd_jax.train --config=configs/quickstart.py --workdir=outputs/quickstart
  python -m gidd_jax.train --config=gidd:small --config.data.path='texts/*.jsonl'
  python -m gidd_jax.train --config=mdlm --config.mesh.fsdp=8 --config.train.batch_size=64
  python -m gidd_jax.train --config=gidd:base --distributed   # on every host of a cluster
"""

import datetime
from pathlib import Path

from absl import flags

from gidd_jax.cli import config_flag, run
from gidd_jax.distributed import distributed_flags
from gidd_jax.errors import InputError

CONFIG = config_flag("gidd")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run. Default: outputs/YYYY-MM-DD/HH-MM-SS."
)
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in a workdir that was made with another config."
)
DISTRIBUTED = distributed_flags()


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.settings import Settings
    from gidd_jax.trainer import train

    settings = Settings.from_config(CONFIG.value)
    if "://" in (WORKDIR.value or ""):
        raise InputError(
            f"--workdir={WORKDIR.value}: must be a folder; mount the bucket, for example with "
            "gcsfuse, and give the folder of the mount"
        )
    if DISTRIBUTED.distributed.value and WORKDIR.value is None:
        raise InputError("--distributed needs --workdir, the same folder for every process")
    DISTRIBUTED.start()
    now = datetime.datetime.now()
    workdir = Path(WORKDIR.value or f"outputs/{now:%Y-%m-%d}/{now:%H-%M-%S}")
    figures = train(settings, workdir, ALLOW_CONFIG_CHANGE.value)
    words = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"validation: {words or 'none'}\nworkdir: {workdir}")


if __name__ == "__main__":
    run(main)
