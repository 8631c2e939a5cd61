"""How a network is told the diffusion time: features, and shifts, scales and gates of its layers.

Adaptive layer norms as in DiT. Everything here starts at zero effect, or is a bounded draw of the
time embedding: a fresh modulation changes nothing.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from gidd_jax.models.layers import Array, Linear, uniform_fan_in

TIME_FEATURES = 256


def time_features(t: Array, width: int = TIME_FEATURES) -> Array:
    """Sinusoidal features [cos | sin] of t, not rescaled: float32 [...] -> [..., width] (even)."""
    half = width // 2
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t.astype(jnp.float32)[..., None] * frequency.reshape((1,) * t.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x [B, L, D] scaled and shifted, per sequence by [B or 1, D] or by position by [B, L, D]."""
    return x * (1.0 + by_position(scale)) + by_position(shift)


def by_position(part: Array) -> Array:
    """A part of the modulation, [B or 1, D] or [B, L, D], with an axis of positions."""
    return part[:, None, :] if part.ndim == 2 else part


def modulation(cond_dim: int, parts: int, width: int) -> Linear:
    # float32 at full precision: over t in [0, 1] most time features move by less than 0.05, so
    # 16-bit products would blur the time. With one row per sequence it costs nothing.
    return Linear(
        in_shape=(cond_dim,),
        out_shape=(parts, width),
        in_axes=("cond",),
        out_axes=(None, "embed"),
        kernel_init=nn.initializers.zeros_init(),
        bias_init=nn.initializers.zeros_init(),
        precision=jax.lax.Precision.HIGHEST,
    )


class TimeEmbedding(nn.Module):
    """Two-layer perceptron on the time features: t float32 [...] -> float32 [..., cond_dim]."""

    cond_dim: int

    @nn.compact
    def __call__(self, t: Array) -> Array:
        h = self._linear("input", TIME_FEATURES, None)(time_features(t))
        return self._linear("output", self.cond_dim, "cond")(nn.silu(h))

    def _linear(self, name: str, width: int, axis: str | None) -> Linear:
        return Linear(
            in_shape=(width,),
            out_shape=(self.cond_dim,),
            in_axes=(axis,),
            out_axes=("cond" if axis is None else None,),
            kernel_init=uniform_fan_in(width),
            bias_init=uniform_fan_in(width),
            precision=jax.lax.Precision.HIGHEST,
            name=name,
        )
