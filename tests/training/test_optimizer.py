"""Schedules against the original's numbers, AdamW against torch's rule, Muon and PSGD per layer."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gidd_jax.cli import load_config
from gidd_jax.models.dit import DiT
from gidd_jax.models.gidd import TimeFreeTransformer
from gidd_jax.models.llama import Llama
from gidd_jax.settings import OptimizerSettings, Settings
from gidd_jax.training.optimizer import _clip, _muon_labels, learning_rate, make_optimizer

PAPER = OptimizerSettings(
    name="adamw",
    learning_rate=5e-4,
    b1=0.9,
    b2=0.99,
    eps=1e-9,
    weight_decay=0.02,
    clip_norm=1.0,
    norm_decay=0.0,
    bias_decay=0.0,
    skip_above=0.0,
    warmup_steps=10_000,
    cooldown_steps=0,
    schedule="cosine",
    final_lr_ratio=0.1,
    ema_decay=0.0,
)
STANDARD = Settings.from_config(load_config("base")).model


def settings(**changes) -> OptimizerSettings:
    return dataclasses.replace(PAPER, **changes)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("case", "peak", "warmup", "total"), [(0, 5e-4, 10_000, 500_000), (1, 1e-3, 100, 1_000)]
)
def test_schedule_matches_the_original(golden, schedule, case, peak, warmup, total):
    arrays = golden("c08_utils.npz")
    rate = learning_rate(
        settings(schedule=schedule, learning_rate=peak, warmup_steps=warmup), total
    )
    np.testing.assert_allclose(
        jax.jit(jax.vmap(rate))(arrays[f"lr/{case}/steps"].astype(np.int32)),
        arrays[f"lr/{case}/{schedule}"],
        rtol=1e-6,
    )


def test_schedule_stays_at_its_end_and_needs_no_warmup():
    rate = learning_rate(settings(warmup_steps=0), 10)
    np.testing.assert_allclose(rate(0), 5e-4, rtol=1e-6)
    np.testing.assert_allclose([rate(10), rate(99)], 5e-5, rtol=1e-6)


def test_adamw_is_torchs_with_decay_on_every_parameter():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 3)), "bias": rng.normal(size=(3,)), "s": rng.normal(size=())}
    grads = [jax.tree.map(lambda p: rng.normal(size=p.shape) * 3, params) for _ in range(6)]
    config = settings(learning_rate=1e-2, warmup_steps=3, schedule="linear")

    tx = make_optimizer(config, STANDARD, 8)
    ours = jax.tree.map(jnp.float32, params)
    state = tx.init(ours)
    for grad in grads:
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.float32, grad), state, ours)
        ours = optax.apply_updates(ours, updates)

    rates = [0, 1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2 * 4 / 5, 1e-2 * 3 / 5]
    expected = _torch_adamw(params, grads, rates, config)
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-6, atol=1e-7)
        assert np.abs(value - params[name]).max() > 1e-3  # something was learned


def _torch_adamw(params, grads, rates, config):
    """Return the parameters after clip_grad_norm_ and torch.optim.AdamW, in float64."""
    params = dict(params)
    m, v = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    for i, (grad, rate) in enumerate(zip(grads, rates, strict=True)):
        norm = np.sqrt(sum(np.sum(g**2) for g in grad.values()))
        for k in params:
            g = grad[k] * min(1.0, config.clip_norm / norm)
            m[k] = config.b1 * m[k] + (1 - config.b1) * g
            v[k] = config.b2 * v[k] + (1 - config.b2) * g**2
            step = (m[k] / (1 - config.b1 ** (i + 1))) / (
                np.sqrt(v[k] / (1 - config.b2 ** (i + 1))) + config.eps
            )
            params[k] = params[k] * (1 - rate * config.weight_decay) - rate * step
    return params


def test_gradients_within_the_norm_stay_as_they_are():
    """AdamW's first steps would not tell: it forgets the scale."""
    clip = _clip(2.0)
    small = {"a": jnp.array([0.6, -0.8]), "b": jnp.array([[1.5]])}  # norm 1.8
    large = jax.tree.map(lambda g: 100 * g, small)
    state = clip.init(small)
    kept, scaled = clip.update(small, state)[0], clip.update(large, state)[0]
    for name, value in small.items():
        np.testing.assert_array_equal(kept[name], value)
        norm = np.sqrt(0.6**2 + 0.8**2 + 1.5**2)
        np.testing.assert_allclose(scaled[name], 2.0 * value / norm, rtol=1e-6)


def test_clipping_can_be_off():
    tx = make_optimizer(settings(clip_norm=0.0), STANDARD, 10)
    grads = {"a": jnp.full((4,), 30.0), "b": jnp.full((9,), 40.0)}
    _, state = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["a"], 3.0, rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    tx = make_optimizer(settings(name="adamw", clip_norm=2.0), STANDARD, 10)
    grads = {"a": jnp.full((4,), 30.0), "b": jnp.full((9,), 40.0)}
    _, state = tx.update(grads, tx.init(grads), grads)
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(mu), 0.1 * 2.0, rtol=1e-6)


def zeros_of(model: nn.Module, *inputs: jax.Array, unbox: bool = True):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nn.unbox(shapes) if unbox else shapes)


IDS = jnp.zeros((1, 8), jnp.int32)
DIT = DiT(vocab_size=40, hidden_size=16, num_layers=3, num_heads=2, cond_dim=8, max_seq_len=8)
LLAMA = Llama(vocab_size=40, hidden_size=16, num_layers=3, num_heads=2, max_seq_len=8)


@pytest.fixture(scope="module")
def params():
    return zeros_of(DIT, IDS, jnp.ones(1))


@pytest.mark.parametrize(
    ("model", "inputs", "names"),
    [
        (DIT, (IDS, jnp.ones(1)), "qkv attn_out modulation mlp_in mlp_out"),
        (LLAMA, (IDS,), "query key value attn_out mlp_gate mlp_in mlp_out"),
    ],
)
def test_muon_takes_every_matrix_of_the_blocks_and_nothing_else(model, inputs, names):
    params = zeros_of(model, *inputs)
    labels = jax.tree_util.tree_leaves_with_path(_muon_labels(params))
    chosen = {jax.tree_util.keystr(path) for path, label in labels if label == "muon"}
    assert chosen == {f"['blocks']['{name}']['kernel']" for name in names.split()}
    make_optimizer(settings(name="muon"), STANDARD, 10).init(params)  # knows the axes of each


@pytest.mark.parametrize("name", ["adamw", "laprop", "psgd", "muon"])
def test_state_of_boxed_parameters_unboxes_to_the_state_of_plain_ones(name):
    """Initialising with flax's boxes is how the moments get the shardings of the parameters."""
    tx = make_optimizer(settings(name=name), STANDARD, 10)
    boxed = nn.unbox(tx.init(zeros_of(DIT, IDS, jnp.ones(1), unbox=False)))
    plain = tx.init(zeros_of(DIT, IDS, jnp.ones(1)))
    assert jax.tree.structure(boxed) == jax.tree.structure(plain)
    assert jax.tree.map(jnp.shape, boxed) == jax.tree.map(jnp.shape, plain)


def test_muon_orthogonalises_each_matrix_of_each_layer(params):
    blocks = {name: params["blocks"][name] for name in ("qkv", "attn_out")}
    params = {"blocks": blocks, "vocab_embed": params["vocab_embed"]}
    keys = iter(jax.random.split(jax.random.key(1), 100))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    config = settings(name="muon", learning_rate=1.0, schedule="constant", weight_decay=0.0)
    tx = make_optimizer(config, STANDARD, 10)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)

    blocks = updates["blocks"]
    qkv = blocks["qkv"]["kernel"]  # [3 layers, 16, 3, 2, 8]
    out = blocks["attn_out"]["kernel"]  # [3, 2, 8, 16]
    matrices = [qkv[i, :, j].reshape(16, 16) for i in range(3) for j in range(3)]
    matrices += [out[i].reshape(16, 16) for i in range(3)]
    for matrix in matrices:
        # Newton-Schulz leaves the singular values near 1; the update is 0.2 * sqrt(longer side).
        scaled = matrix / (0.2 * np.sqrt(max(matrix.shape)))
        values = np.linalg.svd(scaled, compute_uv=False)
        assert values.min() > 0.5
        assert values.max() < 1.3
    # AdamW's first step is the sign of the gradient.
    table = updates["vocab_embed"]["embedding"]
    np.testing.assert_allclose(np.abs(table), 1.0, rtol=1e-2)


@pytest.mark.parametrize("name", ["adamw", "laprop", "psgd", "muon"])
def test_every_optimizer_fits_a_stack_of_linear_layers(name):
    """Two layers stacked as a scan stacks them, an ill-conditioned target each."""
    scales = jnp.logspace(-1, 0, 8)
    x = jax.random.normal(jax.random.key(0), (2, 64, 8)) * scales[None, None, :]
    y = jnp.einsum("lbi,lio->lbo", x, jax.random.normal(jax.random.key(1), (2, 8, 8)))
    params = {"blocks": {"mlp_in": {"kernel": jnp.zeros((2, 8, 8)), "bias": jnp.zeros((2, 8))}}}

    def loss(params):
        layer = params["blocks"]["mlp_in"]
        predicted = jnp.einsum("lbi,lio->lbo", x, layer["kernel"]) + layer["bias"][:, None]
        return jnp.mean(jnp.square(predicted - y))

    config = settings(name=name, learning_rate=0.1, warmup_steps=2, weight_decay=0.0)
    tx = make_optimizer(config, STANDARD, 200)

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    with jax.numpy_rank_promotion("allow"):  # psgdax relies on it
        _, losses = jax.lax.scan(step, (params, tx.init(params)), length=200)
    assert losses[-1] < 0.02 * losses[0]


def test_psgd_preconditions_every_layer_by_itself():
    params = {
        "blocks": {"mlp_in": {"kernel": jnp.zeros((3, 4, 6))}},
        "output": {"kernel": jnp.zeros((4, 6))},
    }
    with jax.numpy_rank_promotion("allow"):
        state = make_optimizer(settings(name="psgd"), STANDARD, 10).init(params)
    factors = optax.tree.get(state, "Qs_preconditioners")
    assert [q.shape for q in factors["blocks"]["mlp_in"]["kernel"]] == [(3, 4, 4), (3, 6)]
    assert [q.shape for q in factors["output"]["kernel"]] == [(4, 4), (6,)]


def test_a_large_gradient_changes_nothing():
    """Neither parameters nor moments nor the count that the learning rate follows."""
    params = {"w": jnp.ones((2, 3))}
    grads = {"w": jnp.full((2, 3), 0.5)}
    plain = make_optimizer(settings(warmup_steps=2), STANDARD, 10)
    careful = make_optimizer(settings(warmup_steps=2, skip_above=2.0), STANDARD, 10)
    want_state, state = plain.init(params), careful.init(params)
    for norm in (1.0, 2.0, 2.5, jnp.inf, jnp.nan, 0.5):
        updates, state = careful.update(grads, state, params, grad_norm=jnp.float32(norm))
        if norm <= 2.0:
            want, want_state = plain.update(grads, want_state, params, grad_norm=jnp.float32(norm))
            np.testing.assert_allclose(updates["w"], want["w"], rtol=1e-6)
        else:
            np.testing.assert_array_equal(updates["w"], np.zeros((2, 3)))
    for got, want in zip(*map(jax.tree.leaves, (state.inner_state, want_state)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.fixture(params=["f64", "f32"])
def precision(request):
    """A kind of arrays of the scaling paper's code, and how near to them the same comes."""
    with jax.enable_x64(request.param == "f64"):
        yield request.param, {"f64": 1e-12, "f32": 1e-5}[request.param]


@pytest.mark.parametrize("case", range(4))
def test_wsd_is_the_scaling_papers(golden_scaling, precision, case):
    kind, rtol = precision
    arrays = golden_scaling("s07_optimizer.npz")
    total, peak, warmup, cooldown = arrays["wsd_cases"][case].tolist()
    config = settings(
        schedule="wsd", learning_rate=peak, warmup_steps=int(warmup), cooldown_steps=int(cooldown)
    )
    rate = jax.vmap(learning_rate(config, int(total)))
    wanted = arrays.get(f"wsd/{case}/{kind}", arrays.get(f"wsd/{case}"))
    found = rate(np.arange(len(wanted), dtype=np.int32))
    assert found.dtype == jnp.zeros(()).dtype
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=1e-3 * rtol)


# The third case adds a constant under the root, which no run of the paper does and no key sets.
@pytest.mark.parametrize("case", range(2))
def test_laprop_is_the_scaling_papers(golden_scaling, precision, case):
    kind, rtol = precision
    arrays = golden_scaling("s07_optimizer.npz")
    b1, b2, eps, _ = arrays["laprop_cases"][case].tolist()
    grads = jnp.asarray(arrays["laprop/grads"], float)
    config = settings(
        name="laprop", b1=b1, b2=b2, eps=eps, weight_decay=0.0, clip_norm=0.0,
        learning_rate=1.0, schedule="constant",
    )  # fmt: skip
    tx = make_optimizer(config, STANDARD, 10)
    state = tx.init(grads[0])
    for number, grad in enumerate(grads, 1):
        update, state = tx.update(grad, state, grad)
        want = arrays[f"laprop/{case}/updates/{kind}"][number - 1]
        np.testing.assert_allclose(-update, want, rtol=rtol, atol=rtol)
        # The reference stores the average already corrected for its start.
        nu = optax.tree.get(state, "nu") / (1 - b2**number)
        want = arrays[f"laprop/{case}/nu/{kind}"][number - 1]
        np.testing.assert_allclose(nu, want, rtol=10 * rtol, atol=1e-15)


def test_decay_of_laprop_is_the_scaling_papers(golden_scaling, monkeypatch, precision):
    kind, rtol = precision
    arrays = golden_scaling("s07_optimizer.npz")
    config = settings(name="laprop", eps=1e-8, weight_decay=0.05, clip_norm=0.0)
    monkeypatch.setattr(
        "gidd_jax.training.optimizer.learning_rate", lambda *_: lambda step: 0.1 / (1 + step)
    )
    tx = make_optimizer(config, STANDARD, 10)
    params = jnp.asarray(arrays["lapropw/params"], float)
    state = tx.init(params)
    wanted = arrays[f"lapropw/trajectory/{kind}"]
    for grad, want in zip(jnp.asarray(arrays["laprop/grads"], float), wanted, strict=True):
        update, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, update)
        np.testing.assert_allclose(params, want, rtol=rtol, atol=rtol / 10)


COMPLETEP = dataclasses.replace(
    STANDARD, name="gidd", parametrization="completep", hidden_size=8, num_layers=2, num_heads=2
)
GROUPS = {
    "['blocks']['attn_out']['kernel']": "bulk",
    "['blocks']['key']['kernel']": "bulk",
    "['blocks']['key_norm']['scale']": "norm",
    "['blocks']['mlp_in']['bias']": "bias",
    "['blocks']['mlp_in']['kernel']": "bulk",
    "['blocks']['mlp_out']['bias']": "bias",
    "['blocks']['mlp_out']['kernel']": "bulk",
    "['blocks']['norm1']['scale']": "norm",
    "['blocks']['norm2']['scale']": "norm",
    "['blocks']['query']['kernel']": "bulk",
    "['blocks']['query_norm']['scale']": "norm",
    "['blocks']['sink_key']": "bias",
    "['blocks']['sink_value']": "bias",
    "['blocks']['value']['kernel']": "bulk",
    "['final_norm']['scale']": "norm",
    "['output']['kernel']": "embedding",
    "['vocab_embed']['embedding']": "embedding",
}


@pytest.mark.parametrize("name", ["adamw", "laprop"])
def test_completep_scales_rate_decay_and_eps_by_group(name):
    """The first step of both is g / (|g| + eps), with eps / (width * depth) here of g's size."""
    config = settings(
        name=name, learning_rate=0.5, schedule="constant", eps=0.16, weight_decay=0.3,
        norm_decay=0.2, bias_decay=0.1, clip_norm=0.0,
    )  # fmt: skip
    model = TimeFreeTransformer(vocab_size=11, hidden_size=8, num_layers=2, num_heads=2)
    params = jax.tree.map(lambda p: p + 2.0, zeros_of(model, IDS, jnp.ones(1)))
    grads = jax.tree.map(lambda p: jnp.full(p.shape, -0.03), params)
    tx = make_optimizer(config, COMPLETEP, 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    step = -0.03 / (0.03 + 0.01)
    wanted = {
        "bulk": -0.5 / 8 * (step + 8 * 0.3 * 2),
        "norm": -0.5 * 0.02 * (step + 0.2 * 2),
        "bias": -0.5 * 0.02 * (step + 0.1 * 2),
        "embedding": -0.5 * 0.02 * step,
    }
    found = {jax.tree_util.keystr(k): u for k, u in jax.tree_util.tree_leaves_with_path(updates)}
    assert set(found) == set(GROUPS)
    for path, update in found.items():
        np.testing.assert_allclose(update, wanted[GROUPS[path]], rtol=1e-4, err_msg=path)
