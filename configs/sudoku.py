"""Grids of Sudoku as rows of symbols: what a small model gets right can be counted.

    python examples/sudoku/make_data.py --size=6 --out=outputs/sudoku/6
    python -m gidd_jax.train --config=configs/sudoku.py:6 --workdir=outputs/sudoku/6/run

Argument: the size of the grids, 4, 6 (the default) or 9, with the data in outputs/sudoku/SIZE. Size
9 wants more grids: examples/sudoku/make_data.py --size=9 --train=1000000.

Hardware: 2 CPU cores for sizes 4 and 6; size 6 takes 10 minutes. Size 9 takes hours and wants a
GPU; the same command goes on after a stop.
`make sudoku` runs size 6.
Expected results: size 6, grids drawn without givens in 72 ancestral calls: 25 % are valid, and 82 %
after self-correction (examples/sudoku/README.md has the tables). Size 9 is not measured yet.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError

SIZES = {  # (num_layers, hidden_size, num_heads), (num_steps, batch_size)
    "4": ((2, 64, 2), (1000, 64)),
    "6": ((4, 128, 4), (2000, 64)),
    "9": ((6, 256, 8), (40_000, 128)),
}


def get_config(size: str = "6") -> ConfigDict:
    """Return the config of a size of grids."""
    if size not in SIZES:
        raise InputError(f"unknown size {size!r}: use one of {', '.join(SIZES)}")
    (num_layers, hidden_size, num_heads), (num_steps, batch_size) = SIZES[size]
    config = load_config("base")
    config.model.update(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        cond_dim=64,
        max_seq_len=int(size) ** 2,
        dtype="float32",
    )
    config.process.p_uniform = 0.2
    config.data.update(
        path=f"outputs/sudoku/{size}/train.npz",
        tokenizer=f"ids:{size}",
        frame="none",
        # Images of training grids would not show what is learnt by heart.
        validation=f"path:outputs/sudoku/{size}/validation.npz",
    )
    config.optimizer.update(name="muon", learning_rate=1e-2, warmup_steps=100)
    config.train.update(
        num_steps=num_steps, batch_size=batch_size, eval_every=num_steps // 4, eval_batches=4
    )
    config.checkpoint.every = num_steps // 4
    return config
