"""Hybrid diffusion that starts from a model that is there, instead of from nothing.

    python -m gidd_jax.train --config=configs/adapt.py \
      --config.model.start=HuggingFaceTB/SmolLM2-135M \
      --config.data.path='texts/*.jsonl' --config.data.validation=hash:0.01

The start is a folder or hub name of a Llama, Qwen2 or Qwen3: its attention is opened to both sides,
then uniform noise comes in. Or it is a run or published folder of a diffusion model, such as one of
masks alone: then only the noise changes. docs/adapting.md says more.

Hardware: what a step of the start's size needs; `--plan` says it.
Expected results: docs/adapting.md has those of a small run.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config


def get_config() -> ConfigDict:
    """Return the config."""
    config = load_config("base")
    config.model.update(name="llama", cond_dim=0)  # the start says more; it is told no time
    config.data.update(tokenizer="start", mode="packed")
    config.optimizer.update(learning_rate=1e-4, warmup_steps=200)
    config.train.update(num_steps=10_000, batch_size=64, eval_every=1_000)
    config.adapt.update(attention_steps=1_000, noise_steps=2_000)
    config.checkpoint.every = 500
    return config
