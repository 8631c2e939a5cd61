"""A checkpoint folder with random parameters, in seconds: nothing is trained."""

from pathlib import Path

import jax
import jax.numpy as jnp
from tiny_run import tiny_settings

from gidd_jax.checkpoints.checkpoint import Checkpointer
from gidd_jax.data.sources import run_tokenizer
from gidd_jax.inference.gidd import Gidd
from gidd_jax.training.build import build_objective
from gidd_jax.training.step import abstract_params


def random_params(abstract, seed: int = 0):
    """Parameters that make the network's output depend on all of its input."""
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree,
        [0.3 * jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)],
    )


def tiny_model(folder: Path, name: str = "gidd", **changes: object) -> Gidd:
    """A model of the tiny run with random parameters. name: gidd | mdlm | ar."""
    settings = tiny_settings(folder, name, **changes)
    tokenizer = run_tokenizer(settings.data)
    objective = build_objective(settings, tokenizer.vocab_size, tokenizer.mask_id)
    params = random_params(abstract_params(objective))
    return Gidd(  # type: ignore[arg-type]
        objective.model, params, tokenizer, objective.process, row_mode=settings.data.row_mode
    )


def write_checkpoint(
    workdir: Path | str, folder: Path, name: str = "gidd", **changes: object
) -> Gidd:
    """Save such a model as step 3 of a run in `workdir`, and return it."""
    model = tiny_model(folder, name, **changes)
    settings = tiny_settings(folder, name, **changes)
    with Checkpointer(
        workdir, every=1, max_to_keep=1, config=settings.to_dict(), tokenizer=model.tokenizer
    ) as checkpointer:
        checkpointer.save(3, {"step": jnp.int32(3), "params": model.params}, {"next_index": 0})
    return model
