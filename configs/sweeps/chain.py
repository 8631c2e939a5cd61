"""Excess loss where the truth is known: share of uniform noise x weighting of the loss x seed.

    python -m gidd_jax.sweep --config=configs/sweeps/chain.py --workdir=outputs/chain
    python -m gidd_jax.sweep --config=configs/sweeps/chain.py:hidden --workdir=outputs/hidden

Rows of 32 tokens of a Markov chain over 16 tokens, or of a hidden Markov model with 8 states: their
entropy is known, so the excess of a bound over it is exact, and generated rows have an exact
likelihood under the truth (gidd_jax/evaluation/truth.py). 45 runs of a network of 2 layers of 64.

Hardware: 2 CPU cores, one to two hours; the same command goes on after a stop.
Expected results: docs/study.md has those of the chain; the hidden one is not measured yet.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError

STATES = {"chain": 0, "hidden": 8}


def get_config(law: str = "chain") -> ConfigDict:
    """Return `base`, a config of gidd_jax.train, `grid`, and `source`, the law of the rows."""
    if law not in STATES:
        raise InputError(f"configs/sweeps/chain.py:{law}: use chain or hidden")
    base = load_config("base")
    base.model.update(
        hidden_size=64, num_layers=2, num_heads=2, cond_dim=32, max_seq_len=32, dtype="float32"
    )
    base.data.validation = "last:512"
    base.optimizer.update(name="muon", learning_rate=1e-2, warmup_steps=100, final_lr_ratio=0.0)
    base.train.update(num_steps=2000, batch_size=32, eval_every=0, eval_batches=16)
    base.checkpoint.update(every=2000, max_to_keep=1)
    base.logging.every = 200
    grid = ConfigDict()
    grid.process = ConfigDict({"p_uniform": (0.0, 0.05, 0.1, 0.2, 0.5)})
    grid.train = ConfigDict({"weighting": ("elbo", "clip", "dynamic")})
    grid.seed = (0, 1, 2)
    source = ConfigDict()
    source.num_states = STATES[law]  # of the hidden chain; 0: the tokens themselves are a chain
    source.num_tokens = 16
    source.sharpness = 1.5  # deviation of the logits; 0 is uniform
    source.seed = 0
    source.num_rows = 65_536  # rows to train on and to validate with
    source.num_samples = 512  # rows generated for each number of calls
    source.calls = (4, 16, 64, 256)
    source.temperature = 1.0  # of self-correction's proposals
    return ConfigDict({"base": base, "grid": grid, "source": source})
