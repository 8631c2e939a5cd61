"""A cosine schedule with a fixed mixture of masks and random tokens."""

import dataclasses

import jax.numpy as jnp

from gidd_jax.process import InterpolatingProcess, NoiseMass


@dataclasses.dataclass(frozen=True)
class CosineProcess(InterpolatingProcess):
    """alpha_t = cos^2(pi t / 2); mask_share of the noise are masks, the rest random tokens."""

    mask_share: float = 0.9

    def alpha(self, t):
        return jnp.cos(0.5 * jnp.pi * t) ** 2

    def beta_pi(self, t):
        noise = jnp.sin(0.5 * jnp.pi * t) ** 2
        uniform = (1 - self.mask_share) * noise
        return NoiseMass(mask=self.mask_share * noise, uniform=uniform / self.num_noise_tokens)
