"""The scaling paper's network: a bidirectional transformer that is told no noise level.

"Scaling Behavior of Discrete Diffusion Language Models" (arXiv 2512.10858): zero-centred RMS norms,
norms of whole queries and keys before their heads, rotary positions, one learned key and value per
head that every query sees, soft-capped scores, squared ReLU, and the multipliers of CompleteP.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from gidd_jax.models.layers import (
    Array,
    Embedding,
    Initializer,
    Linear,
    RMSNorm,
    at_least_float32,
    check_heads,
    check_sequence,
    check_times,
    constrain,
    kept,
    layer_stack,
    output_kernel,
    param,
    recomputed,
)
from gidd_jax.models.rotary import apply_rotary, rotary_frequencies, rotary_tables
from gidd_jax.ops.attention import attention

ROTARY_BASE = 10000.0
MLP_RATIO = 4
RESID_SCALE = 4.0
HEAD_WIDTH = 512  # the width at which logits have the factor 1
BULK_STD, AUX_STD = 0.4, 0.02  # of matrices, at width 1; of embeddings

# Layers, width, heads (paper, table 1). The two 3b models differ in depth: 18 layers with masks.
SIZES: dict[str, dict[str, int]] = {
    "25M": {"num_layers": 8, "hidden_size": 512, "num_heads": 8},
    "49M": {"num_layers": 10, "hidden_size": 640, "num_heads": 10},
    "85M": {"num_layers": 12, "hidden_size": 768, "num_heads": 12},
    "202M": {"num_layers": 16, "hidden_size": 1024, "num_heads": 16},
    "567M": {"num_layers": 20, "hidden_size": 1536, "num_heads": 12},
    "3b": {"num_layers": 19, "hidden_size": 3072, "num_heads": 24},
    "10b": {"num_layers": 34, "hidden_size": 4608, "num_heads": 36},
}


class Cache(NamedTuple):
    """Normalised, rotated keys, and values, of every layer, laid out as their products read them.

    keys [layers, B, heads, S, head_dim], values [layers, B, heads, head_dim, S].
    """

    keys: Array
    values: Array


class Place(NamedTuple):
    """Where tokens [B, T] stand: cosines and sines of their positions, and what they see.

    mask bool, broadcast to [B, heads, T, S + T] with a cache of S tokens, or None: everything;
    lengths as in `ops.attention`.
    """

    cos: Array
    sin: Array
    mask: Array | None
    lengths: Array | None


class Block(nn.Module):
    """Pre-norm transformer block: x [B, T, D] -> x, and the keys and values of these tokens.

    `multiplier` is the factor of both branches, `weight_scale` that of every matrix product.
    """

    hidden_size: int
    num_heads: int
    intermediate_size: int
    multiplier: float
    weight_scale: float | str
    soft_cap: float
    rms_norm_eps: float
    normed_heads: bool
    sink: bool
    mlp_bias: bool
    kernel_init: Initializer
    dtype: Any
    attention: str

    def setup(self) -> None:
        D, H = self.hidden_size, self.num_heads
        head_dim, M = D // H, self.intermediate_size
        self.norm1, self.norm2 = self._norm(), self._norm()
        self.query, self.key, self.value = (
            self._linear((D,), (H, head_dim), ("embed",), ("heads", "kv")) for _ in range(3)
        )
        if self.normed_heads:
            self.query_norm, self.key_norm = self._norm(), self._norm()
        if self.sink:
            zeros = nn.initializers.zeros_init()
            shape, axes = (H, head_dim), ("heads", "kv")
            self.sink_key = param(self, "sink_key", zeros, axes, shape)
            self.sink_value = param(self, "sink_value", zeros, axes, shape)
        self.attn_out = self._linear((H, head_dim), (D,), ("heads", "kv"), ("embed",))
        bias = nn.initializers.zeros_init() if self.mlp_bias else None
        self.mlp_in = self._linear((D,), (M,), ("embed",), ("mlp",), bias)
        self.mlp_out = self._linear((M,), (D,), ("mlp",), ("embed",), bias)

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.hidden_size, self.rms_norm_eps, zero_centred=True)

    def _linear(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        in_axes: tuple[str, ...],
        out_axes: tuple[str, ...],
        bias: Initializer | None = None,
    ) -> Linear:
        scale = factor(self.weight_scale, in_shape, out_shape)
        return Linear(
            in_shape, out_shape, in_axes, out_axes, self.kernel_init, bias, self.dtype, scale=scale
        )

    def __call__(self, x: Array, place: Place, cache: Cache | None) -> tuple[Array, Cache]:
        q, k, v = recomputed(Block._heads)(self, x, place)
        h = attention(
            q,
            k,
            v,
            mask=place.mask,
            lengths=place.lengths,
            soft_cap=self.soft_cap,
            sink=(self.sink_key, self.sink_value) if self.sink else None,
            cached=cache,
            implementation=self.attention,
        )
        x = x + self._part(self.attn_out(h))
        x = x + recomputed(Block._mlp)(self, x)
        new = Cache(jnp.swapaxes(k, 1, 2), jnp.transpose(v, (0, 2, 3, 1)))
        return constrain(x, "batch", None, None), new

    def _part(self, h: Array) -> Array:
        return h * jnp.asarray(self.multiplier, h.dtype)

    def _heads(self, x: Array, place: Place) -> tuple[Array, Array, Array]:
        h = self.norm1(x).astype(self.dtype)
        q, k = kept(self.query(h)), kept(self.key(h))
        if self.normed_heads:
            q, k = self._whole(self.query_norm, q), self._whole(self.key_norm, k)
        q, k = (apply_rotary(a, place.cos, place.sin) for a in (q, k))
        return q, k, self.value(h)

    def _whole(self, norm: RMSNorm, heads: Array) -> Array:
        """The norm over the full width, before it means anything that there are heads."""
        flat = heads.reshape(*heads.shape[:2], -1)
        return norm(flat).astype(self.dtype).reshape(heads.shape)

    def _mlp(self, x: Array) -> Array:
        h = self.norm2(x).astype(self.dtype)
        h = jnp.square(nn.relu(kept(self.mlp_in(h))))
        return self._part(kept(self.mlp_out(h)))


def factor(
    weight_scale: float | str, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> float:
    """Return the factor of a matrix: a number, or 'fan_in' or 'fan_out', its size to the -1/2."""
    if isinstance(weight_scale, str):
        shape = {"fan_in": in_shape, "fan_out": out_shape}[weight_scale]
        size = 1
        for count in shape:
            size *= count
        return size**-0.5
    return weight_scale


class TimeFreeTransformer(nn.Module):
    """Denoiser: noisy ids z_t int32 [B, L] and times t -> float32 logits [B, L, vocab_size].

    Of the times only this counts: a row's beginning at time 0 (t [B, L]) is a prompt, whose tokens
    see each other and not what follows; t [B] or [1] means no prompt. Only a model that was trained
    with prompts is told them (`position_times`). Both branches of a layer have the factor
    resid_scale / num_layers, logits head_scale (not with tied embeddings). `init_std` and
    `head_std` are those of matrices and of the output layer; intermediate_size None: 4 times the
    width. `dtype` is that of the products; `remat` and `attention` as in `models.dit.DiT`.

    block_length B > 0: a model by blocks. Noisy tokens see their own block of B and the clean
    tokens of the blocks before it, so that it is p(block | blocks before): with B = 1
    autoregressive.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int | None = None
    max_seq_len: int = 512
    resid_scale: float = RESID_SCALE
    head_scale: float = 1.0
    weight_scale: float | str = 1.0
    soft_cap: float = 30.0
    rms_norm_eps: float = 1e-6
    normed_heads: bool = True
    sink: bool = True
    mlp_bias: bool = True
    tie_embeddings: bool = False
    rope_theta: float = ROTARY_BASE
    init_std: float = AUX_STD
    head_std: float = 0.0
    dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention: str = ""
    position_times: bool = False
    block_length: int = 0

    def setup(self) -> None:
        D = self.hidden_size
        check_heads(D, self.num_heads, self.num_heads)
        self.vocab_embed = Embedding(
            self.vocab_size, D, nn.initializers.normal(AUX_STD), self.dtype
        )
        stack = layer_stack(
            Block,
            self.num_layers,
            scan_layers=self.scan_layers,
            remat=self.remat,
            in_axes=(nn.broadcast, 0),
        )
        self.blocks = stack(
            D,
            self.num_heads,
            self.intermediate_size or MLP_RATIO * D,
            self.resid_scale / self.num_layers,
            self.weight_scale,
            self.soft_cap,
            self.rms_norm_eps,
            self.normed_heads,
            self.sink,
            self.mlp_bias,
            nn.initializers.normal(self.init_std),
            self.dtype,
            self.attention,
        )
        self.final_norm = RMSNorm(D, self.rms_norm_eps, zero_centred=True)
        if not self.tie_embeddings:
            self.output = Linear(
                in_shape=(D,),
                out_shape=(self.vocab_size,),
                in_axes=("embed",),
                out_axes=("vocab",),
                kernel_init=nn.initializers.normal(self.head_std),
                dtype=self.dtype,
                out_dtype=at_least_float32(self.dtype),
            )

    def __call__(
        self, z_t: Array, t: Array, lengths: Array | None = None, clean: Array | None = None
    ) -> Array:
        return self.project(self.features(z_t, t, lengths, clean))

    def features(
        self, z_t: Array, t: Array, lengths: Array | None = None, clean: Array | None = None
    ) -> Array:
        """What the output projection reads, [B, L, hidden_size] in `dtype`.

        lengths int32 [B]: positions from there on are padding, which no other position sees.
        clean int32 [B, L], read by a model by blocks: what the blocks before each are; None: what
        z_t says. Raises InputError for a sequence longer than max_seq_len or a t of another shape.
        """
        check_sequence(z_t, self.max_seq_len)
        check_times(t, z_t)
        length = z_t.shape[1]
        places = jnp.arange(length)
        if self.block_length:
            mask = sees_blocks(length, self.block_length)[None]
            if lengths is not None:
                is_text = places[None] < lengths[:, None]
                mask = mask & jnp.tile(is_text, (1, 2))[:, None]
            both = jnp.concatenate([z_t, z_t if clean is None else clean], axis=1)
            return self.run(both, jnp.tile(places, 2), mask[:, None])[0][:, :length]
        mask = None
        if t.ndim == 2:
            mask = sees_prompt(prompts(t))[:, None]
        return self.run(z_t, places, mask, lengths)[0]

    def run(
        self,
        ids: Array,
        positions: Array,
        mask: Array | None = None,
        lengths: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache]:
        """Features of tokens [B, T], and their keys and values for a cache.

        positions int [T] or [B, T]; mask bool, broadcast to [B, heads, T, S + T] (a cache of S
        tokens first), None: everything is seen; the learned key is seen by all.
        """
        wide = at_least_float32(self.dtype)
        head_dim = self.hidden_size // self.num_heads
        frequencies = rotary_frequencies(head_dim, self.rope_theta, dtype=wide)
        cos, sin = rotary_tables(positions, frequencies)
        x = self.vocab_embed(ids)
        x, new = self.blocks(x, Place(cos, sin, mask, lengths), cache)
        h = self.final_norm(x)
        # The factor of the logits comes here: a fused projection then needs none.
        scale = 1.0 if self.tie_embeddings else self.head_scale
        return (h * scale).astype(self.dtype), new

    def project(self, h: Array) -> Array:
        """Logits of features h [..., hidden_size], float32 [..., vocab_size]."""
        return self.vocab_embed.attend(h) if self.tie_embeddings else self.output(h)

    @nn.nowrap
    def output_weights(self, params: Any) -> tuple[Array, Array | None]:
        """Kernel [hidden_size, vocab_size] of `project` (no bias), out of the parameters."""
        return output_kernel(params), None


def prompts(t: Array) -> Array:
    """Return which positions are a prompt, bool [B, L]: a row's beginning at time 0."""
    return jnp.cumprod(t == 0, axis=-1).astype(bool)


def sees_prompt(is_prompt: Array) -> Array:
    """Return what sees what, bool [B, L, L]: prompts [B, L] only themselves, the rest all."""
    return ~is_prompt[:, :, None] | is_prompt[:, None, :]


def sees_blocks(length: int, block_length: int) -> Array:
    """Return what sees what in rows of noisy and then clean tokens, bool [2 length, 2 length].

    Noisy tokens: their own block, noisy, and those before it, clean. Clean tokens: their own block
    and those before it, clean.
    """
    block = jnp.arange(length) // block_length
    same, before = block[:, None] == block[None], block[:, None] > block[None]
    nothing = jnp.zeros((length, length), bool)
    return jnp.block([[same, before], [nothing, same | before]])


def blocks_of(network: Any) -> int:
    """Return the length of a network's blocks, which see clean tokens before them; 0: none."""
    return getattr(network, "block_length", 0)
