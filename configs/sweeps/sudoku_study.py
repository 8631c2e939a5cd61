"""Five processes x three seeds on grids of Sudoku of size 6, all trained alike.

    for part in hybrid uniform mdlm; do
      python -m gidd_jax.sweep --config=configs/sweeps/sudoku_study.py:$part \
        --workdir=outputs/sudoku/study/$part
    done

Argument: hybrid (the default; p_uniform 0, 0.1 and 0.2), uniform (no mask at all) or mdlm (masks
alone, with the weights of the bound). Together 15 runs; the data are those of configs/sudoku.py:6.
`make sudoku-study` trains them all, solves puzzles with each and puts them in one table.

Hardware: 2 CPU cores, up to an hour a run.
Expected results: not measured yet.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError

PARTS = ("hybrid", "uniform", "mdlm")


def get_config(part: str = "hybrid") -> ConfigDict:
    """Return `base`, a config of gidd_jax.train, and `grid`: the values of what varies."""
    if part not in PARTS:
        raise InputError(f"unknown part {part!r}: use one of {', '.join(PARTS)}")
    base = load_config("sudoku:6")
    base.train.eval_every = 0  # at the end alone
    base.checkpoint.max_to_keep = 1
    grid = ConfigDict()
    if part == "hybrid":
        grid.process = ConfigDict({"p_uniform": (0.0, 0.1, 0.2)})
    elif part == "uniform":
        base.process.update(name="log_snr", shift=1000.0)
    else:
        base.process.name = "masked"
        base.train.weighting = "elbo"
    grid.seed = (0, 1, 2)
    return ConfigDict({"base": base, "grid": grid})
