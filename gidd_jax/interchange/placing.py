"""From tensors in files to parameters on devices, one tensor at a time.

Nothing on the host ever holds more than one tensor: layers are put one by one into the stacked
array that the devices hold, in its dtype and its layout over them.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from gidd_jax.errors import InputError
from gidd_jax.interchange.tensors import Format, TorchTensors, check_names, params_from_torch
from gidd_jax.parallel import sharding

# What stays float32 whatever the parameters are to be: scales of norms, as in the published
# folders, and what the time goes through (see `models.dit`).
_FLOAT32 = {"scale", "time_embed", "modulation", "final_modulation"}


class Target(NamedTuple):
    """Where parameters go: over a mesh (None: onto the first local device), in a dtype.

    weights False: nowhere, only names and shapes are looked at.
    """

    mesh: Mesh | None = None
    dtype: str = "float32"
    weights: bool = True


def kept_dtype(path: tuple[str, ...], dtype: str) -> str:
    """Return the dtype of a parameter where most are to have `dtype`."""
    return "float32" if _FLOAT32 & set(path) else dtype


def as_dtype(params: Any, dtype: str) -> Any:
    """Return the parameters, on their devices, in the dtypes of `kept_dtype`.

    Those given are given up one by one, so that no device holds the model twice.
    """

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        wanted = kept_dtype(tuple(entry.key for entry in path), dtype)
        if leaf.dtype == wanted:
            return leaf
        made = leaf.astype(wanted).block_until_ready()
        leaf.delete()
        return made

    return jax.tree_util.tree_map_with_path(cast, params)


def place(
    network: Any,
    inputs: tuple[jax.Array, ...],
    tensors: Mapping[str, Any],
    form: Format,
    target: Target,
    vocab_size: int | None = None,
) -> Any:
    """Return the parameters of a network on its devices, out of tensors of a format; or None.

    inputs: small ones of the network; vocab_size: rows of the tensors that have one a token, None:
    as many as the network's. Raises InputError for tensors that are missing, unknown, or of other
    shapes.
    """
    boxed = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    if target.mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, sharding.unbox(boxed))
    else:
        shardings = sharding.state_shardings(boxed, target.mesh)
    # Before all names of that many layers are made.
    if network.num_layers > len(tensors):
        raise InputError(
            f"the config has {network.num_layers} layers, and the weights have {len(tensors)} "
            "tensors: use the config of these weights"
        )
    _check_shapes(tensors, TorchTensors(sharding.unbox(boxed), vocab_size))
    if not target.weights:
        check_names(tensors, form, network.num_layers)
        return None

    def put(path: tuple[str, ...], arrays: Iterable[np.ndarray], count: int | None) -> jax.Array:
        layout: Any = shardings
        for key in path:
            layout = layout[key]
        arrays = (np.asarray(array, kept_dtype(path, target.dtype)) for array in arrays)
        if count is None:
            return jax.device_put(next(iter(arrays)), layout)
        return _stacked(arrays, count, layout)

    return params_from_torch(tensors, form, network.num_layers, put)


def _stacked(layers: Iterable[np.ndarray], count: int, layout: Sharding) -> jax.Array:
    stack: Any = None
    for number, layer in enumerate(layers):
        if stack is None:
            shape = (count, *layer.shape)
            stack = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=layout)(
                shape, layer.dtype.name
            )
        stack = _put(stack, jax.device_put(layer, _of_a_layer(layout)), number)
        stack.block_until_ready()  # or the host would hold the layers that wait
    return stack


_put = jax.jit(
    lambda stack, layer, number: jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0),
    donate_argnums=0,
)


def _of_a_layer(layout: Sharding) -> Sharding:
    if isinstance(layout, NamedSharding):
        return NamedSharding(layout.mesh, PartitionSpec(*layout.spec[1:]))
    return layout


def _check_shapes(tensors: Mapping[str, Any], expected: TorchTensors) -> None:
    shape_of = getattr(tensors, "shape", lambda name: tensors[name].shape)
    for name in sorted(expected.keys() & tensors.keys()):
        found, wanted = tuple(shape_of(name)), expected.shape(name)
        if found != wanted:
            raise InputError(
                f"{name} has shape {list(found)}, and the config asks for {list(wanted)}: use the "
                "config of these weights"
            )
