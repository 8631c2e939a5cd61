"""Which tokens of a training row are given, as those of a prompt are: clean, at time 0, no loss.

A network that is told the times of positions learns so what it can rely on. Rows are given as
sampling gives them (`inference.framing`): beside a gap the padding after the text is clean, too; a
beginning is continued up to the context, padding and all.
"""

import jax
import jax.numpy as jnp


def draw_givens(
    key: jax.Array, mask: jax.Array, share: float, marked: jax.Array | None = None
) -> jax.Array:
    """Return which positions are given, bool [B, L]: some in a `share` of the rows.

    mask bool [B, L]: the real tokens. Of the rows with givens a third each gives a beginning, all
    but a span, and scattered tokens; how many is uniform, and at least one token stays free. The
    latter two give all padding as well. marked bool [B, L]: tokens that are given in any case; the
    draws are among the others.
    """
    if marked is not None:
        return marked | draw_givens(key, mask & ~marked, share)
    keys = jax.random.split(key, 5)
    rows = len(mask)
    place = jnp.cumsum(mask, axis=-1) - 1  # among the tokens of the mask, wherever they stand
    count = jnp.sum(mask, axis=-1)[:, None]
    first, second = (jax.random.uniform(k, (rows, 1)) for k in keys[:2])
    prefix = place < 1 + jnp.floor(first * (count - 1))
    size = 1 + jnp.floor(first * (count - 1))
    start = jnp.floor(second * (count - size + 1))
    outside = (place < start) | (place >= start + size)
    scattered = jax.random.uniform(keys[2], mask.shape) < first
    kind = jax.random.randint(keys[3], (rows, 1), 0, 3)
    given = jnp.where(kind == 0, prefix, jnp.where(kind == 1, outside, scattered)) & mask
    some_free = jnp.sum(given, axis=-1, keepdims=True) < count
    given |= ~mask & (kind != 0)
    return given & some_free & (jax.random.uniform(keys[4], (rows, 1)) < share)
