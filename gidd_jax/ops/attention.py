"""Scaled dot-product attention by the form that suits the device, with one meaning for all.

On GPUs cuDNN's flash kernel, on TPUs JAX's splash kernel (Pallas), elsewhere XLA's plain form,
which is also the twin that the kernels are tested against. No kernel writes the scores
[B, heads, T, S] to memory, forward or backward.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from gidd_jax.errors import InputError
from gidd_jax.parallel import sharding

Array = jax.Array

IMPLEMENTATIONS = ("", "xla", "cudnn", "splash")
OUTPUT_NAME = "attention"  # what a policy of recomputation calls what the TPU's kernel keeps
MOST_SCORES = 1 << 21  # on CPU, computed at once
LANES = 128  # of a TPU: its kernel takes lengths in multiples of this
MOST_BLOCK = 512  # queries, and keys, whose scores the TPU's kernel holds at once
FILLED = (64, 128, 256)  # widths of a head at which the TPU's kernel is used unasked


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    implementation: str,
    is_causal: bool = False,
    mask: Array | None = None,
    bias: Array | None = None,
    lengths: Array | None = None,
    soft_cap: float = 0.0,
    sink: tuple[Array, Array] | None = None,
    cached: tuple[Array, Array] | None = None,
) -> Array:
    """Scaled dot-product attention, q [B, T, heads, head_dim], k and v [B, S, kv_heads, head_dim].

    `implementation` is 'xla', 'cudnn', 'splash' or '' (see `automatic`). `mask` is boolean,
    broadcast to [B, heads, T, S], and not for splash; `bias`, of such a shape, is added to the
    scores, in the plain form without soft cap and sink alone; `lengths` int32 [B], at least 1: keys
    and values from there on are padding, which nothing attends to. soft_cap c > 0 makes each score
    s c tanh(s / c). sink: a key and a value of each head, [heads, head_dim], that every query sees,
    whatever the mask; not with is_causal. cached: keys [B, kv_heads, S', head_dim] and values [B,
    kv_heads, head_dim, S'] before k and v, of which the mask tells, too; not with is_causal or
    lengths. Raises InputError for another implementation, splash with a mask, or cudnn with a soft
    cap.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"attention is {implementation!r}; use 'xla', 'cudnn', 'splash' or '' (automatic)."
        )
    backend = jax.default_backend()
    if not implementation:
        best = automatic(backend, q.dtype, q.shape[1], q.shape[3])
        lacks = {"splash": mask is not None, "cudnn": soft_cap > 0}
        implementation = "xla" if lacks.get(best, False) else best
    if sink is not None:
        assert not is_causal
        before = 0 if cached is None else cached[0].shape[2]
        k, v, mask, lengths = _with_sink(k, v, mask, lengths, sink, before)
    if cached is not None:
        assert lengths is None
        assert not is_causal
        if soft_cap == 0 or implementation != "xla":
            k, v = _joined(cached, k, v)
            cached = None
    if implementation == "splash":
        if mask is not None:
            raise InputError("attention is 'splash', which takes no mask; use 'xla'.")
        return _on_mesh(q, k, v, lengths, is_causal, soft_cap, interpret=backend != "tpu")
    if bias is not None:
        assert implementation == "xla"
        assert soft_cap == 0
        assert sink is None
    form: Any = implementation
    attend: Any = functools.partial(
        jax.nn.dot_product_attention, is_causal=is_causal, implementation=form
    )
    if soft_cap > 0:
        if implementation == "cudnn":
            raise InputError("attention is 'cudnn', which has no soft cap of scores; use 'xla'.")
        attend = functools.partial(_capped, soft_cap=soft_cap, is_causal=is_causal, cached=cached)
    if bias is not None:
        attend = functools.partial(attend, bias=bias)
    whole = mask is not None or bias is not None or cached is not None
    if whole or not _goes_row_by_row(q, k):
        return attend(q, k, v, mask=mask, key_value_seq_lengths=lengths)

    @jax.checkpoint  # the backward pass computes the scores of a row again
    def row(parts: tuple[Array, Array, Array, Array | None]) -> Array:
        q, k, v, lengths = jax.tree.map(lambda a: a[None], parts)
        return attend(q, k, v, key_value_seq_lengths=lengths)[0]

    return jax.lax.map(row, (q, k, v, lengths))


def _with_sink(
    k: Array,
    v: Array,
    mask: Array | None,
    lengths: Array | None,
    sink: tuple[Array, Array],
    before: int,
) -> tuple[Array, Array, Array | None, Array | None]:
    """Put a key and a value of each head before the others, where every query sees them.

    before: of the mask, so many entries are for what is cached.
    """
    k, v = (
        jnp.concatenate([jnp.broadcast_to(s.astype(a.dtype), (a.shape[0], 1, *s.shape)), a], axis=1)
        for a, s in zip((k, v), sink, strict=True)
    )
    if mask is not None:
        seen = jnp.ones((*mask.shape[:-1], 1), bool)
        mask = jnp.concatenate([mask[..., :before], seen, mask[..., before:]], axis=-1)
    return k, v, mask, None if lengths is None else lengths + 1


def _joined(cached: tuple[Array, Array], k: Array, v: Array) -> tuple[Array, Array]:
    """Return keys and values with those cached before them, for forms that want one array each."""
    keys, values = jnp.swapaxes(cached[0], 1, 2), jnp.transpose(cached[1], (0, 3, 1, 2))
    return (
        jnp.concatenate([keys.astype(k.dtype), k], axis=1),
        jnp.concatenate([values.astype(v.dtype), v], axis=1),
    )


def _capped(
    q: Array,
    k: Array,
    v: Array,
    *,
    soft_cap: float,
    is_causal: bool,
    cached: tuple[Array, Array] | None,
    mask: Array | None = None,
    key_value_seq_lengths: Array | None = None,
) -> Array:
    """The plain form with a soft cap on the scores, which jax.nn.dot_product_attention lacks.

    Softmax in float32. A query that sees nothing attends to all alike, as there. What is cached has
    products of its own: joined with k and v it would be copied at every call.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q * jnp.asarray(1.0 / math.sqrt(q.shape[-1]), q.dtype)
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=wide)
    if cached is not None:
        keys = cached[0].astype(k.dtype)
        first = jnp.einsum("btkgh,bksh->bkgts", grouped, keys, preferred_element_type=wide)
        scores = jnp.concatenate([first, scores], axis=-1)
    scores = soft_cap * jnp.tanh(scores / soft_cap)
    sees = jnp.ones((1, 1, *scores.shape[-2:]), bool)
    if is_causal:
        sees &= jnp.tril(sees)
    if key_value_seq_lengths is not None:
        is_text = jnp.arange(scores.shape[-1])[None] < key_value_seq_lengths[:, None]
        sees = sees & is_text[:, None, None]
    if mask is not None:
        sees = sees & mask
    sees = jnp.broadcast_to(sees, (sees.shape[0], q.shape[2], *sees.shape[2:]))
    sees = sees.reshape(sees.shape[0], k.shape[2], -1, *sees.shape[2:])
    scores = jnp.where(sees, scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if cached is None:
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)
    first, rest = jnp.split(weights, [cached[0].shape[2]], axis=-1)
    values = cached[1].astype(v.dtype)
    out = jnp.einsum("bkgts,bkhs->btkgh", first, values, preferred_element_type=wide)
    out += jnp.einsum("bkgts,bskh->btkgh", rest, v, preferred_element_type=wide)
    return out.astype(v.dtype).reshape(q.shape)


def automatic(backend: str, dtype: Any, length: int, head_dim: int) -> str:
    """Return the implementation that '' stands for: the backend's kernel where it can pay.

    Kernels want 16-bit numbers; the TPU's also a sequence that fills its lanes and a head of 64,
    128 or 256 features.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return "xla"
    if backend == "tpu" and length >= LANES and head_dim in FILLED:
        return "splash"
    return "cudnn" if backend == "gpu" else "xla"


def _goes_row_by_row(q: Array, k: Array) -> bool:
    """Tell whether to go through the batch: on CPU, where scores are many and no mesh splits it.

    XLA writes them down there: those of one row stay in the caches, and of a batch of 4 x 512
    tokens a step takes a tenth less time.
    """
    batch, length, heads = q.shape[:3]
    scores = batch * heads * length * k.shape[1]
    is_split = jax.sharding.get_abstract_mesh().size > 1
    return jax.default_backend() == "cpu" and not is_split and scores > MOST_SCORES


def _on_mesh(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None,
    is_causal: bool,
    soft_cap: float,
    interpret: bool,
) -> Array:
    """Run the TPU's kernel on each device's rows and heads: the compiler cannot split a kernel."""
    run = functools.partial(_splash, is_causal=is_causal, soft_cap=soft_cap, interpret=interpret)
    sizes = jax.sharding.get_abstract_mesh().shape
    rows = tuple(a for a in sharding.BATCH_AXES if sizes.get(a, 1) > 1)
    heads = sharding.HEAD_AXIS if sizes.get(sharding.HEAD_AXIS, 1) > 1 else None
    # What the mesh does not divide is replicated, as everywhere (`layers.constrain`).
    if q.shape[0] % math.prod(sizes[a] for a in rows):
        rows = ()
    if heads and k.shape[2] % sizes[heads]:
        heads = None
    if not any(size > 1 for size in sizes.values()):
        return run(q, k, v, lengths)
    spec = P(rows or None, None, heads)
    specs = (spec, spec, spec, None if lengths is None else P(rows or None))
    return jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, lengths)


def _splash(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None,
    *,
    is_causal: bool,
    soft_cap: float,
    interpret: bool,
) -> Array:
    """Attention of one device by JAX's splash kernel; any T and S, filled up to whole lanes."""
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    q = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)
    q, k, v = (_by_heads(a) for a in (q, k, v))
    minor = splash.QKVLayout.HEAD_DIM_MINOR
    if q.shape[-1] < LANES:  # half of each row would be filling
        minor = splash.QKVLayout.SEQ_MINOR
        if not interpret:
            q, k, v = (_gradient_in_lanes(a) for a in (q, k, v))
    shape = q.shape[2], k.shape[2]
    kind = masks.CausalMask if is_causal else masks.FullMask
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([kind(shape)] * heads),
        block_sizes=_blocks(*shape, minor),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap or None,
        residual_checkpoint_name=OUTPUT_NAME,
        interpret=interpret,
    )
    segments = None
    if lengths is not None or keys != shape[1]:
        ends = jnp.full(q.shape[:1], keys) if lengths is None else lengths
        is_padding = jnp.arange(shape[1])[None] >= ends[:, None]
        segments = splash.SegmentIds(
            jnp.zeros((q.shape[0], shape[0]), jnp.int32), is_padding.astype(jnp.int32)
        )
    out: Any = jax.vmap(kernel)(q, k, v, segments)
    return jnp.swapaxes(out, 1, 2)[:, :queries]


@jax.custom_vjp
def _gradient_in_lanes(a: Array) -> Array:
    """Return a [B, heads, L, d]; its gradient is laid out with L along the lanes, as a is.

    The kernel writes gradients with d along the lanes: rotating their halves there costs more.
    """
    return a


def _with_layout(_: None, gradient: Array) -> tuple[Array]:
    return (with_layout_constraint(gradient, Layout(major_to_minor=(0, 1, 3, 2))),)


_gradient_in_lanes.defvjp(lambda a: (a, None), _with_layout)


def _by_heads(a: Array) -> Array:
    """Return a [B, L, heads, d] as [B, heads, L, d], with zeros up to a multiple of LANES."""
    filling = -a.shape[1] % LANES
    return jnp.swapaxes(jnp.pad(a, ((0, 0), (0, filling), (0, 0), (0, 0))), 1, 2)


def _blocks(queries: int, keys: int, minor: splash.QKVLayout) -> splash.BlockSizes:
    q, kv = (
        max(block for block in range(LANES, MOST_BLOCK + 1, LANES) if length % block == 0)
        for length in (queries, keys)
    )
    return splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        q_layout=minor,
        k_layout=minor,
        v_layout=minor,
        use_fused_bwd_kernel=True,  # scores once in the backward pass, not once for dq and for dkv
    )
