"""The autoregressive baseline against transformers' numbers, its cache and its switches."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from gidd_jax.errors import InputError
from gidd_jax.interchange.tensors import TorchTensors, llama_format, params_from_torch
from gidd_jax.models.dit import SIZES
from gidd_jax.models.llama import Llama
from gidd_jax.models.rotary import Llama3RopeScaling, rotary_frequencies

SMALL = {"vocab_size": 67, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
LAYER_TENSORS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


@pytest.fixture(scope="module")
def params(golden):
    return params_from_torch(
        golden("c06_llama_state_dict.safetensors"),
        llama_format(Llama(67, 64, 2, 4).shape, False),
        2,
    )


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("c06_ar.npz")


@pytest.fixture(scope="module")
def ids(arrays):
    return jnp.asarray(arrays["input_ids"], jnp.int32)


def logits_of(params, ids, **changes):
    model = Llama(**(SMALL | changes))
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)({"params": params}, ids)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_logits_equal_transformers(params, arrays, ids, scan_layers):
    logits = logits_of(params, ids, scan_layers=scan_layers)
    np.testing.assert_allclose(logits, arrays["logits_nomask"], atol=1e-5, rtol=0)
    # Padding is on the right and attention is causal: real positions do not see it.
    real = arrays["attention_mask"].astype(bool)
    np.testing.assert_allclose(logits[real], arrays["logits"][real], atol=1e-5, rtol=0)


def test_loss_and_gradient_equal_the_original(params, arrays, ids):
    """The original's loss, whose mask is that of the predicting position."""
    mask = jnp.asarray(arrays["attention_mask"][:, :-1], jnp.float32)

    def loss_of(p):
        log_probs = jax.nn.log_softmax(logits_of(p, ids)[:, :-1])
        nll = -jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(nll * mask) / jnp.sum(mask), nll

    (loss, nll), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    real = arrays["attention_mask"][:, :-1].astype(bool)
    np.testing.assert_allclose(nll[real], arrays["token_nll"][real], atol=1e-5)
    np.testing.assert_allclose(loss, arrays["loss"], rtol=1e-6)
    by_name = TorchTensors(gradient)
    manifest = [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.{name}.weight" for i in range(2) for name in LAYER_TENSORS),
        "model.norm.weight",
        "lm_head.weight",
    ]
    norms = [np.linalg.norm(by_name[name]) for name in manifest]
    np.testing.assert_allclose(norms, arrays["grad_norms"], rtol=2e-5)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_of_the_paper(name):
    expected = json.loads((GOLDEN / "c05_param_counts.json").read_text())[name]
    model = Llama(vocab_size=expected["vocab_size"], **SIZES[name])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 512), jnp.int32))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == expected["ar_llama_total"]


GROUPED = {"num_kv_heads": 2, "intermediate_size": 96, "tie_embeddings": True}


@pytest.fixture(scope="module")
def grouped_params(ids):
    variables = jax.jit(Llama(**SMALL, **GROUPED).init)(jax.random.key(1), ids)
    # Larger than the initialisation, so that attention is not nearly uniform.
    return jax.tree.map(lambda p: 4 * p if p.ndim > 2 else p, nn.unbox(variables["params"]))


def test_grouped_heads_repeat_keys_and_values(grouped_params, ids):
    """Two key-value heads serve two query heads each: the same as their repetition."""
    blocks = dict(grouped_params["blocks"])
    for name in ("key", "value"):
        blocks[name] = {"kernel": jnp.repeat(blocks[name]["kernel"], 2, axis=2)}
    full = logits_of(grouped_params | {"blocks": blocks}, ids, **(GROUPED | {"num_kv_heads": 4}))
    np.testing.assert_allclose(logits_of(grouped_params, ids, **GROUPED), full, atol=1e-5, rtol=0)


def test_tied_embeddings_are_the_output_layer(grouped_params, ids):
    untied = grouped_params | {"output": {"kernel": grouped_params["vocab_embed"]["embedding"].T}}
    logits = logits_of(untied, ids, **(GROUPED | {"tie_embeddings": False}))
    np.testing.assert_allclose(logits_of(grouped_params, ids, **GROUPED), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunks", [(1,) * 32, (5, 1, 26)])
def test_cached_decoding_is_the_full_forward(grouped_params, ids, chunks):
    model = Llama(**SMALL, **GROUPED)

    @jax.jit
    def step(ids, cache, position):
        variables = {"params": grouped_params}
        return model.apply(variables, ids, cache, position, method="decode_step")

    cache = model.init_cache(3, 32)
    logits, position = [], 0
    for size in chunks:
        part, cache = step(ids[:, position : position + size], cache, position)
        logits.append(part)
        position += size
    expected = model.apply({"params": grouped_params}, ids)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, atol=2e-5, rtol=0)


def test_cache_is_checked(grouped_params, ids):
    model = Llama(**SMALL, **GROUPED)
    with pytest.raises(InputError, match=r"cache length is 33; use 1 to max_seq_len \(32\)"):
        model.init_cache(1, 33)
    with pytest.raises(InputError, match="position 30 \\+ 3 tokens exceeds"):
        model.apply(
            {"params": grouped_params},
            ids[:, :3],
            model.init_cache(3, 32),
            30,
            method="decode_step",
        )


def test_llama3_rope_scaling():
    """Short wavelengths kept, long ones stretched, a linear blend of frequencies between."""
    scaling = Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192
    )
    found = np.asarray(rotary_frequencies(128, 500000.0, scaling), np.float64)
    kinds = set()
    for k, frequency in enumerate(found):
        plain = 500000.0 ** (-2 * k / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            kind, expected = "kept", plain
        elif wavelength > 8192 / 1:
            kind, expected = "stretched", plain / 8
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            kind, expected = "blend", (1 - smooth) * plain / 8 + smooth * plain
        kinds.add(kind)
        assert frequency == pytest.approx(expected, rel=2e-5)
    assert kinds == {"kept", "stretched", "blend"}


def test_rope_settings_reach_the_network(params, ids):
    plain = logits_of(params, ids)
    scaling = Llama3RopeScaling(factor=8.0, original_max_len=16)
    assert np.abs(logits_of(params, ids, rope_theta=100.0) - plain).max() > 0.05
    assert np.abs(logits_of(params, ids, rope_scaling=scaling) - plain).max() > 0.05


@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_remat_does_not_change_gradients(params, ids, remat):
    def gradient(**changes):
        return jax.jit(jax.grad(lambda p: jnp.mean(logits_of(p, ids, **changes) ** 2)))(params)

    pairs = zip(jax.tree.leaves(gradient(remat=remat)), jax.tree.leaves(gradient()), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


def test_bfloat16_compute(params, ids):
    """Logits up to 3.7 stay within 0.15 of float32 (0.04 measured)."""
    half = logits_of(params, ids, dtype=jnp.bfloat16)
    full = logits_of(params, ids)
    assert half.dtype == jnp.float32
    assert 1e-4 < np.abs(half - full).max() < 0.15


def test_bad_input_is_named(params, ids):
    with pytest.raises(InputError, match="33 exceeds the model's max_seq_len 32"):
        logits_of(params, jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(InputError, match="num_kv_heads is 3; it must divide num_heads"):
        logits_of(params, ids, num_kv_heads=3)
