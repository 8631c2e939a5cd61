"""The Llama transformer, and as the autoregressive baseline, with a key-value cache.

Same architecture as transformers' LlamaForCausalLM (RMSNorm, SwiGLU, half-split rotary positions,
grouped-query attention), and Qwen2's and Qwen3's by what they do otherwise (biases, norms of the
queries and keys of a head, heads whose size is not width / heads), so that their checkpoints load
(see `interchange.tensors`). `models.llama_denoiser` has the same network, of which all tokens see
all.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gidd_jax.errors import InputError
from gidd_jax.models.conditioning import modulate, modulation
from gidd_jax.models.layers import (
    Array,
    Embedding,
    Linear,
    RMSNorm,
    check_heads,
    check_sequence,
    constrain,
    kept,
    layer_stack,
    output_kernel,
    recomputed,
)
from gidd_jax.models.rotary import (
    RopeScaling,
    apply_rotary,
    rotary_frequencies,
    rotary_tables,
)
from gidd_jax.ops.attention import attention

INIT = nn.initializers.normal(0.02)
ZEROS = nn.initializers.zeros_init()


class Cache(NamedTuple):
    """Rotated keys and values of every layer, [layers, B, length, kv_heads, head_dim]."""

    keys: Array
    values: Array


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a block is made of; biases of queries, keys and values, of the output of attention, of
    the perceptron."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool
    rms_norm_eps: float
    cond_dim: int = 0  # of the time embedding; 0: blocks are told no time


class Place(NamedTuple):
    """Where tokens stand, and what they see.

    cos, sin: of their positions; position: how many tokens a cache holds before them; lengths as in
    `ops.attention`; future: what is added to the scores of later tokens, float32 []; None: nothing
    where blocks are bidirectional. condition: what the time says, [B or 1, cond_dim] or
    [B, T, cond_dim]; None where blocks are told none.
    """

    cos: Array
    sin: Array
    position: Array | None = None
    lengths: Array | None = None
    future: Array | None = None
    condition: Array | None = None


class Block(nn.Module):
    """Transformer block: x [B, T, D] -> (x, cache of this layer).

    Without a cache x is the whole sequence. With one, x continues the `position` tokens whose
    keys and values the cache holds, and the returned cache holds those of x too; such a block is
    causal.
    """

    shape: Shape
    is_causal: bool
    dtype: Any
    attention: str

    def setup(self) -> None:
        shape = self.shape
        D, M, eps = shape.hidden_size, shape.intermediate_size, shape.rms_norm_eps
        self.norm1 = RMSNorm(D, eps)
        self.norm2 = RMSNorm(D, eps)
        self.query = self._head_map(shape.num_heads)
        self.key = self._head_map(shape.num_kv_heads)
        self.value = self._head_map(shape.num_kv_heads)
        if shape.head_norms:
            self.query_norm = RMSNorm(shape.head_dim, eps)
            self.key_norm = RMSNorm(shape.head_dim, eps)
        self.attn_out = Linear(
            in_shape=(shape.num_heads, shape.head_dim),
            out_shape=(D,),
            in_axes=("heads", "kv"),
            out_axes=("embed",),
            kernel_init=INIT,
            bias_init=ZEROS if shape.out_bias else None,
            dtype=self.dtype,
        )
        self.mlp_gate = self._mlp_map(D, M, "embed", "mlp")
        self.mlp_in = self._mlp_map(D, M, "embed", "mlp")
        self.mlp_out = self._mlp_map(M, D, "mlp", "embed")
        if shape.cond_dim:
            self.modulation = modulation(shape.cond_dim, 6, D)

    def _head_map(self, count: int) -> Linear:
        return Linear(
            in_shape=(self.shape.hidden_size,),
            out_shape=(count, self.shape.head_dim),
            in_axes=("embed",),
            out_axes=("heads", "kv"),
            kernel_init=INIT,
            bias_init=ZEROS if self.shape.qkv_bias else None,
            dtype=self.dtype,
        )

    def _mlp_map(self, inputs: int, outputs: int, in_axis: str, out_axis: str) -> Linear:
        bias = ZEROS if self.shape.mlp_bias else None
        return Linear((inputs,), (outputs,), (in_axis,), (out_axis,), INIT, bias, self.dtype)

    def __call__(self, x: Array, place: Place, cache: Cache | None) -> tuple[Array, Cache | None]:
        parts: list[Array | None] = [None] * 6
        if place.condition is not None:
            told = self.modulation(place.condition)
            parts = [told[..., i, :] for i in range(6)]
        q, k, v = recomputed(Block._heads)(self, x, place, *parts[:2])
        if cache is None:
            h = self._attend(q, k, v, place)
        else:
            h, cache = _attend_cached(q, k, v, place.position, cache)
        x = x + _gated(self.attn_out(h), parts[2])
        x = x + recomputed(Block._mlp)(self, x, *parts[3:])
        return constrain(x, "batch", None, None), cache

    def _heads(
        self, x: Array, place: Place, shift: Array | None, scale: Array | None
    ) -> tuple[Array, Array, Array]:
        h = _modulated(self.norm1(x), shift, scale).astype(self.dtype)
        q, k = self.query(h), self.key(h)
        if self.shape.head_norms:
            q = self.query_norm(q).astype(self.dtype)
            k = self.key_norm(k).astype(self.dtype)
        q, k = (apply_rotary(part, place.cos, place.sin) for part in (q, k))
        return q, k, self.value(h)

    def _attend(self, q: Array, k: Array, v: Array, place: Place) -> Array:
        if place.future is None:
            return attention(
                q,
                k,
                v,
                is_causal=self.is_causal,
                lengths=place.lengths,
                implementation=self.attention,
            )
        later = jnp.triu(jnp.ones((q.shape[1], k.shape[1]), bool), 1)
        bias = jnp.where(later, place.future, 0.0)[None, None]
        # No kernel is worth its while for the part of a run in which attention is annealed.
        return attention(q, k, v, bias=bias, lengths=place.lengths, implementation="xla")

    def _mlp(self, x: Array, shift: Array | None, scale: Array | None, gate: Array | None) -> Array:
        h = _modulated(self.norm2(x), shift, scale).astype(self.dtype)
        h = self.mlp_out(nn.silu(kept(self.mlp_gate(h))) * kept(self.mlp_in(h)))
        return _gated(h, gate)


def _modulated(x: Array, shift: Array | None, scale: Array | None) -> Array:
    return x if shift is None or scale is None else modulate(x, shift, scale)


def _gated(h: Array, gate: Array | None) -> Array:
    """A branch times 1 + gate: a gate of 0, where it starts, changes nothing."""
    return h if gate is None else modulate(h, jnp.zeros_like(gate), gate).astype(h.dtype)


def _attend_cached(
    q: Array, k: Array, v: Array, position: Any, cache: Cache
) -> tuple[Array, Cache]:
    def put(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, axis=1)

    cache = Cache(put(cache.keys, k), put(cache.values, v))
    queries = position + jnp.arange(q.shape[1])
    mask = jnp.arange(cache.keys.shape[1])[None, :] <= queries[:, None]
    # A few query rows against a mask: nothing for a flash kernel to win.
    h = attention(q, cache.keys, cache.values, mask=mask[None, None], implementation="xla")
    return h, cache


class LlamaTransformer(nn.Module):
    """What both Llamas are: embedding, blocks, output projection.

    `num_kv_heads`, `head_dim` and `intermediate_size` default to num_heads, hidden_size / num_heads
    and 4 * hidden_size; `head_norms`: queries and keys of a head are normalised. `dtype` is that of
    the matrix products and the cache; parameters are float32. `remat` names what the backward pass
    computes again (`layers.layer_stack`), `attention` the form of attention (`ops.attention`).
    """

    is_causal: ClassVar[bool]  # whether a token sees only those before it

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    max_seq_len: int = 512
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention: str = ""

    def setup(self) -> None:
        D = self.hidden_size
        check_heads(D, self.num_heads, self.shape.num_kv_heads, self.head_dim)
        self.vocab_embed = Embedding(self.vocab_size, D, INIT, self.dtype)
        stack = layer_stack(
            Block,
            self.num_layers,
            scan_layers=self.scan_layers,
            remat=self.remat,
            in_axes=(nn.broadcast, 0),
        )
        self.blocks = stack(self.shape, self.is_causal, self.dtype, self.attention)
        self.final_norm = RMSNorm(D, self.rms_norm_eps)
        if not self.tie_embeddings:
            self.output = Linear(
                in_shape=(D,),
                out_shape=(self.vocab_size,),
                in_axes=("embed",),
                out_axes=("vocab",),
                kernel_init=INIT,
                dtype=self.dtype,
                out_dtype=jnp.float32,
            )

    @property
    def time_width(self) -> int:
        """Width of the time embedding; 0: the network is told no time."""
        return 0

    @property
    def shape(self) -> Shape:
        """What the blocks are made of, with the defaults filled in."""
        return Shape(
            self.hidden_size,
            self.num_heads,
            self.num_kv_heads or self.num_heads,
            self.head_dim or self.hidden_size // self.num_heads,
            self.intermediate_size or 4 * self.hidden_size,
            self.qkv_bias,
            self.out_bias,
            self.mlp_bias,
            self.head_norms,
            self.rms_norm_eps,
            self.time_width,
        )

    def project(self, h: Array) -> Array:
        """Logits of features h [..., hidden_size], float32 [..., vocab_size]."""
        return self.vocab_embed.attend(h) if self.tie_embeddings else self.output(h)

    @nn.nowrap
    def output_weights(self, params: Any) -> tuple[Array, Array | None]:
        """Kernel [hidden_size, vocab_size] of `project` (no bias), out of the parameters."""
        return output_kernel(params), None

    def _tables(self, positions: Array) -> tuple[Array, Array]:
        """Cosines and sines of positions int [T], as blocks take them."""
        scaling = self.rope_scaling
        frequencies = rotary_frequencies(self.shape.head_dim, self.rope_theta, scaling)
        tables = rotary_tables(positions, frequencies)
        if scaling is None:
            return tables
        cos, sin = (table * scaling.amplitude for table in tables)
        return cos, sin


class Llama(LlamaTransformer):
    """Autoregressive language model: ids int32 [B, L] -> float32 logits [B, L, vocab_size]."""

    is_causal = True

    def __call__(self, ids: Array) -> Array:
        return self.project(self.features(ids))

    def features(self, ids: Array) -> Array:
        """What the output projection reads, [B, L, hidden_size] in `dtype`.

        Raises InputError for a sequence longer than max_seq_len.
        """
        check_sequence(ids, self.max_seq_len)
        h, _ = self._run(ids, jnp.arange(ids.shape[1]), None, None)
        return h

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for sequences of up to `length` tokens; needs no parameters."""
        if not 0 < length <= self.max_seq_len:
            raise InputError(
                f"the cache length is {length}; use 1 to max_seq_len ({self.max_seq_len})."
            )
        heads, head_dim = self.shape.num_kv_heads, self.shape.head_dim
        shape = (self.num_layers, batch_size, length, heads, head_dim)
        return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def decode_step(self, ids: Array, cache: Cache, position: Array | int) -> tuple[Array, Cache]:
        """Logits of the next T tokens, given a cache of the `position` tokens before them.

        ids [B, T], position an integer scalar shared by the rows -> float32 [B, T, vocab_size]
        and the cache extended by T. position + T must not exceed the cache's length: a traced
        position cannot be checked, and the cache would be overwritten at its end.
        """
        length = cache.keys.shape[2]
        check_sequence(ids, length)
        if isinstance(position, int) and position + ids.shape[1] > length:
            raise InputError(
                f"position {position} + {ids.shape[1]} tokens exceeds the cache's length "
                f"{length}; make the cache longer."
            )
        positions = position + jnp.arange(ids.shape[1])
        h, cache = self._run(ids, positions, jnp.asarray(position), cache)
        return self.project(h), cache

    def _run(
        self, ids: Array, positions: Array, position: Array | None, cache: Cache | None
    ) -> tuple[Array, Any]:
        place = Place(*self._tables(positions), position)
        x, cache = self.blocks(self.vocab_embed(ids), place, cache)
        return self.final_norm(x).astype(self.dtype), cache
