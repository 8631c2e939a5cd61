"""The paper's ablation at a small size: share of uniform noise x weighting of the loss x seed.

    python -m gidd_jax.sweep --config=configs/sweeps/ablation.py --workdir=outputs/study

Hardware: 2 CPU cores; 9 runs of a model of 3.7M parameters, 600 steps each, some 3 minutes a run.
docs/study.md has the results. Larger, on an accelerator: --config.base.model.hidden_size=768 and
so on, or another --workdir with --config.base.data.path=TEXTS. More seeds, in the same workdir:
--config.grid.seed='(0, 1)'.

Expected results: those of docs/study.md. At p_uniform = 0 clip and dynamic are one objective (a
mask's ELBO weight 1/(t(1-t)) is at least 4, and clipped to 2): their figures differ by rounding
that grew. The paper reports validation perplexities of 23.05, 23.67 and 24.38 for p_uniform = 0,
0.1 and 0.2 (small model, OpenWebText, 131 billion tokens): perplexities of another corpus,
tokenizer and size are not comparable with those; their order may be.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config


def get_config() -> ConfigDict:
    """Return `base`, a config of gidd_jax.train, and `grid`: the values of what varies."""
    base = load_config("quickstart")
    base.model.update(hidden_size=192, num_heads=6)
    base.optimizer.update(b1=0.9, final_lr_ratio=0.1)
    base.train.num_steps = 600
    base.train.eval_every = 0  # at the end alone
    base.train.eval_batches = 64
    base.checkpoint.max_to_keep = 1
    grid = ConfigDict()
    grid.process = ConfigDict({"p_uniform": (0.0, 0.1, 0.2)})
    grid.train = ConfigDict({"weighting": ("elbo", "clip", "dynamic")})
    grid.seed = (0,)
    return ConfigDict({"base": base, "grid": grid})
