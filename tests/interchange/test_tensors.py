"""Weights of the original and of transformers, into our parameter trees and back."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from gidd_jax.errors import InputError
from gidd_jax.interchange.tensors import (
    TorchTensors,
    dit_format,
    dit_rotary_buffers,
    llama_format,
    params_from_torch,
)
from gidd_jax.models.dit import DiT
from gidd_jax.models.llama import Llama

BUFFERS = {"rotary_emb.cos_cached", "rotary_emb.sin_cached", "logit_bias"}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_training_weights_round_trip_exactly(golden):
    state_dict = golden("c05_dit_strong_state_dict.safetensors")
    assert set(state_dict) > BUFFERS
    back = TorchTensors(params_from_torch(state_dict, dit_format(4), 3))
    assert_same(back, {k: v for k, v in state_dict.items() if k not in BUFFERS})


@pytest.mark.parametrize("folder", ["c05_hf_dit_exact", "c05_hf_dit_sliced"])
def test_published_folders(golden, folder):
    """Logits of the published class; one row per token is written back as it was."""
    state_dict = golden(f"{folder}/model.safetensors")
    config = json.loads((GOLDEN / folder / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    params = params_from_torch(state_dict, dit_format(heads), layers)
    model = DiT(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        cond_dim=config["timestep_cond_dim"],
        max_seq_len=config["max_seq_len"],
    )
    io = golden(f"{folder}/io.npz")
    ids, t = jnp.asarray(io["input_ids"], jnp.int32), jnp.asarray(io["timesteps"], jnp.float32)
    with jax.default_matmul_precision("highest"):
        logits = model.apply({"params": params}, ids, t)
    real = logits[..., : config["vocab_size"]]
    np.testing.assert_allclose(real, io["logits"], atol=5e-6, rtol=0)
    np.testing.assert_array_equal(logits[..., config["vocab_size"] :], 0.0)

    back = TorchTensors(params, vocab_size=config["vocab_size"])
    assert_same(back, {k: v for k, v in state_dict.items() if k not in BUFFERS})


def test_rotary_buffers_equal_the_original(golden):
    state_dict = golden("c05_hf_dit_exact/model.safetensors")
    buffers = dit_rotary_buffers(max_seq_len=32, head_dim=16)
    assert set(buffers) == BUFFERS - {"logit_bias"}
    for name, array in buffers.items():
        assert array.dtype == np.float32
        assert array.shape == state_dict[name].shape
        np.testing.assert_allclose(array, state_dict[name], atol=1e-7, rtol=0)


def test_tree_is_that_of_the_network(golden):
    params = params_from_torch(golden("c05_dit_strong_state_dict.safetensors"), dit_format(4), 3)
    model = DiT(67, 64, num_layers=3, num_heads=4, cond_dim=32)
    inputs = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1,))
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)


def test_bfloat16_weights_become_float32(golden):
    state_dict = golden("c05_dit_strong_state_dict.safetensors")
    half = {name: array.astype(jnp.bfloat16) for name, array in state_dict.items()}
    back = TorchTensors(params_from_torch(half, dit_format(4), 3))
    assert_same(back, {k: half[k].astype(np.float32) for k in half if k not in BUFFERS})


def test_llama_round_trips_exactly(golden):
    state_dict = golden("c06_llama_state_dict.safetensors")
    assert_same(
        TorchTensors(
            params_from_torch(state_dict, llama_format(Llama(67, 64, 2, 4).shape, False), 2)
        ),
        state_dict,
    )


def test_llama_with_grouped_heads_and_tied_embeddings(golden):
    state_dict = golden("c06_llama_state_dict.safetensors")
    for i in range(2):
        for name in ("k_proj", "v_proj"):
            key = f"model.layers.{i}.self_attn.{name}.weight"
            state_dict[key] = state_dict[key][:32]
    state_dict["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    params = params_from_torch(state_dict, llama_format(Llama(67, 64, 2, 4, 2).shape, True), 2)
    assert params["blocks"]["key"]["kernel"].shape == (2, 64, 2, 16)
    assert "output" not in params
    ignored = {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    back = TorchTensors(params)
    assert_same(back, {k: v for k, v in state_dict.items() if k not in ignored})


def test_wrong_names_are_named(golden):
    state_dict = golden("c05_dit_strong_state_dict.safetensors")
    with pytest.raises(InputError, match=r"missing nothing; unknown blocks\.2\..* and 5 more"):
        params_from_torch(state_dict, dit_format(4), 2)
    del state_dict["blocks.1.norm1.weight"]
    state_dict["surprise"] = np.zeros(1, np.float32)
    with pytest.raises(InputError, match=r"missing blocks\.1\.norm1\.weight; unknown surprise"):
        params_from_torch(state_dict, dit_format(4), 3)
    with pytest.raises(InputError, match="an axis of 192 does not split into"):
        params_from_torch(golden("c05_dit_strong_state_dict.safetensors"), dit_format(5), 3)
    llama = golden("c06_llama_state_dict.safetensors")
    del llama["lm_head.weight"]
    with pytest.raises(InputError, match=r"missing lm_head\.weight; unknown nothing"):
        params_from_torch(llama, llama_format(Llama(67, 64, 2, 4).shape, False), 2)
