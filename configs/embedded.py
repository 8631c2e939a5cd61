"""The model that comes with the package, `--checkpoint=embedded`: the quickstart's, trained longer.

    python -m gidd_jax.train --config=configs/embedded.py --workdir=outputs/embedded
    python -m gidd_jax.convert --checkpoint=outputs/embedded --out=gidd_jax/assets/model \
      --dtype=bfloat16 --license=apache-2.0

Hardware: 2 CPU cores. The run goes on where it was stopped. Expected results: the card of the
model, `gidd_jax/assets/model/README.md`, has its figures and how long it took.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config


def get_config() -> ConfigDict:
    """Return the config."""
    config = load_config("quickstart")
    config.train.update(num_steps=9_000, eval_every=1_000)
    config.checkpoint.every = 250
    return config
