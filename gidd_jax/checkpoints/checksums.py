"""Checksums of what a checkpoint holds: storage that flips a bit must not go unnoticed.

Orbax's array files carry none. The sums of arrays are computed where the arrays are, and do not
depend on how they are split over devices.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of a number


def array_checksums(arrays: dict[str, Any]) -> dict[str, int]:
    """Return a 32-bit sum of the bits of each array; any one flipped bit changes it."""
    return {name: int(value) for name, value in _array_sums(arrays).items()}


@jax.jit
def _array_sums(arrays: dict[str, Any]) -> dict[str, jax.Array]:
    return jax.tree.map(_array_sum, arrays)


def _array_sum(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    # Numbers of 8 bytes become pairs of 4.
    bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
    # Each number times an odd one that says where it stands, modulo 2^32: a flipped bit adds an
    # odd multiple of a power of two below 2^32, and numbers that changed places show as well.
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        stride = stride * bits.shape[axis] % 2**32
    place *= jnp.uint32(0x9E3779B1)
    place = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(bits * ((place ^ (place >> 13)) | 1), dtype=jnp.uint32)


def json_checksum(value: Any) -> str:
    """Return the SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
