"""The pretrained model of the package, `--checkpoint=embedded`: hours of training on 2 CPU cores.

    python -m gidd_jax.data.build_assets --corpus=train.jsonl --out=outputs/pdmix
    python -m gidd_jax.train --config=configs/embedded.py --config.data.path=train.jsonl \
      --config.data.validation=path:val.jsonl --config.data.tokenizer=outputs/pdmix/tokenizer \
      --workdir=outputs/embedded
    python -m gidd_jax.convert --checkpoint=outputs/embedded --dtype=bfloat16 \
      --out=gidd_jax/assets/model

A network of 3.7 million parameters, so that the package stays small. What it was trained on, for
how long and what it reaches stands in its card, gidd_jax/assets/model/README.md. Without the flags
it trains on the package's own novels.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config


def get_config() -> ConfigDict:
    """Return the config."""
    config = load_config("quickstart")
    config.model.update(hidden_size=192, num_heads=6)
    config.train.update(num_steps=10_000, eval_every=1000)
    config.optimizer.warmup_steps = 100
    config.checkpoint.update(every=250, max_to_keep=1)
    config.logging.every = 50
    return config
