"""The golden models of the scaling paper's reference, as our networks."""

import json

import jax
import jax.numpy as jnp
from conftest import GOLDEN_SCALING

from gidd_jax.interchange.fields import Fields
from gidd_jax.interchange.gidd_config import gidd_network
from gidd_jax.interchange.tensors import gidd_format, params_from_torch
from gidd_jax.interchange.weight_files import read_safetensors


def model_of(folder, dtype="float32"):
    """The network of a golden folder, and its parameters as NumPy arrays."""
    file = GOLDEN_SCALING / folder / "config.json"
    network = gidd_network(Fields(file, json.loads(file.read_text())))
    form = gidd_format(
        network.num_heads,
        normed_heads=network.normed_heads,
        sink=network.sink,
        mlp_bias=network.mlp_bias,
        tie_embeddings=network.tie_embeddings,
    )
    params = params_from_torch(read_safetensors(file.parent)[0], form, network.num_layers)
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    return network.clone(dtype=jnp.dtype(dtype)), params
