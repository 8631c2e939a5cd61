"""Rows in batches of one size: each process its share, split over the devices of that process."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.inference.programs import Batch
from gidd_jax.inference.prompts import Rows
from gidd_jax.parallel import sharding


def by_batches(
    run: Callable[[Batch], Any],
    params: Any,
    rows: Rows,
    batch_size: int,
    seed: int,
    names: np.ndarray | None = None,
) -> list[Any]:
    """Return what `run` makes of each batch of the rows, of all processes, as NumPy arrays.

    names: the numbers that rows draw by; default: their own. Rows beyond the last repeat it.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1: {batch_size}")
    # Kernels run on each device's rows only where they know the mesh that splits them.
    with sharding.activate(mesh_of(params)) as mesh:
        batches = _split_rows(mesh, params, rows, batch_size, seed, names)
        parts = [jax.tree.map(np.asarray, run(batch)) for batch in batches]
    return sharding.gather_batches(parts)


def mesh_of(params: Any) -> Mesh:
    """Return the mesh that parameters are split over; of those on one device, all local devices."""
    return _first_sharding(params).mesh if _is_split(params) else sharding.local_mesh()


def _is_split(params: Any) -> bool:
    layout = _first_sharding(params)
    return isinstance(layout, NamedSharding) and layout.mesh.axis_names == sharding.MESH_AXES


def _first_sharding(params: Any) -> Any:
    return next((getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)), None)


def _split_rows(
    mesh: Any, params: Any, rows: Rows, batch_size: int, seed: int, names: np.ndarray | None
) -> Iterator[Batch]:
    """Yield this process's share of the rows in batches of one size, split over its devices."""
    if not _is_split(params):
        params = jax.device_put(params, sharding.replicated(mesh))
    ways = sharding.batch_ways(mesh)
    size = -(-min(batch_size, len(rows.ids)) // ways) * ways
    for batch in sharding.own_batches(-(-len(rows.ids) // size)):
        # What repeats the last row draws as it does: it causes no network call of its own.
        numbers = np.minimum(np.arange(size) + batch * size, len(rows.ids) - 1)
        part = jax.tree.map(lambda a, n=numbers: a[n], rows)
        if names is not None:
            numbers = names[numbers]
        arrays = (
            row_keys(jax.random.key(seed), jnp.asarray(numbers)),
            part.ids,
            part.free,
            part.lengths if rows.is_ragged else None,
        )
        yield Batch(params, *jax.device_put(arrays, sharding.batch_sharding(mesh)))


def check_numbers(*arrays: np.ndarray) -> None:
    """Raise InputError unless all that the network said is finite."""
    if not all(np.isfinite(array).all() for array in arrays):
        problem = "the network's output is not a number: its parameters are damaged"
        raise InputError(f"{problem}, use an older checkpoint")


def check_trace(trace: bool) -> None:
    """Raise InputError for a trace over several processes."""
    if trace and jax.process_count() > 1:
        raise InputError("a trace needs one process: leave out --distributed, or the trace")
