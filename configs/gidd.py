"""GIDD: mask and uniform noise with the dynamic weighting (the paper's GIDD+).

The paper's run on OpenWebText (text files, or shards made once by gidd_jax.prepare_data):

    python -m gidd_jax.train --config=configs/gidd.py:small --config.process.p_uniform=0.1 \
      --config.data.path='openwebtext/*.parquet' --config.data.tokenizer=gpt2 \
      --config.data.validation=last:100000

Argument: the size in layers x width, tiny (8 x 512), small (12 x 768, the default),
base (24 x 1024) or 1B (24 x 2048).

Hardware: a global batch of 512 x 512 tokens for 500k steps, 131 billion tokens in all: 8 GPUs of
80 GB or a TPU v4-16 and larger for small; base and 1B fit with --config.mesh.fsdp=8
--config.mesh.data=1 and --config.model.remat=full, and on few devices with
--config.train.micro_batches=8. To try the config on one machine, keep the corpus of the package:

    python -m gidd_jax.train --config=configs/gidd.py:tiny --config.train.num_steps=1000 \
      --config.optimizer.warmup_steps=100 --config.train.batch_size=32

Expected results: the paper reports a validation perplexity (upper bound) on OpenWebText of 23.05,
23.67 and 24.38 for small with p_uniform = 0, 0.1 and 0.2. These are the paper's numbers; they have
not been reproduced with this code.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError

SIZES = {  # (num_layers, hidden_size, num_heads)
    "tiny": (8, 512, 8),
    "small": (12, 768, 12),
    "base": (24, 1024, 16),
    "1B": (24, 2048, 32),
}


def get_config(size: str = "small") -> ConfigDict:
    """Return the config of one of the paper's sizes."""
    if size not in SIZES:
        raise InputError(f"unknown size {size!r}: use one of {', '.join(SIZES)}")
    config = load_config("base")
    config.model.num_layers, config.model.hidden_size, config.model.num_heads = SIZES[size]
    return config
