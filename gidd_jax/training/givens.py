"""Which tokens of a training row are given, as those of a prompt are: clean, at time 0, no loss.

A network that is told the times of positions learns so what it can rely on. Rows are given as
sampling gives them (`inference.framing`): beside a gap the padding after the text is clean, too; a
beginning is continued up to the context, padding and all.
"""

import jax
import jax.numpy as jnp

# Which of a beginning, all but a span, and scattered tokens a row may give.
KINDS = {"mixed": (0, 1, 2), "prompt": (0,), "infilling": (2,)}


def draw_givens(
    key: jax.Array,
    mask: jax.Array,
    share: float,
    marked: jax.Array | None = None,
    kind: str = "mixed",
) -> jax.Array:
    """Return which positions are given, bool [B, L]: some in a `share` of the rows.

    mask bool [B, L]: the real tokens, of which at least one stays free. 'mixed': of the rows with
    givens a third each gives a beginning, all but a span, and scattered tokens; how many is
    uniform. 'prompt' and 'infilling' give a beginning, and scattered tokens, of `middling` shares,
    as the scaling paper's runs do. All but beginnings give all padding as well. marked bool [B, L]:
    tokens that are given in any case; the draws are among the others.
    """
    if marked is not None:
        return marked | draw_givens(key, mask & ~marked, share, kind=kind)
    keys = jax.random.split(key, 5)
    rows = len(mask)
    place = jnp.cumsum(mask, axis=-1) - 1  # among the tokens of the mask, wherever they stand
    count = jnp.sum(mask, axis=-1)[:, None]
    first, second = (jax.random.uniform(k, (rows, 1)) for k in keys[:2])
    if kind != "mixed":
        first = middling(first)
    prefix = beginning(place, count, first)
    size = 1 + jnp.floor(first * (count - 1))
    start = jnp.floor(second * (count - size + 1))
    outside = (place < start) | (place >= start + size)
    scattered = jax.random.uniform(keys[2], mask.shape) < first
    kinds = jnp.array(KINDS[kind])
    number = kinds[jax.random.randint(keys[3], (rows, 1), 0, len(kinds))]
    given = jnp.where(number == 0, prefix, jnp.where(number == 1, outside, scattered)) & mask
    some_free = jnp.sum(given, axis=-1, keepdims=True) < count
    given |= ~mask & (number != 0)
    return given & some_free & (jax.random.uniform(keys[4], (rows, 1)) < share)


def middling(u: jax.Array) -> jax.Array:
    """Return a share with density (pi/2) sin(pi share) of a uniform: middle ones are likelier.

    The scaling paper's code draws so how much of a row is given (arXiv 2512.10858).
    """
    return jnp.arccos(1 - 2 * u) / jnp.pi


def beginning(place: jax.Array, count: jax.Array | int, share: jax.Array) -> jax.Array:
    """Return which places 0 to count - 1 are a row's beginning: the first and a share of the rest.

    They broadcast: place [B, L], count and share [B, 1].
    """
    return place <= share * (count - 1)
