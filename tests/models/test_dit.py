"""The denoising network against the original's numbers, and its compile-time switches."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from gidd_jax.errors import InputError
from gidd_jax.interchange.tensors import TorchTensors, dit_format, params_from_torch
from gidd_jax.loss import gidd_loss, token_mean
from gidd_jax.models import dit
from gidd_jax.models.conditioning import time_features
from gidd_jax.models.dit import SIZES, DiT, padded_vocab_size
from gidd_jax.process import HybridProcess

SMALL = {
    "vocab_size": 67,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "cond_dim": 32,
    "max_seq_len": 32,
}


@pytest.fixture(scope="module")
def params(golden):
    """The weights named 'strong' in the golden files: every path through the network matters."""
    return params_from_torch(golden("c05_dit_strong_state_dict.safetensors"), dit_format(4), 3)


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("c05_dit_forward.npz")


@pytest.fixture(scope="module")
def z_t(arrays):
    return jnp.asarray(arrays["z_t"], jnp.int32)


@pytest.fixture(scope="module")
def t(arrays):
    return jnp.asarray(arrays["t"], jnp.float32)


def logits_of(params, z_t, t, **changes):
    model = DiT(**(SMALL | changes))
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)({"params": params}, z_t, t)


# 5e-6 is tight enough to see a layer norm eps of 1e-6 (2.5e-5) or the exact GELU (3.9e-4).
@pytest.mark.parametrize("scan_layers", [True, False])
def test_logits_equal_the_original(params, arrays, z_t, t, scan_layers):
    logits = logits_of(params, z_t, t, scan_layers=scan_layers)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, arrays["strong/logits_f64arith"], atol=5e-6, rtol=0)


def test_one_time_for_all_rows(params, arrays, z_t, t):
    logits = logits_of(params, z_t, t[2:3])
    np.testing.assert_allclose(logits, arrays["strong/logits_t_shape1"], atol=5e-6, rtol=0)


def test_shorter_sequences(params, arrays, z_t, t):
    logits = logits_of(params, z_t[:, :20], t)
    np.testing.assert_allclose(logits, arrays["strong/logits_short"], atol=5e-6, rtol=0)


def test_activations_equal_the_original(params, arrays, z_t, t):
    with jax.default_matmul_precision("highest"):
        _, captured = DiT(**SMALL).apply(
            {"params": params}, z_t, t, capture_intermediates=True, mutable=["intermediates"]
        )
    found = captured["intermediates"]
    blocks = found["blocks"]["__call__"][0][0]
    pairs = {
        "vocab_embed": found["vocab_embed"]["__call__"][0],
        "sigma_map": found["time_embed"]["__call__"][0],
        "block0": blocks[0],
        "block1": blocks[1],
        "block2": blocks[2],
        "norm_final": found["final_norm"]["__call__"][0],
    }
    for name, array in pairs.items():
        np.testing.assert_allclose(
            array, arrays[f"strong/act_{name}"], atol=5e-6, rtol=0, err_msg=name
        )


def test_time_features(arrays):
    t = jnp.asarray(arrays["timestep_embedding/t"], jnp.float32)
    np.testing.assert_allclose(time_features(t), arrays["timestep_embedding/emb"], atol=2e-7)


def test_features_then_project_is_the_network(params, z_t, t):
    model = DiT(**SMALL)
    h = model.apply({"params": params}, z_t, t, method="features")
    assert h.shape == (3, 32, 64)
    logits = model.apply({"params": params}, h, method="project")
    np.testing.assert_array_equal(logits, model.apply({"params": params}, z_t, t))


def parameter_count(model, *inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_of_the_paper(name):
    expected = json.loads((GOLDEN / "c05_param_counts.json").read_text())[name]
    model = DiT(vocab_size=expected["vocab_size"], **SIZES[name])
    count = parameter_count(model, jnp.zeros((1, 512), jnp.int32), jnp.zeros((1,)))
    assert count == expected["total"]
    assert padded_vocab_size(expected["vocab_size"]) == expected["rounded_vocab_size"]


def test_initialisation_is_the_original_one():
    """Uniform within 1/sqrt(fan_in), adaptive layer norms and the output layer zero."""
    model = DiT(vocab_size=300, hidden_size=64, num_layers=2, num_heads=4, cond_dim=32)
    inputs = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1,))
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    params = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(variables["params"]))
    }
    zero = {k for k in params if "modulation" in k or k.startswith("output/")}
    fan_in = {"mlp_out": 256, "time_embed/input": 256, "time_embed/output": 32}
    for name, array in params.items():
        assert array.dtype == np.float32
        if name in zero:
            assert not array.any(), name
        elif name.endswith("scale"):
            np.testing.assert_array_equal(array, 1.0, err_msg=name)
        else:
            bound = next((f for k, f in fan_in.items() if k in name), 64) ** -0.5
            assert np.abs(array).max() <= bound, name
            # Standard deviation of a uniform variable; four standard errors.
            error = 4 * 0.45 * bound / np.sqrt(array.size)
            assert abs(array.std() - bound / np.sqrt(3)) < error, name
    np.testing.assert_array_equal(  # the layers do not start equal
        np.ptp(params["blocks/mlp_in/kernel"], axis=0) > 0, True
    )


def gradient_of(params, z_t, t, **changes):
    def loss(p):
        return jnp.mean(jnp.square(logits_of(p, z_t, t, **changes)))

    return jax.jit(jax.grad(loss))(params)


@pytest.fixture(scope="module")
def plain_gradient(params, z_t, t):
    return gradient_of(params, z_t, t, scan_layers=False, remat="none")


@pytest.mark.parametrize("remat", ["none", "full", "attention", "dots"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_switches_do_not_change_gradients(params, plain_gradient, z_t, t, scan_layers, remat):
    found = gradient_of(params, z_t, t, scan_layers=scan_layers, remat=remat)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


def test_what_a_layer_computes_again_is_what_it_was(params, z_t, t, monkeypatch):
    """Only products are kept, in their own dtype: in 16 bits gradients are as near as without."""

    def gradients(dtype):
        leaves = jax.tree.leaves(gradient_of(params, z_t, t, dtype=dtype))
        return np.concatenate([np.ravel(leaf) for leaf in leaves])

    kept, parts, low_parts = (
        saved_bytes(params, z_t, t),
        gradients(jnp.float32),
        gradients(jnp.bfloat16),
    )
    monkeypatch.setattr(dit, "recomputed", lambda part: part)
    assert kept < 0.6 * saved_bytes(params, z_t, t)
    whole, low_whole = gradients(jnp.float32), gradients(jnp.bfloat16)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6 * np.abs(whole).max())
    errors = [np.linalg.norm(low - whole) / np.linalg.norm(whole) for low in (low_parts, low_whole)]
    assert errors[0] < 1.05 * errors[1] < 0.05, errors


def test_gradients_equal_the_original(params, golden, arrays, z_t, t):
    """Of the original's loss by every parameter: sensitive to every path of the backward pass."""
    process = HybridProcess(vocab_size=67, mask_id=66, p_uniform=0.1)
    x = jnp.asarray(arrays["input_ids"], jnp.int32)

    def loss_of(p):
        loss = gidd_loss(
            process,
            logits_of(p, z_t, t),
            x,
            z_t,
            t,
            weighting="dynamic_v1_1",
            keep_padding_columns=True,
        )
        return token_mean(loss.loss)

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    np.testing.assert_allclose(loss, arrays["strong/loss_f64arith"], rtol=2e-6)
    found, expected = TorchTensors(gradient), golden("c05_dit_strong_grads.safetensors")
    assert set(found) == set(expected)
    for name, array in expected.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(found[name], array, atol=2e-5 * scale, rtol=0, err_msg=name)


def saved_bytes(params, z_t, t, **changes):
    """Bytes kept between the forward and the backward pass, parameters and inputs aside."""
    model = DiT(**(SMALL | changes))

    def forward(p):
        return jax.vjp(lambda p: model.apply({"params": p}, z_t, t), p)

    _, vjp = jax.eval_shape(forward, params)
    own = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp)) - own


@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_keeps_less(params, z_t, t, scan_layers):
    kept = {
        remat: saved_bytes(params, z_t, t, scan_layers=scan_layers, remat=remat, attention="splash")
        for remat in ("none", "dots", "attention", "full")
    }
    assert kept["full"] < kept["attention"] < kept["dots"] < kept["none"]


def test_bfloat16_compute(params, z_t, t):
    """8 bits of mantissa through three layers: logits up to 4.4 stay within 0.1 (0.03 measured)."""
    full = logits_of(params, z_t, t)
    half = logits_of(params, z_t, t, dtype=jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 1e-4 < np.abs(half - full).max() < 0.1
    shapes = jax.eval_shape(lambda p: gradient_of(p, z_t, t, dtype=jnp.bfloat16), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_bad_input_is_named(params, z_t, t):
    with pytest.raises(InputError, match="33 exceeds the model's max_seq_len 32"):
        logits_of(params, jnp.zeros((1, 33), jnp.int32), t[:1])
    with pytest.raises(InputError, match=r"t has shape \(2,\); give \[3\], \[1\] or \[3, 32\]"):
        logits_of(params, z_t, t[:2])
    with pytest.raises(InputError, match="use one of none, full, attention, dots"):
        logits_of(params, z_t, t, remat="some")
    with pytest.raises(InputError, match="use 'xla', 'cudnn', 'splash' or ''"):
        logits_of(params, z_t, t, attention="flash")
    with pytest.raises(InputError, match="hidden_size 64 with num_heads 5"):
        logits_of(params, z_t, t, num_heads=5)


def test_padding_beyond_the_lengths_is_not_seen(params, z_t, t):
    lengths = jnp.int32([5, 9, 32])[: len(z_t)]
    model = DiT(**SMALL)
    apply = jax.jit(model.apply)
    with jax.default_matmul_precision("highest"):
        logits = apply({"params": params}, z_t, t, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = apply({"params": params}, z_t[row : row + 1, :length], t[row : row + 1])
            np.testing.assert_allclose(logits[row, :length], alone[0], atol=1e-5, rtol=0)
