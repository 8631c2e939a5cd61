"""The scaling paper's network against the reference's numbers, in float64 and in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_SCALING
from scaling_models import model_of

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError
from gidd_jax.models.gidd import Block, Cache, TimeFreeTransformer, prompts, sees_prompt
from gidd_jax.parallel import sharding
from gidd_jax.process import LogSnrProcess
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_model
from gidd_jax.training.objective import Noised, Objective

NAMES = ("published", "fanin", "tied")


def arrays_of(name):
    with np.load(GOLDEN_SCALING / f"s01_hf_{name}_io.npz", allow_pickle=False) as file:
        return dict(file)


def logits_of(network, params, ids, positions=None, mask=None, lengths=None):
    def run(params, ids):
        places = jnp.arange(ids.shape[1]) if positions is None else jnp.asarray(positions)
        seen = None if mask is None else jnp.asarray(mask)[:, None]
        h, _ = network.apply({"params": params}, ids, places, seen, lengths, method="run")
        return network.apply({"params": params}, h, method="project")

    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(run)(params, jnp.asarray(ids)))


def kinds_of_call(arrays):
    """Arguments of every forward pass whose logits are stored, by the name of these."""
    kinds = {"logits": {}, "logits_positions": {"positions": arrays["position_ids"]}}
    for name in ("prompt", "block", "random", "empty_rows"):
        if f"mask_{name}" in arrays:
            kinds[f"logits_mask_{name}"] = {"mask": arrays[f"mask_{name}"]}
    queries = np.ones_like(arrays["mask2d"], bool)[..., None]
    kinds["logits_mask2d"] = {"mask": queries & (arrays["mask2d"] == 1)[:, None]}
    return kinds


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_reference(name):
    arrays = arrays_of(name)
    for kind, call in kinds_of_call(arrays).items():
        with jax.enable_x64(True):
            found = logits_of(*model_of(f"s01_hf_{name}", "float64"), arrays["input_ids"], **call)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, arrays[f"{kind}/f64"], atol=1e-10, rtol=0, err_msg=kind)
    single = logits_of(*model_of(f"s01_hf_{name}"), arrays["input_ids"])
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, arrays["logits/f64"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({"soft_cap": 1e9}, 1e-2),
        ({"rms_norm_eps": 1e-5}, 1e-2),
        ({"resid_scale": 8.0}, 0.4),
        ({"head_scale": 1.0}, 1.0),
        ({"rope_theta": 5000.0}, 1e-2),
        ({"weight_scale": 0.5}, 1.0),
        ({"normed_heads": False}, 1.0),
    ],
)
def test_every_constant_is_read(change, least):
    arrays = arrays_of("published")
    network, params = model_of("s01_hf_published")
    found = logits_of(network.clone(**change), params, arrays["input_ids"])
    assert np.abs(found - arrays["logits/f32"]).max() > least


def test_what_layers_get_and_give():
    arrays = arrays_of("published")
    with jax.enable_x64(True):
        network, params = model_of("s01_hf_published", "float64")
        ids = jnp.asarray(arrays["input_ids"])
        h, _ = network.apply({"params": params}, ids, jnp.arange(ids.shape[1]), method="run")
        last = np.asarray(h) / network.head_scale
    np.testing.assert_allclose(last, arrays["hidden_2/f64"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_gives_what_the_references_does(name):
    """hidden_i is what layer i gets: the embedding, then the outputs of the blocks."""
    arrays = arrays_of(name)
    with jax.enable_x64(True):
        network, params = model_of(f"s01_hf_{name}", "float64")
        ids = jnp.asarray(arrays["input_ids"])
        embedded = jnp.asarray(params["vocab_embed"]["embedding"])[ids]
        np.testing.assert_allclose(embedded, arrays["hidden_0/f64"], atol=1e-10, rtol=0)
        inputs = {"params": params}, ids, jnp.arange(ids.shape[1])
        _, state = network.apply(*inputs, method="run", capture_intermediates=is_layer)
    (found, *_), _ = jax.tree.flatten(state["intermediates"])
    assert len(found) == network.num_layers
    for depth in range(1, network.num_layers):  # the last is stored after the last norm
        wanted = arrays[f"hidden_{depth}/f64"]
        np.testing.assert_allclose(found[depth - 1], wanted, atol=1e-10, rtol=0)


def is_layer(module, method):
    return isinstance(module, Block) and method == "__call__"


INITIAL = {
    "completep": {"bulk": 0.4 / 64**0.5, "embedding": 0.02, "output": 0.0},
    "standard": {"bulk": 0.02, "embedding": 0.02, "output": 0.02},
}


@pytest.mark.parametrize("parametrization", INITIAL)
def test_a_new_network_has_the_sizes_of_its_parametrization(parametrization):
    """Width 64; standard errors of these many numbers are below a hundredth."""
    config = load_config("gidd_scaling:25M,1e9")
    shape = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "dtype": "float32"}
    config.model.update(parametrization=parametrization, **shape)
    network = build_model(Settings.from_config(config), 256)
    inputs = jnp.zeros((1, 4), jnp.int32), jnp.zeros(1)
    params = sharding.unbox(jax.jit(network.init)(jax.random.key(0), *inputs))["params"]
    seen = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        values, name = np.asarray(leaf), "/".join(names)
        group = {"vocab_embed": "embedding", "output": "output"}.get(names[0], "bulk")
        if names[-1] not in ("kernel", "embedding"):  # norms are zero-centred, sinks, biases
            group = "zero"
        seen.append(group)
        wanted = INITIAL[parametrization].get(group, 0.0)
        if wanted == 0:
            assert not np.any(values), name
            continue
        layers = values if group == "bulk" else values[None]
        for layer in layers:
            assert abs(layer.mean()) < 0.06 * wanted, name
            assert layer.std() == pytest.approx(wanted, rel=0.05), name
        assert len(np.unique(layers[:, 0].ravel()[:1000])) > 1
        assert not np.array_equal(layers[0], layers[-1]) or len(layers) == 1
    counts = {group: seen.count(group) for group in set(seen)}
    assert counts == {"bulk": 6, "embedding": 1, "output": 1, "zero": 9}


@pytest.mark.parametrize("name", NAMES)
def test_caches_in_pieces_equal_the_whole(name):
    """Three pieces, each with the cache of those before it, under a mask by blocks."""
    arrays = arrays_of(name)
    ids, mask = arrays["input_ids"], arrays["cache_mask"]
    with jax.enable_x64(True):
        network, params = model_of(f"s01_hf_{name}", "float64")
        found, cache = [], None
        for start, end in zip(arrays["cache_splits"], arrays["cache_splits"][1:], strict=False):
            h, new = network.apply(
                {"params": params},
                jnp.asarray(ids[:, start:end]),
                jnp.arange(start, end),
                jnp.asarray(mask[:, start:end, :end])[:, None],
                cache=cache,
                method="run",
            )
            if cache is None:
                # The reference keeps the learned key and value as entry 0.
                skip = int(network.sink)
                by_token = new.keys[0].swapaxes(1, 2), new.values[0].transpose(0, 3, 1, 2)
                for ours, wanted in zip(by_token, ("keys", "values"), strict=True):
                    stored = arrays[f"cache_{wanted}_layer0/f64"][:, skip:]
                    np.testing.assert_allclose(ours, stored, atol=1e-10, rtol=0)
                cache = new
            else:
                keys = jnp.concatenate([cache.keys, new.keys], axis=-2)
                cache = Cache(keys, jnp.concatenate([cache.values, new.values], axis=-1))
            found.append(network.apply({"params": params}, h, method="project"))
    together = np.concatenate(found, axis=1)
    np.testing.assert_allclose(together, arrays["logits_cached/f64"], atol=1e-10, rtol=0)
    np.testing.assert_allclose(together, arrays["logits_cache_full/f64"], atol=1e-10, rtol=0)


def test_a_beginning_at_time_0_is_a_prompt_that_sees_itself_alone():
    network, params = model_of("s01_hf_published")
    ids = jnp.asarray(arrays_of("published")["input_ids"])
    t = jnp.full(ids.shape, 0.5).at[0, :5].set(0.0).at[0, 9].set(0.0)
    is_prompt = np.zeros(ids.shape, bool)
    is_prompt[0, :5] = True  # what is given later, beside noise, sees all
    np.testing.assert_array_equal(prompts(t), is_prompt)
    found = network.apply({"params": params}, ids, t)
    wanted = logits_of(network, params, ids, mask=sees_prompt(jnp.asarray(is_prompt)))
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
    changed = network.apply({"params": params}, ids.at[0, 7].set(50), t)
    np.testing.assert_allclose(changed[0, :5], found[0, :5], atol=1e-5, rtol=0)
    assert np.abs(changed[0, 9] - found[0, 9]).max() > 0.1
    for one_a_row in (jnp.zeros(1), jnp.full(2, 0.3)):
        all_seen = network.apply({"params": params}, ids, one_a_row)
        np.testing.assert_allclose(all_seen, logits_of(network, params, ids), atol=1e-5, rtol=0)


def test_padding_is_seen_by_none():
    network, params = model_of("s01_hf_published")
    ids, lengths = jnp.asarray(arrays_of("published")["input_ids"]), jnp.array([9, 14])
    found = network.apply({"params": params}, ids, jnp.zeros(1), lengths)
    alone = network.apply({"params": params}, ids[:1, :9], jnp.zeros(1))
    np.testing.assert_allclose(found[:1, :9], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("switch", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}])
def test_switches_change_no_number(switch):
    network, params = model_of("s01_hf_published")
    ids = jnp.asarray(arrays_of("published")["input_ids"])

    def loss(params, network):
        return jnp.mean(jnp.square(network.apply({"params": params}, ids, jnp.zeros(1))))

    value, gradient = jax.value_and_grad(loss)(params, network)
    other, gradient2 = jax.value_and_grad(loss)(params, network.clone(**switch))
    np.testing.assert_allclose(value, other, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
        gradient,
        gradient2,
    )


@pytest.mark.parametrize("name", ["published", "tied"])
def test_the_fused_loss_is_that_of_the_logits(name):
    network, params = model_of(f"s01_hf_{name}")
    objective = Objective(
        network, LogSnrProcess(97, 3, shift=1.0), "dynamic", 0.0, 1e3, False, False, False, False
    )
    x = jnp.asarray(arrays_of(name)["input_ids"])
    x = jnp.where(x == 3, 4, x)
    noised = objective.noise(jax.random.key(0), x)
    noised = Noised(noised.z_t, noised.t, jnp.arange(x.shape[1])[None] < jnp.array([[3], [0]]))
    losses = objective.losses(params, x, noised).loss
    total, terms = objective.summed_loss(params, x, noised, jnp.ones(x.shape))
    np.testing.assert_allclose(terms.loss, losses, atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-4)


def test_a_mesh_changes_no_number():
    network, params = model_of("s01_hf_published")
    arrays = arrays_of("published")
    ids = jnp.tile(jnp.asarray(arrays["input_ids"]), (2, 1))
    mesh = sharding.make_mesh(2, 2, 2)
    boxed = jax.eval_shape(network.init, jax.random.key(0), ids, jnp.zeros(1))["params"]
    layout = sharding.state_shardings(boxed, mesh)
    assert layout["blocks"]["sink_key"].spec == jax.sharding.PartitionSpec(None, "tensor", None)
    params = jax.device_put(params, layout)
    with sharding.activate(mesh):
        ids = jax.device_put(ids, sharding.batch_sharding(mesh))
        found = jax.jit(lambda p, i: network.apply({"params": p}, i, jnp.zeros(1)))(params, ids)
    np.testing.assert_allclose(found[:2], arrays["logits/f64"], atol=1e-4, rtol=0)


def test_times_of_another_shape_and_rows_beyond_the_context_are_refused():
    network = TimeFreeTransformer(97, 32, 2, 4, max_seq_len=8)
    ids = jnp.zeros((2, 8), jnp.int32)
    with pytest.raises(InputError, match=r"t has shape \(3,\); give \[2\], \[1\] or \[2, 8\]"):
        jax.eval_shape(network.init, jax.random.key(0), ids, jnp.zeros(3))
    with pytest.raises(InputError, match="exceeds the model's max_seq_len 8"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((2, 9), jnp.int32), jnp.zeros(2))
