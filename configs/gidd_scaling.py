"""The scaling paper's models (arXiv 2512.10858): time-free, CompleteP, LaProp, uniform noise.

    python -m gidd_jax.train --config=configs/gidd_scaling.py:85M --plan=8xH200
    python -m gidd_jax.train --config=configs/gidd_scaling.py:85M,1e9 --config.data.path=TEXTS \
      --config.data.tokenizer=TOKENIZER --workdir=runs/85M

Argument: the size, 25M (the default), 49M, 85M, 202M, 567M, 3b or 10b (parameters of the blocks;
with the paper's vocabulary of 131,072 tokens embedding and output layer add 134M to 1.2B), and
after a comma the tokens to train on. Without them 20 for each parameter of the blocks: our choice,
not the paper's. Batch size and learning rate follow from the tokens by the paper's laws
(gidd_jax/training/scaling_laws.py), the batch rounded to a power of two rows; `--plan` prints them.

The paper trained on Nemotron-CC with its own tokenizer, which is not in this package; the corpus of
the package is there only to try the config. Other noise: --config.process.shift, -1000 (masks),
-2, 0, 2 or 1000 (uniform).

Hardware: 25M to 202M on one accelerator, the others split with --config.mesh.fsdp; ask --plan.
Expected results: the paper's 10b with uniform noise reaches a training perplexity of 9.15 (2.214
nats a token) after 29,000 steps of 3,072 rows. Nothing of that size has been trained with this
code.
"""

from ml_collections import ConfigDict

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError
from gidd_jax.models.gidd import SIZES
from gidd_jax.training.scaling_laws import advise, best_rate, non_embedding_parameters

SEQ_LEN = 2048
TOKENS_PER_PARAMETER = 20
LARGE_BATCH = 256  # rows from which the paper has a shorter second moment
COOLDOWN = 0.2  # of the steps, as in the models that the paper published


def get_config(argument: str = "25M") -> ConfigDict:
    """Return the config of a size, with the batch and rate that the laws have for its tokens."""
    size, tokens = _parse(argument)
    shape = SIZES[size]
    if tokens is None:
        parameters = non_embedding_parameters(shape["num_layers"], shape["hidden_size"])
        tokens = TOKENS_PER_PARAMETER * parameters
    rows = nearest_power(advise(tokens, SEQ_LEN).batch_rows)
    steps = max(round(tokens / (rows * SEQ_LEN)), 1)

    config = load_config("base")
    config.model.update(
        name="gidd", parametrization="completep", max_seq_len=SEQ_LEN, remat="full", **shape
    )
    # The noise of rows is the paper's; its released code had by_position 0.2 and no empty tokens.
    config.process.update(name="log_snr", shift=1000.0, stratified=False, by_position=0.5)
    config.data.update(mode="packed", givens=0.2, givens_kind="prompt", empty_tokens=0.2)
    config.optimizer.update(
        name="laprop",
        learning_rate=best_rate(rows * SEQ_LEN),
        b2=0.98 if rows >= LARGE_BATCH else 0.99,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=0.0,
        schedule="wsd",
        warmup_steps=min(2000, steps // 2),
        cooldown_steps=int(COOLDOWN * steps),
    )
    config.train.update(
        num_steps=steps,
        batch_size=rows,
        weighting="dynamic",
        max_weight=1000.0,
        aggregation="sum",
        eval_every=1000,
    )
    config.checkpoint.every = 1000
    return config


def nearest_power(rows: float) -> int:
    """Return the power of two that is nearest in ratio, at least 1: any mesh of them divides it."""
    power = 1
    while power * 2**0.5 < rows:
        power *= 2
    return power


def _parse(argument: str) -> tuple[str, int | None]:
    size, *rest = argument.split(",")
    if size not in SIZES or len(rest) > 1:
        raise InputError(
            f"configs/gidd_scaling.py:{argument}: use SIZE or SIZE,TOKENS with one of the sizes "
            f"{', '.join(SIZES)}"
        )
    if not rest:
        return size, None
    try:
        tokens = float(rest[0])
    except ValueError:
        tokens = 0.0
    if not SEQ_LEN <= tokens < 1e15:
        raise InputError(
            f"configs/gidd_scaling.py:{argument}: TOKENS is a number from {SEQ_LEN} to 1e15, such "
            "as 1e9"
        )
    return size, round(tokens)
