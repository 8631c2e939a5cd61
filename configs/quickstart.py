"""A small GIDD model on the corpus of the package: from nothing to text in minutes on a laptop.

    python -m gidd_jax.train --config=configs/quickstart.py --workdir=outputs/quickstart

Hardware: 2 CPU cores. `make quickstart` runs this, evaluates the model and prints samples.
Expected results: 1.73 bits per byte on the validation documents (an upper bound; the unigram model
of the same tokenizer needs 2.26), and text made of words of the corpus, after 552 s on idle cores.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config


def get_config() -> ConfigDict:
    """Return the config."""
    config = load_config("base")
    config.model.update(
        hidden_size=128, num_layers=4, num_heads=4, cond_dim=64, max_seq_len=128, dtype="float32"
    )
    config.data.mode = "packed"
    # AdamW stays at the unigram model for the few steps that there are; Muon leaves it soon, and
    # the sooner the less it remembers: in a run each, after 250 steps with b1 = 0.8, 600 with 0.95.
    config.optimizer.update(
        name="muon", learning_rate=1e-2, b1=0.8, warmup_steps=60, final_lr_ratio=0.0
    )
    config.train.update(num_steps=2000, batch_size=8, eval_every=500, eval_batches=30)
    config.checkpoint.every = 500
    config.logging.every = 25
    return config
