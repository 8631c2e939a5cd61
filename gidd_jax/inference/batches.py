"""Rows in batches of one size: each process its share, split over the devices of that process."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.inference.programs import Batch
from gidd_jax.inference.prompts import Rows
from gidd_jax.parallel.sharding import batch_sharding, make_mesh, own_batches, replicated


def split_rows(
    params: Any, rows: Rows, batch_size: int, seed: int, names: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yield this process's share of the rows in batches of one size, split over its devices.

    names: the numbers that rows draw by; default: their own. Rows beyond the last repeat it.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1: {batch_size}")
    mesh = make_mesh(-1, 1, 1, devices=jax.local_devices())
    params = jax.device_put(params, replicated(mesh))
    size = -(-min(batch_size, len(rows.ids)) // mesh.size) * mesh.size
    for batch in own_batches(-(-len(rows.ids) // size)):
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
        yield Batch(params, *jax.device_put(arrays, batch_sharding(mesh)))
