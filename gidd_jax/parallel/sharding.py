"""The device mesh and the one table that says which array axis is split over which mesh axis.

A mesh has three axes: `data` (replicas of the model), `fsdp` (the batch and the parameters are
both split) and `tensor` (heads, the hidden units of the MLP and the vocabulary are split).
Models name the axes of their parameters; RULES maps the names to mesh axes.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen.spmd import logical_to_mesh_axes
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gidd_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
VOCAB_AXIS = "tensor"
HEAD_AXIS = "tensor"
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH_AXES),
    ("vocab", VOCAB_AXIS),
    ("mlp", "tensor"),
    ("heads", HEAD_AXIS),
    ("embed", "fsdp"),
    ("kv", None),
    ("cond", None),
    ("layers", None),
)


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of all (or the given) devices; one size may be -1, which takes the rest.

    Raises InputError when the sizes do not multiply to the number of devices, or cannot be laid
    over several slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, count = [data, fsdp, tensor], len(devices)
    asked = ", ".join(f"mesh.{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise InputError(f"{asked}: use whole numbers from 1, and -1 (the rest) at most once.")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, count // -math.prod(sizes))
    if math.prod(sizes) != count:
        raise InputError(
            f"{asked} do not multiply to the number of devices, {count}; change the sizes or set "
            "one of them to -1."
        )
    return Mesh(_arrange(sizes, devices, asked), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _arrange(sizes: Sequence[int], devices: Sequence[Any], asked: str) -> np.ndarray:
    """Return the devices as an array of the mesh's sizes, neighbours where traffic is heaviest.

    JAX numbers what fast links join: a TPU slice, the GPUs of a node. The slow network between
    these is left to `data`, and to `fsdp` where there are fewer copies than slices.
    """
    # jax.make_mesh would refuse sizes that cut through an axis of a TPU's torus, such as 2x8x4 of
    # 64 chips.
    split: Any = {"allow_split_physical_axes": True}
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, **split)
    data, fsdp, tensor = sizes
    across = math.gcd(data, len(slices)), len(slices) // math.gcd(data, len(slices)), 1
    if fsdp % across[1] or len(set(slices.values())) > 1:
        raise InputError(
            f"{asked} cannot be laid over {len(slices)} slices (or nodes) of "
            f"{', '.join(map(str, slices.values()))} devices: make mesh.data * mesh.fsdp a "
            f"multiple of {len(slices)}, on slices of one size."
        )
    within = data // across[0], fsdp // across[1], tensor
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, **split)


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[Mesh]:
    """Make `mesh` and RULES current, so that jitted functions keep activations split by batch."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def local_mesh() -> Mesh:
    """Mesh of this process's devices that splits the batch alone, for inference."""
    return make_mesh(-1, 1, 1, devices=jax.local_devices())


def batch_ways(mesh: Mesh) -> int:
    """Return over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """InputError unless the global batch (of one micro batch) splits over data * fsdp."""
    ways = batch_ways(mesh)
    if batch_size % ways:
        raise InputError(
            f"the batch of {batch_size} rows does not split over mesh.data * mesh.fsdp = {ways} "
            f"devices; use a multiple of {ways}."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the batch: split over data and fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def own_batches(count: int) -> range:
    """Numbers of the batches that this process computes, out of `count` that all share.

    Every process gets as many; the last ones may lie beyond `count`.
    """
    processes = jax.process_count()
    return range(jax.process_index(), -(-count // processes) * processes, processes)


def gather_batches(parts: Iterable[Any]) -> list[Any]:
    """Return the results of all processes' batches in their order, as NumPy arrays.

    Each process gives those of `own_batches`, computed on its own devices, and gets all of them.
    """
    own = [jax.tree.map(np.asarray, part) for part in parts]
    if jax.process_count() == 1:
        return own
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *own)
    everyone = multihost_utils.process_allgather(stacked)  # [processes, batches, ...]
    return [
        jax.tree.map(lambda leaf, n=number, p=process: leaf[p, n], everyone)
        for number in range(len(own))
        for process in range(jax.process_count())
    ]


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """Shardings of unbox(state), one NamedSharding per array.

    `abstract_state` comes from jax.eval_shape of an initialisation that keeps flax's boxes with
    logical axis names, also around the moments and averages that follow the parameters. Arrays
    without names are replicated. An axis that the mesh does not divide evenly (a vocabulary of
    50,259 over tensor=2) is replicated over that mesh axis: correct, only less sparing.
    """

    def of_node(node: Any) -> Any:
        names = node.names if _is_box(node) else ()
        value = node.value if _is_box(node) else node
        return jax.tree.map(lambda a: NamedSharding(mesh, _spec(names, a.shape, mesh)), value)

    return jax.tree.map(of_node, abstract_state, is_leaf=_is_box)


def placed(shapes: Any, shardings: Any) -> Any:
    """Return jax.ShapeDtypeStruct of shapes, each with its sharding."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )


def unbox(tree: Any) -> Any:
    """The arrays without flax's boxes of axis names.

    Unlike flax.linen.unbox it lays out nothing: under `activate` that one would constrain every
    array again, and refuse the axes that the mesh does not divide.
    """
    return jax.tree.map(lambda n: n.value if _is_box(n) else n, tree, is_leaf=_is_box)


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.LogicallyPartitioned)


def _spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    # An optimizer may keep arrays of another rank under a parameter's name (preconditioners,
    # norms); its axis names say nothing about those.
    if len(names) != len(shape):
        return P()
    axes = logical_to_mesh_axes(names, RULES) or P()
    return P(
        *(
            a if a and size % mesh.shape[a] == 0 else None
            for a, size in zip(axes, shape, strict=True)
        )
    )
