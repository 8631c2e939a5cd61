"""MDLM (arXiv 2406.07524): masked diffusion with the log-linear schedule, the paper's baseline.

The paper's run on OpenWebText:

    python -m gidd_jax.train --config=configs/mdlm.py:small \
      --config.data.path='openwebtext/*.parquet' --config.data.tokenizer=gpt2 \
      --config.data.validation=last:100000

Argument: the size, as for configs/gidd.py. Hardware: as for configs/gidd.py.

Expected results: the GIDD paper trains this baseline with the same network, data and optimizer.
Its bound equals the mask-only bound of configs/gidd.py (p_uniform = 0) with weighting elbo.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config


def get_config(size: str = "small") -> ConfigDict:
    """Return the config of one of the paper's sizes."""
    config = load_config(f"gidd:{size}")
    config.process.name = "masked"
    config.train.weighting = "elbo"
    return config
