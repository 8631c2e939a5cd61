"""What a run gives up of the model that it started from, step by step.

An autoregressive model's attention becomes full, a mask-only model's noise hybrid. Both are numbers
that a step works out of its count: one program makes all of the steps.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gidd_jax.process import HybridProcess, InterpolatingProcess

CAUSAL = -30.0  # added to a score: as good as not seen


@dataclasses.dataclass(frozen=True)
class Annealing:
    """Steps in which attention goes from causal to full, and p_uniform from 0 to its value; 0:
    there is nothing to anneal."""

    attention_steps: int = 0
    noise_steps: int = 0

    def future(self, step: jax.Array) -> jax.Array | None:
        """Return what is added to the scores of later tokens in a 0-based step; None: nothing.

        The logarithm of the finished share: how much a later token weighs beside an earlier one
        grows evenly, from e^CAUSAL.
        """
        if not self.attention_steps:
            return None
        share = jnp.clip(step / self.attention_steps, 0.0, 1.0).astype(jnp.float32)
        return jnp.maximum(jnp.log(share), CAUSAL)

    def process(
        self, process: InterpolatingProcess | None, step: jax.Array
    ) -> InterpolatingProcess | None:
        """Return the process as it is in a 0-based step."""
        if not self.noise_steps:
            return process
        assert isinstance(process, HybridProcess)
        share = jnp.clip(step / self.noise_steps, 0.0, 1.0).astype(jnp.float32)
        return dataclasses.replace(process, p_uniform=process.p_uniform * share)


NOTHING = Annealing()
