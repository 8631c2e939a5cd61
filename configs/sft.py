"""Instruction tuning: answers to prompts, with a model that is there.

    python -m gidd_jax.train --config=configs/sft.py --config.model.start=outputs/adapted \
      --config.data.path=instructions.jsonl

The corpus is .jsonl or .parquet whose records hold `prompt` and `answer`, or `messages`, which the
chat template of the start's tokenizer writes. Prompts are given; the bound is that of the answers.
docs/adapting.md says more.

Hardware: what a step of the start's size needs; `--plan` says it.
Expected results: docs/adapting.md has those of a small task.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config


def get_config() -> ConfigDict:
    """Return the config."""
    config = load_config("base")
    config.model.update(name="llama", cond_dim=0)  # the start says more
    config.data.update(tokenizer="start", mode="answers")
    config.optimizer.update(learning_rate=1e-4, warmup_steps=100)
    # Most of a row is often filling: unweighted, its end token would be most of the loss.
    config.train.update(num_steps=3_000, batch_size=64, eval_every=500, padding_weight=0.1)
    config.checkpoint.every = 500
    return config
