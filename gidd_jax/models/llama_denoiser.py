"""A denoiser made of a Llama: the same blocks, of which every token sees all others.

So the weights of an autoregressive model are a place to start from: with `shift`, and attention
still causal, the logits are the autoregressive model's.
"""

import flax.linen as nn
import jax.numpy as jnp

from gidd_jax.models.conditioning import TimeEmbedding, modulate, modulation
from gidd_jax.models.layers import Array, check_sequence, check_times
from gidd_jax.models.llama import LlamaTransformer, Place


class LlamaDenoiser(LlamaTransformer):
    """Denoiser made of a Llama: noisy ids z_t int32 [B, L] and times t -> float32 logits.

    Every token sees all others. `shift`: the state at i predicts token i + 1, as the weights of an
    autoregressive model were trained to (token 0, a frame's first, is predicted by its own state).
    `cond_dim` > 0: it is told the time, [B] or [1], or with `position_times` of positions [B, L],
    by shifts, scales and gates that start at zero; 0: it finds the time in the tokens.
    """

    is_causal = False

    cond_dim: int = 0
    shift: bool = False
    position_times: bool = False

    def setup(self) -> None:
        super().setup()
        if self.cond_dim:
            self.time_embed = TimeEmbedding(self.cond_dim)
            self.final_modulation = modulation(self.cond_dim, 2, self.hidden_size)

    @property
    def time_width(self) -> int:
        return self.cond_dim

    def __call__(
        self, z_t: Array, t: Array, lengths: Array | None = None, future: Array | None = None
    ) -> Array:
        return self.project(self.features(z_t, t, lengths, future))

    def features(
        self, z_t: Array, t: Array, lengths: Array | None = None, future: Array | None = None
    ) -> Array:
        """What the output projection reads, [B, L, hidden_size] in `dtype`.

        lengths int32 [B]: positions from there on are padding, which no other position sees.
        future float32 []: is added to the scores of later tokens, from -30 (practically causal) to
        0 (as with None, in the plain form). Raises InputError for a sequence longer than
        max_seq_len or a t of another shape.
        """
        check_sequence(z_t, self.max_seq_len)
        check_times(t, z_t)
        condition = nn.silu(self.time_embed(t)) if self.cond_dim else None
        tables = self._tables(jnp.arange(z_t.shape[1]))
        place = Place(*tables, lengths=lengths, future=future, condition=condition)
        x, _ = self.blocks(self.vocab_embed(z_t), place, None)
        h = self.final_norm(x)
        if condition is not None:
            parts = self.final_modulation(condition)
            h = modulate(h, parts[..., 0, :], parts[..., 1, :])
        if self.shift:
            h = jnp.concatenate([h[:, :1], h[:, :-1]], axis=1)
        return h.astype(self.dtype)
