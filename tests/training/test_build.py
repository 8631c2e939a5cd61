"""Every config that is shipped builds its objective."""

import jax
import jax.numpy as jnp
import pytest

from gidd_jax.cli import config_folder, load_config
from gidd_jax.models import dit
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_objective
from gidd_jax.training.step import abstract_params

CONFIGS = sorted(path.stem for path in config_folder().glob("*.py"))
SHIPPED = [*CONFIGS, *(f"{name}:{size}" for name in ("gidd", "mdlm", "ar") for size in dit.SIZES)]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_builds_its_objective(name):
    settings = Settings.from_config(load_config(name))
    objective = build_objective(settings, 4096, 2)
    shapes = abstract_params(objective)
    model = settings.model
    assert shapes["vocab_embed"]["embedding"].shape == (4096, model.hidden_size)
    assert shapes["blocks"]["norm1"]["scale"].shape == (model.num_layers, model.hidden_size)
    ids = jax.ShapeDtypeStruct((2, model.max_seq_len), jnp.int32)
    times = () if objective.process is None else (jax.ShapeDtypeStruct((2,), jnp.float32),)
    logits = jax.eval_shape(objective.apply, shapes, ids, *times)
    assert logits.shape == (2, model.max_seq_len, 4096)
    assert logits.dtype == jnp.float32
