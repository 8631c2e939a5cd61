"""Autoregressive baseline: a Llama trained on the same data with the same optimizer.

The paper's run on OpenWebText:

    python -m gidd_jax.train --config=configs/ar.py:small \
      --config.data.path='openwebtext/*.parquet' --config.data.tokenizer=gpt2 \
      --config.data.validation=last:100000

Argument: the size, as for configs/gidd.py. Hardware: as for configs/gidd.py.

Expected results: perplexity, exact rather than a bound, below that of the diffusion models of the
same size.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config


def get_config(size: str = "small") -> ConfigDict:
    """Return the config of one of the paper's sizes."""
    config = load_config(f"gidd:{size}")
    config.model.name = "llama"
    config.process.name = "autoregressive"
    config.train.weighting = "elbo"
    return config
