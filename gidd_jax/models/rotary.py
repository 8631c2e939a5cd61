"""Rotary positions: angular frequencies, their scalings for long contexts, the rotation.

Angles are float32 (float64 where all is).
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from gidd_jax.errors import InputError
from gidd_jax.models.layers import at_least_float32

Array = jax.Array


class RopeScaling(abc.ABC):
    """How frequencies were changed for a longer context, by a `rope_type` of transformers."""

    @property
    def amplitude(self) -> float:
        """A factor of both cosine and sine."""
        return 1.0

    @abc.abstractmethod
    def scaled(self, frequency: Array, base: float) -> Array:
        """Return the frequencies [head_dim / 2] that stand for those of a base."""


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling(RopeScaling):
    """Type "linear": positions count `factor` times less."""

    factor: float

    def scaled(self, frequency: Array, base: float) -> Array:
        del base
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling(RopeScaling):
    """Type "llama3": wavelengths (in tokens) above original_max_len / low_freq_factor are stretched
    by `factor`, those below original_max_len / high_freq_factor are kept, the rest is interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192

    def scaled(self, frequency: Array, base: float) -> Array:
        del base
        turns = self.original_max_len * frequency / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = jnp.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return frequency * (kept + (1.0 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnRopeScaling(RopeScaling):
    """Type "yarn" (arXiv 2309.00071): frequencies that turn more than beta_fast times within
    original_max_len are kept, those of fewer than beta_slow turns divided by `factor`, in between
    it goes linearly in the number of the frequency."""

    factor: float
    original_max_len: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ends of that range are whole numbers

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def scaled(self, frequency: Array, base: float) -> Array:
        count = frequency.shape[0]
        low, high = (
            count * math.log(self.original_max_len / (turns * 2 * math.pi)) / math.log(base)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * count - 1)
        high += 0.001 * (low == high)
        ramp = (jnp.arange(count, dtype=frequency.dtype) - low) / (high - low)
        kept = 1.0 - jnp.clip(ramp, 0.0, 1.0)
        return frequency * (kept + (1.0 - kept) / self.factor)


SCALINGS = {"linear": LinearRopeScaling, "llama3": Llama3RopeScaling, "yarn": YarnRopeScaling}


def scaling_of(text: str) -> RopeScaling | None:
    """Return the scaling that 'TYPE:NUMBER,...' says, its fields in their order; '' is none.

    Raises InputError for another type, and numbers that are too many, too few or no numbers.
    """
    if not text:
        return None
    name, _, numbers = text.partition(":")
    if name not in SCALINGS:
        raise InputError(f"rope_scaling {text!r}: legal types: {', '.join(SCALINGS)}")
    kinds = {field.name: field.type for field in dataclasses.fields(SCALINGS[name])}
    read = {int: int, float: float, bool: {"True": True, "False": False}.__getitem__}
    try:
        pairs = zip(kinds.items(), numbers.split(","), strict=True)
        values = {key: read[kind](number) for (key, kind), number in pairs}
        if not all(0 < v < math.inf for v in values.values() if v is not False):
            raise ValueError
        if values.get("high_freq_factor", math.inf) <= values.get("low_freq_factor", 0):
            raise ValueError
        return SCALINGS[name](**values)
    except (ValueError, KeyError):
        raise InputError(
            f"rope_scaling {text!r}: give {name}:{','.join(kinds)}, each above 0, or True | False"
        ) from None


def scaling_text(scaling: RopeScaling | None) -> str:
    """Return what `scaling_of` reads."""
    if scaling is None:
        return ""
    name = {kind: name for name, kind in SCALINGS.items()}[type(scaling)]
    return f"{name}:{','.join(str(value) for value in dataclasses.astuple(scaling))}"  # pyright: ignore[reportArgumentType]


def rotary_frequencies(
    head_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
    dtype: Any = jnp.float32,
) -> Array:
    """Angular frequencies base^(-2k/head_dim) in radians per token, [head_dim / 2]."""
    exponent = jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim
    frequency = 1.0 / jnp.power(jnp.asarray(base, dtype), exponent)
    return frequency if scaling is None else scaling.scaled(frequency, base)


def rotary_tables(positions: Array, frequencies: Array) -> tuple[Array, Array]:
    """Cosine and sine of position times frequency, each [L, 1, head_dim / 2]; also of [B, L]."""
    angle = positions.astype(frequencies.dtype)[..., None, None] * frequencies.reshape(
        (1,) * (positions.ndim + 1) + (-1,)
    )
    return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the two halves of each head of x [B, L, heads, head_dim] in float32."""
    a, b = jnp.split(x.astype(at_least_float32(x.dtype)), 2, axis=-1)
    if cos.ndim == 3:  # the same positions in all rows
        cos, sin = cos[None], sin[None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
