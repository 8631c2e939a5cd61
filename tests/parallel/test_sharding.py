"""Meshes of eight virtual devices compute what one device computes."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from gidd_jax.errors import InputError
from gidd_jax.models import dit, llama
from gidd_jax.models.dit import DiT
from gidd_jax.models.layers import Embedding, constrain
from gidd_jax.models.llama import Llama
from gidd_jax.models.rotary import rotary_frequencies, rotary_tables
from gidd_jax.parallel.sharding import (
    MESH_AXES,
    activate,
    batch_sharding,
    check_batch_size,
    make_mesh,
    replicated,
    state_shardings,
    unbox,
)

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
SIZE = {"vocab_size": 67, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 16}
KIN = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_norms": True}
IDS = jax.random.randint(jax.random.key(1), (8, 16), 0, 67)
TIMES = jnp.linspace(0.1, 0.9, 8)
MODELS = {
    "dit": (DiT(**SIZE, cond_dim=32), (IDS, TIMES)),
    # A vocabulary of 67 rows divides by no mesh axis.
    "llama": (Llama(**SIZE, **KIN, num_kv_heads=2, intermediate_size=96), (IDS,)),
}


def boxed_params(model, inputs):
    """Random parameters with their axis names, none of them zero."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), boxed)


def loss_and_logits(model, inputs):
    def run(params):
        logits = model.apply({"params": params}, *inputs)
        return jnp.mean(jnp.square(logits - 1.0)), logits

    return run


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """Model, inputs, boxed parameters, and ((loss, logits), gradient) on one device."""
    model, inputs = MODELS[request.param]
    boxed = boxed_params(model, inputs)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(jax.value_and_grad(loss_and_logits(model, inputs), has_aux=True))
        return model, inputs, boxed, run(unbox(boxed))


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_computes_the_same(case, sizes):
    model, inputs, boxed, expected = case
    mesh = make_mesh(*sizes)
    shardings = state_shardings(boxed, mesh)
    params = jax.device_put(unbox(boxed), shardings)

    def run(params, *inputs):
        return jax.value_and_grad(loss_and_logits(model, inputs), has_aux=True)(params)

    with activate(mesh), jax.default_matmul_precision("highest"):
        out = ((replicated(mesh), batch_sharding(mesh)), shardings)
        step = jax.jit(run, out_shardings=out)
        found = step(params, *jax.device_put(inputs, batch_sharding(mesh)))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    logits = found[0][1]
    assert logits.addressable_shards[0].data.shape[0] == 8 // (sizes[0] * sizes[1])


def specs_of(model, inputs, mesh):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda s: s.spec, state_shardings(shapes, mesh))


def test_parameters_are_split_as_the_table_says():
    specs = specs_of(*MODELS["dit"], make_mesh(2, 2, 2))
    assert specs["vocab_embed"]["embedding"] == P("tensor", "fsdp")
    assert specs["output"]["kernel"] == P("fsdp", "tensor")
    assert specs["output"]["bias"] == P("tensor")
    blocks = specs["blocks"]
    assert blocks["qkv"]["kernel"] == P(None, "fsdp", None, "tensor", None)
    assert blocks["attn_out"]["kernel"] == P(None, "tensor", None, "fsdp")
    assert blocks["mlp_in"]["kernel"] == P(None, "fsdp", "tensor")
    assert blocks["mlp_in"]["bias"] == P(None, "tensor")
    assert blocks["mlp_out"]["kernel"] == P(None, "tensor", "fsdp")
    assert blocks["mlp_out"]["bias"] == P(None, None)
    assert blocks["modulation"]["kernel"] == P(None, None, None, "fsdp")
    assert blocks["norm1"]["scale"] == P(None, None)


def test_axes_that_do_not_divide_are_replicated():
    specs = specs_of(*MODELS["llama"], make_mesh(1, 2, 4))
    assert specs["vocab_embed"]["embedding"] == P(None, "fsdp")
    assert specs["output"]["kernel"] == P("fsdp", None)
    assert specs["blocks"]["key"]["kernel"] == P(None, "fsdp", None, None)
    assert specs["blocks"]["query"]["kernel"] == P(None, "fsdp", "tensor", None)


def test_fsdp_divides_the_memory():
    model, inputs = MODELS["dit"]
    mesh = make_mesh(1, 8, 1)
    boxed = boxed_params(model, inputs)
    params = jax.device_put(unbox(boxed), state_shardings(boxed, mesh))
    leaves = jax.tree.leaves(params)
    whole = sum(leaf.nbytes for leaf in leaves)
    first = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert first < 0.25 * whole  # an eighth, and the vectors that stay whole


def test_initialisation_with_axes_that_do_not_divide():
    model, inputs = MODELS["llama"]
    mesh = make_mesh(2, 2, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    with activate(mesh):
        init = jax.jit(
            lambda key: unbox(model.init(key, *inputs)), out_shardings=state_shardings(shapes, mesh)
        )
        params = init(jax.random.key(0))["params"]
    table = params["vocab_embed"]["embedding"]
    assert table.addressable_shards[0].data.shape == (67, 32)


def test_optimizer_state_and_average_follow_the_parameters():
    """Initialised under the mesh, with boxes; unboxed arrays land where the table says."""
    model, inputs = MODELS["dit"]
    mesh = make_mesh(1, 4, 2)
    optimizer = optax.adam(1e-3)

    def init(key):
        params = model.init(key, inputs[0][:1], inputs[1][:1])["params"]
        average = jax.tree.map(jnp.copy, params)
        return {"params": params, "average": average, "adam": optimizer.init(params)}

    shardings = state_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    with activate(mesh):
        state = jax.jit(lambda key: unbox(init(key)), out_shardings=shardings)(jax.random.key(0))
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    adam = state["adam"][0]
    for tree in (state["average"], adam.mu, adam.nu):
        kernel = tree["blocks"]["mlp_in"]["kernel"]
        assert kernel.sharding.spec == P(None, "fsdp", "tensor")
        assert kernel.addressable_shards[0].data.shape == (2, 16, 128)
    assert adam.count.sharding.is_fully_replicated
    # The same numbers as without a mesh.
    expected = unbox(jax.jit(init)(jax.random.key(0)))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_arrays_of_another_rank_are_replicated():
    boxed = {"q": nn.LogicallyPartitioned([jnp.ones((4, 4)), jnp.ones(4)], names=("mlp",))}
    specs = jax.tree.map(lambda s: s.spec, state_shardings(boxed, make_mesh(1, 4, 2)))
    assert specs == {"q": [P(), P("tensor")]}


def test_constrain_lays_activations_out():
    mesh = make_mesh(2, 2, 2)
    x = jax.device_put(jnp.zeros((8, 5, 16)), replicated(mesh))

    def spec(x, *names):
        with activate(mesh):
            return jax.jit(lambda x: constrain(x, *names))(x).sharding.spec

    assert spec(x, "batch", None, None) == P(("data", "fsdp"))
    assert spec(x, "batch", None, "mlp") == P(("data", "fsdp"), None, "tensor")
    assert spec(x[:3], "batch", "mlp", "embed") == P(None, None, "fsdp")
    assert constrain(x, "batch", None, None) is x


X = jax.random.normal(jax.random.key(3), (8, 16, 64))
ANGLES = rotary_tables(jnp.arange(16), rotary_frequencies(16, 1e4))
PARTS = {
    "embedding": (Embedding(67, 64, nn.initializers.normal(1.0)), (IDS,)),
    "dit block": (
        dit.Block(64, 4, 32, jnp.float32, "xla"),
        (X, jnp.ones((8, 32)), *ANGLES, None),
    ),
    "llama block": (
        llama.Block(MODELS["llama"][0].shape, True, jnp.float32, "xla"),
        (X, llama.Place(*ANGLES), None),
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_activations_are_split_by_batch(part):
    """Whatever the layout of its input, each device computes its own rows."""
    model, inputs = PARTS[part]
    mesh = make_mesh(2, 2, 2)
    boxed = boxed_params(model, inputs)
    params = jax.device_put(unbox(boxed), state_shardings(boxed, mesh))
    with activate(mesh):
        run = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs))
        found = jax.tree.leaves(run(params, *jax.device_put(inputs, replicated(mesh))))[0]
    assert found.addressable_shards[0].data.shape[0] == 2


def test_embedding_lookup_keeps_the_batch_split(capfd):
    """The compiler warns where it can only copy the whole activation to every device."""
    model, inputs = MODELS["dit"]
    mesh = make_mesh(2, 2, 2)
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]

    def run(params, *inputs):
        return jax.grad(lambda p: loss_and_logits(model, inputs)(p)[0])(params)

    shardings = state_shardings(boxed, mesh)
    with activate(mesh):
        batch = batch_sharding(mesh)
        step = jax.jit(run, in_shardings=(shardings, batch, batch), out_shardings=shardings)
        step.lower(unbox(boxed), *inputs).compile()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_mesh_sizes():
    assert make_mesh(-1, 1, 1).shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert make_mesh(2, -1, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    two = make_mesh(1, -1, 1, devices=jax.devices()[:2])
    assert two.shape == {"data": 1, "fsdp": 2, "tensor": 1}
    assert two.axis_names == MESH_AXES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), r"mesh.data=3, .* do not multiply to the number of devices, 8"),
        ((3, -1, 1), "do not multiply to the number of devices, 8"),
        ((16, -1, 1), "do not multiply to the number of devices, 8"),
        ((-1, -1, 1), "-1 .* at most once"),
        ((0, 8, 1), "whole numbers from 1"),
        ((-2, 8, 1), "whole numbers from 1"),
    ],
)
def test_wrong_mesh_sizes(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(*sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX says of a TPU chip."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def chips(slices: int, side: int = 4) -> list[Chip]:
    """Slices of side x side chips, in an order that mixes them."""
    places = itertools.product(range(side), range(side), range(slices))
    return [Chip(n, number, (x, y, 0)) for n, (x, y, number) in enumerate(places)]


@pytest.mark.parametrize(
    ("sizes", "slices", "across"),
    [
        ((2, 16, 1), 2, (2, 1)),
        ((8, 4, 1), 2, (2, 1)),
        ((-1, 2, 4), 4, (4, 1)),
        ((2, 8, 4), 4, (2, 2)),  # fewer copies of the model than slices
        ((1, 32, 1), 2, (1, 2)),
        ((6, 2, 8), 6, (6, 1)),
        ((3, 16, 2), 6, (3, 2)),
    ],
)
def test_only_data_and_then_fsdp_cross_slices(sizes, slices, across):
    devices = chips(slices)
    mesh = make_mesh(*sizes, devices=devices)
    assert set(mesh.devices.flat) == set(devices)
    numbers = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    # Each slice is one block of the mesh: contiguous along data, and along fsdp where it must be.
    blocks = [np.split(part, across[1], axis=1) for part in np.split(numbers, across[0])]
    found = [set(block.flat) for row in blocks for block in row]
    assert found == [{number} for number in range(slices)]


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [((1, 1, 32), chips(2)), ((1, 2, 32), chips(4)), ((2, 12, 1), chips(1) + chips(2)[1::4])],
)
def test_meshes_that_no_slices_fit(sizes, devices):
    with pytest.raises(InputError, match=r"mesh.tensor=\d+ cannot be laid over \d slices .* 16"):
        make_mesh(*sizes, devices=devices)


def test_batch_must_divide():
    mesh = make_mesh(2, 2, 2)
    check_batch_size(8, mesh)
    with pytest.raises(InputError, match=r"batch of 6 rows .* = 4 devices; use a multiple of 4"):
        check_batch_size(6, mesh)
