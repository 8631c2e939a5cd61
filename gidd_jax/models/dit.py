"""The denoising network: a bidirectional transformer conditioned on the diffusion time.

The architecture of "Generalized Interpolating Discrete Diffusion" (arXiv 2503.04482), which is
the DiT of SEDD and MDLM (adaptive layer norms, rotary positions, untied output layer), with the
original's initialisation: a fresh network predicts the uniform distribution.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gidd_jax.models.conditioning import TimeEmbedding, by_position, modulate, modulation
from gidd_jax.models.layers import (
    Array,
    Embedding,
    LayerNorm,
    Linear,
    check_heads,
    check_sequence,
    check_times,
    constrain,
    kept,
    layer_stack,
    recomputed,
    uniform_fan_in,
)
from gidd_jax.models.rotary import apply_rotary, rotary_frequencies, rotary_tables
from gidd_jax.ops.attention import attention

# The paper's configurations; tiny is the one for trying things out.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 8, "hidden_size": 512, "num_heads": 8},
    "small": {"num_layers": 12, "hidden_size": 768, "num_heads": 12},
    "base": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16},
    "1B": {"num_layers": 24, "hidden_size": 2048, "num_heads": 32},
}
ROTARY_BASE = 10000.0
MLP_RATIO = 4
VOCAB_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
    """Number of rows of the embedding and columns of the logits: a multiple of 128."""
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Block(nn.Module):
    """Transformer block with adaptive layer norms: x [B, L, D], c [B or 1, cond_dim] -> x.

    c may also be [B, L, cond_dim], a condition of each position.
    """

    hidden_size: int
    num_heads: int
    cond_dim: int
    dtype: Any
    attention: str

    def setup(self) -> None:
        D, H = self.hidden_size, self.num_heads
        head_dim, M = D // H, MLP_RATIO * D
        self.norm1 = LayerNorm(D)
        self.norm2 = LayerNorm(D)
        self.modulation = modulation(self.cond_dim, 6, D)
        self.qkv = Linear(
            in_shape=(D,),
            out_shape=(3, H, head_dim),
            in_axes=("embed",),
            out_axes=(None, "heads", "kv"),
            kernel_init=uniform_fan_in(D),
            dtype=self.dtype,
        )
        self.attn_out = Linear(
            in_shape=(H, head_dim),
            out_shape=(D,),
            in_axes=("heads", "kv"),
            out_axes=("embed",),
            kernel_init=uniform_fan_in(D),
            dtype=self.dtype,
        )
        self.mlp_in = Linear(
            in_shape=(D,),
            out_shape=(M,),
            in_axes=("embed",),
            out_axes=("mlp",),
            kernel_init=uniform_fan_in(D),
            bias_init=uniform_fan_in(D),
            dtype=self.dtype,
        )
        self.mlp_out = Linear(
            in_shape=(M,),
            out_shape=(D,),
            in_axes=("mlp",),
            out_axes=("embed",),
            kernel_init=uniform_fan_in(M),
            bias_init=uniform_fan_in(M),
            dtype=self.dtype,
        )

    def __call__(
        self, x: Array, c: Array, cos: Array, sin: Array, lengths: Array | None
    ) -> tuple[Array, None]:
        parts = self.modulation(c)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = (
            parts[..., i, :] for i in range(6)
        )
        q, k, v = recomputed(Block._heads)(self, x, shift_attn, scale_attn, cos, sin)
        h = attention(q, k, v, lengths=lengths, implementation=self.attention)
        x = recomputed(Block._join)(self, x, h, gate_attn)
        x = recomputed(Block._mlp)(self, x, shift_mlp, scale_mlp, gate_mlp)
        return constrain(x, "batch", None, None), None

    def _heads(self, x: Array, shift: Array, scale: Array, cos: Array, sin: Array) -> Any:
        qkv = self.qkv(modulate(self.norm1(x), shift, scale).astype(self.dtype))
        q, k = (apply_rotary(qkv[:, :, i], cos, sin) for i in range(2))
        return q, k, qkv[:, :, 2]

    def _join(self, x: Array, h: Array, gate: Array) -> Array:
        return x + _gate(gate, kept(self.attn_out(h)))

    def _mlp(self, x: Array, shift: Array, scale: Array, gate: Array) -> Array:
        h = modulate(self.norm2(x), shift, scale).astype(self.dtype)
        h = nn.gelu(kept(self.mlp_in(h)), approximate=True)
        return x + _gate(gate, kept(self.mlp_out(h)))


def _gate(gate: Array, h: Array) -> Array:
    return (by_position(gate) * h).astype(h.dtype)


class DiT(nn.Module):
    """Denoiser: noisy ids z_t int32 [B, L] and times t float32 [B] or [1] -> logits.

    t may also be [B, L], a time of each position: 0 where a token is given. Only a model that was
    trained so (`position_times`) is told the times of positions when it samples or judges.
    The logits are float32 [B, L, padded_vocab_size(vocab_size)]; the columns from vocab_size on
    belong to no token. `dtype` is that of the matrix products; parameters are float32. `remat`
    names what the backward pass computes again (`layers.layer_stack`), `attention` the form of
    attention (`ops.attention`).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    cond_dim: int = 128
    max_seq_len: int = 512
    dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention: str = ""
    position_times: bool = False

    def setup(self) -> None:
        D, rows = self.hidden_size, padded_vocab_size(self.vocab_size)
        check_heads(D, self.num_heads, self.num_heads)
        self.vocab_embed = Embedding(rows, D, uniform_fan_in(D), self.dtype)
        self.time_embed = TimeEmbedding(self.cond_dim)
        stack = layer_stack(
            Block,
            self.num_layers,
            scan_layers=self.scan_layers,
            remat=self.remat,
            in_axes=(nn.broadcast,) * 4,
        )
        self.blocks = stack(D, self.num_heads, self.cond_dim, self.dtype, self.attention)
        self.final_norm = LayerNorm(D)
        self.final_modulation = modulation(self.cond_dim, 2, D)
        self.output = Linear(
            in_shape=(D,),
            out_shape=(rows,),
            in_axes=("embed",),
            out_axes=("vocab",),
            kernel_init=nn.initializers.zeros_init(),
            bias_init=nn.initializers.zeros_init(),
            dtype=self.dtype,
            out_dtype=jnp.float32,
        )

    def __call__(self, z_t: Array, t: Array, lengths: Array | None = None) -> Array:
        return self.project(self.features(z_t, t, lengths))

    def features(self, z_t: Array, t: Array, lengths: Array | None = None) -> Array:
        """What the output projection reads, [B, L, hidden_size] in `dtype`.

        lengths int32 [B]: positions from there on are padding, which no other position sees.
        Raises InputError for a sequence longer than max_seq_len or a t of another shape.
        """
        check_sequence(z_t, self.max_seq_len)
        check_times(t, z_t)
        c = nn.silu(self.time_embed(t))
        frequencies = rotary_frequencies(self.hidden_size // self.num_heads, ROTARY_BASE)
        cos, sin = rotary_tables(jnp.arange(z_t.shape[1]), frequencies)
        x = self.vocab_embed(z_t)
        x, _ = self.blocks(x, c, cos, sin, lengths)
        parts = self.final_modulation(c)
        return modulate(self.final_norm(x), parts[..., 0, :], parts[..., 1, :]).astype(self.dtype)

    def project(self, h: Array) -> Array:
        """Logits of features h [..., hidden_size], float32 [..., padded vocabulary]."""
        return self.output(h)

    @nn.nowrap
    def output_weights(self, params: Any) -> tuple[Array, Array | None]:
        """Kernel [hidden_size, padded vocabulary] and bias of `project`, out of the parameters."""
        return params["output"]["kernel"], params["output"]["bias"]
