"""Random draws that keep samples reproducible and right in the tail.

Every row of a batch has its own key, and every position of a row its own random bits: what a row
draws depends neither on the batch nor on the length of the array it is drawn in. Uniform numbers
have 64 random bits, so that events of probability 1e-9 happen once in 1e9 times; a float32
uniform has steps of 1e-7, and a Gumbel variable made from one ends at 17.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

BLOCKS = (256, 128, 64)  # tokens per leaf of the first pass over the vocabulary


def fold_in(keys: jax.Array, number: ArrayLike) -> jax.Array:
    """Return one key per key [B], derived from it and a number."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """Return one key per row number, [B]."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def uniforms(keys: jax.Array, length: int, count: int) -> jax.Array:
    """Return uniform numbers in [0, 1), float32 [B, length, count], each row from its key [B].

    Their spacing near 0 is 2^-64. A longer array begins with the shorter one of the same key.
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, (length, count, 2), jnp.uint32))(keys)
    high, low = bits[..., 0].astype(jnp.float32), bits[..., 1].astype(jnp.float32)
    return jnp.minimum(high * 2.0**-32 + low * 2.0**-64, 1 - 2.0**-24)


def num_levels(size: int) -> int:
    """Number of binary decisions, each with one uniform, that single out one of `size` weights."""
    block = _block(size)
    return _log2(size) if size <= block else _log2(block) + _log2(-(-size // block))


def index_from_uniforms(weights: jax.Array, u: jax.Array) -> jax.Array:
    """Return the index that u [..., num_levels(K)] in [0, 1) draws from weights [..., K] >= 0.

    The weights need no normalisation; their sum must be positive. An index of weight 0 is never
    drawn, and the probability of each index is right to a relative 1e-6 however small it is: the
    draw descends a binary tree of sums, at each node with u * total < the smaller branch.
    """
    if weights.shape[-1] <= _block(weights.shape[-1]):
        return _descend(weights, u)
    blocks = _in_blocks(weights, 0.0)
    top = _log2(blocks.shape[-2])
    block = _descend(jnp.sum(blocks, axis=-1), u[..., :top])
    return block * blocks.shape[-1] + _descend(_block_at(blocks, block), u[..., top:])


def total(weights: jax.Array) -> jax.Array:
    """Return the sum of weights [..., K], of the blocks that `index_from_uniforms` sums: a program
    reads the weights once for both."""
    if weights.shape[-1] <= _block(weights.shape[-1]):
        return jnp.sum(weights, axis=-1)
    return jnp.sum(jnp.sum(_in_blocks(weights, 0.0), axis=-1), axis=-1)


def largest(values: jax.Array) -> jax.Array:
    """Return the largest of values [..., K], of the blocks that `first_largest` compares."""
    if values.shape[-1] <= _block(values.shape[-1]):
        return jnp.max(values, axis=-1)
    return jnp.max(jnp.max(_in_blocks(values, -jnp.inf), axis=-1), axis=-1)


def first_largest(values: jax.Array) -> jax.Array:
    """Return the first index of the largest of values [..., K], as argmax: faster on CPU."""
    if values.shape[-1] <= _block(values.shape[-1]):
        return jnp.argmax(values, axis=-1)
    blocks = _in_blocks(values, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    return block * blocks.shape[-1] + jnp.argmax(_block_at(blocks, block), axis=-1)


def categorical(keys: jax.Array, weights: jax.Array) -> jax.Array:
    """Draw one index per position from weights [B, L, K] >= 0, int32 [B, L]; keys [B]."""
    u = uniforms(keys, weights.shape[1], num_levels(weights.shape[-1]))
    return index_from_uniforms(weights, u)


def _block(size: int) -> int:
    """Return the tokens of a block: padding the last one would copy the whole array."""
    return next((block for block in BLOCKS if size % block == 0), BLOCKS[0])


def _in_blocks(array: jax.Array, fill: float) -> jax.Array:
    block = _block(array.shape[-1])
    padded = _pad_last(array, -(-array.shape[-1] // block) * block, fill)
    return padded.reshape(*array.shape[:-1], -1, block)


def _block_at(blocks: jax.Array, number: jax.Array) -> jax.Array:
    return jnp.take_along_axis(blocks, number[..., None, None], axis=-2)[..., 0, :]


def _log2(size: int) -> int:
    return math.ceil(math.log2(size))


def _pad_last(array: jax.Array, size: int, fill: float = 0.0) -> jax.Array:
    widths = [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])]
    return jnp.pad(array, widths, constant_values=fill)


def _descend(weights: jax.Array, u: jax.Array) -> jax.Array:
    depth = _log2(weights.shape[-1])
    levels = [_pad_last(weights, 2**depth)]
    for _ in range(depth - 1):
        pairs = levels[-1].reshape(*weights.shape[:-1], -1, 2)
        levels.append(jnp.sum(pairs, axis=-1))
    index = jnp.zeros(weights.shape[:-1], jnp.int32)
    for number, sums in enumerate(reversed(levels[:depth])):
        pair = jnp.stack([2 * index, 2 * index + 1], axis=-1)
        left, right = jnp.moveaxis(jnp.take_along_axis(sums, pair, axis=-1), -1, 0)
        takes_smaller = u[..., number] * (left + right) < jnp.minimum(left, right)
        index = 2 * index + (takes_smaller ^ (left <= right))
    return index
