"""Can self-correction be learnt late? A model of masks alone, tuned with and without hybrid noise.

    python -m gidd_jax.sweep --config=configs/sweeps/late.py:masks --workdir=outputs/late/masks
    python -m gidd_jax.sweep --config=configs/sweeps/late.py --workdir=outputs/late/tuned

The first command trains one model with masks alone on rows of a Markov chain, whose law is known
(as in configs/sweeps/chain.py). The second continues it for 600 steps in six runs, three seeds with
masks alone and three whose uniform noise is annealed to p_uniform = 0.2 over the first 300, and
judges the samples of all by the truth, before and after self-correction.

Hardware: 2 CPU cores, some minutes. Expected results: docs/adapting.md has the table.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError

MASKS = "outputs/late/masks"  # where the first command leaves its run


def get_config(part: str = "tuned") -> ConfigDict:
    """Return `base`, `grid` and `source` of the model with masks, or of those that follow it."""
    if part not in ("masks", "tuned"):
        raise InputError(f"configs/sweeps/late.py:{part}: use masks or tuned")
    config = load_config("sweeps/chain")
    config.base.process.p_uniform = 0.0
    config.base.train.weighting = "dynamic"
    config.source.calls = (16, 64)
    config.grid = ConfigDict({"seed": (0,)})
    if part == "masks":
        return config
    config.base.model.start = f"{MASKS}/runs/seed=0"
    config.base.adapt.noise_steps = 300
    config.base.optimizer.update(warmup_steps=50, learning_rate=3e-3)
    config.base.train.num_steps = 600
    config.base.checkpoint.every = 600
    config.grid = ConfigDict({"process": {"p_uniform": (0.0, 0.2)}, "seed": (0, 1, 2)})
    return config
