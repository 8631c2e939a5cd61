"""The best learning rate by width: width x rate, of the scaling paper's network.

    python -m gidd_jax.sweep --config=configs/sweeps/transfer.py --workdir=outputs/transfer
    python -m gidd_jax.sweep --config=configs/sweeps/transfer.py:standard --workdir=outputs/standard

Argument: completep (the default) or standard, the parametrization. 18 runs on rows of a Markov
chain, whose entropy is known (as in configs/sweeps/chain.py): 4 layers of 64, 128 and 256, each
with six rates that double. The rates of standard are those of completep at width 64: what a matrix
moves by there is the same.

Hardware: 2 CPU cores, an hour; the same command goes on after a stop.
Expected results: with completep the best rate is 0.025 at width 64 and 0.05 at 128 and 256
(docs/scaling.md); standard was not run.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError

WIDTHS = (64, 128, 256)
RATES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
FACTORS = {"completep": 1.0, "standard": 1 / WIDTHS[0]}


def get_config(parametrization: str = "completep") -> ConfigDict:
    """Return `base`, a config of gidd_jax.train, `grid`, and `source`, the law of the rows."""
    if parametrization not in FACTORS:
        raise InputError(f"configs/sweeps/transfer.py:{parametrization}: use completep or standard")
    config = load_config("sweeps/chain")
    config.base.model.update(name="gidd", parametrization=parametrization, num_layers=4)
    config.base.process.name = "log_snr"
    config.base.optimizer.update(
        name="laprop",
        b1=0.9,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=0.0,
        schedule="wsd",
        warmup_steps=50,
        cooldown_steps=150,
    )
    config.base.train.update(num_steps=500, max_weight=1000.0)
    config.grid = ConfigDict()
    config.grid.model = ConfigDict({"hidden_size": WIDTHS})
    rates = tuple(rate * FACTORS[parametrization] for rate in RATES)
    config.grid.optimizer = ConfigDict({"learning_rate": rates})
    config.source.update(num_tokens=64, num_samples=64, calls=(32,))  # samples are no question here
    return config
