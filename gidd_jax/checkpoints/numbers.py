"""Arrays that hold something else than numbers: all that follows would be NaN, or padding."""

from typing import Any

import jax
import jax.numpy as jnp


def not_numbers(arrays: Any) -> str | None:
    """Say which array of a tree holds NaN or infinities, by its dotted name; None for sound ones.

    Computed where the arrays are, on whole arrays of all processes.
    """
    counts = jax.tree_util.tree_leaves_with_path(_counts(arrays))
    leaves = jax.tree.leaves(arrays)
    for (path, count), leaf in zip(counts, leaves, strict=True):
        if count:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return f"{int(count)} of the {leaf.size} numbers in {name} are NaN or infinite"
    return None


@jax.jit
def _counts(arrays: Any) -> Any:
    return jax.tree.map(lambda array: jnp.sum(~jnp.isfinite(array), dtype=jnp.uint32), arrays)
