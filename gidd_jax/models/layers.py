"""Layers that the networks share: normalisation, linear maps, the stack of blocks.

Every parameter is float32 and carries logical axis names (`sharding.RULES` maps them to mesh
axes). Vectors of the model width (norm scales, biases) are replicated: gathering them would cost
more than the memory they take. Matrix products run in the module's `dtype`; normalisation runs in
float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.spmd import get_logical_axis_rules
from jax.ad_checkpoint import checkpoint_name

from gidd_jax.errors import InputError
from gidd_jax.ops.attention import OUTPUT_NAME

Array = jax.Array
Initializer = Callable[..., Array]

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME),
    ),
}

PRODUCT_NAME = "product"


def kept(product: Array) -> Array:
    """Mark the result of a product as what `recomputed` keeps."""
    return checkpoint_name(product, PRODUCT_NAME)


# A part of a layer of which the backward pass finds its inputs and products (`kept`) alone, and
# computes the elementwise rest again: that costs less than float32 copies of it for every layer.
# Within a loop over layers no barrier is needed for that; of an unrolled one (`scan_layers=False`)
# the compiler may keep the copies.
recomputed = functools.partial(
    nn.remat,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names(PRODUCT_NAME),
)


def at_least_float32(dtype: Any) -> Any:
    """The dtype that norms, angles and logits have: float32, or float64 where all is."""
    return jnp.promote_types(dtype, jnp.float32)


def uniform_fan_in(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), what torch.nn.Linear draws weights and biases from."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def constrain(x: Array, *names: str | None) -> Array:
    """Lay x out over the mesh by logical axis names, one per axis; no-op without a mesh.

    Needs `sharding.activate`. An axis that the mesh does not divide evenly is replicated.
    """
    rules, sizes = dict(get_logical_axis_rules()), jax.sharding.get_abstract_mesh().shape
    if not rules or not sizes:
        return x
    axes = [rules[name] if name else None for name in names]
    ways = [
        math.prod(sizes[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
        for axis in axes
    ]
    spec = [axis if x.shape[i] % ways[i] == 0 else None for i, axis in enumerate(axes)]
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))


def param(
    module: nn.Module,
    name: str,
    init: Initializer,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> Array:
    """A float32 parameter of `module` that carries the logical axis names `axes`.

    The names only travel with the parameter; its layout is decided where the state is created
    (`sharding.state_shardings`), not constrained again at every use.
    """
    boxed_init = nn.with_logical_partitioning(init, axes)
    value = module.param(name, boxed_init, shape, jnp.float32, unbox=False)
    if isinstance(value, nn.meta.AxisMetadata):
        value = cast(nn.LogicallyPartitioned, value).unbox(apply_constraint=False)
    return cast(Array, value)


class Linear(nn.Module):
    """Affine map of the last len(in_shape) axes of x to out_shape, [..., *in] -> [..., *out].

    `kernel_init` draws the kernel and `bias_init` the bias (None: no bias). The result has `dtype`
    unless `out_dtype` says otherwise. `scale` is a factor of the product, before the bias.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str | None, ...]
    out_axes: tuple[str | None, ...]
    kernel_init: Initializer
    bias_init: Initializer | None = None
    dtype: Any = jnp.float32
    out_dtype: Any = None
    precision: Any = None
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes, shape = self.in_axes + self.out_axes, self.in_shape + self.out_shape
        kernel = param(self, "kernel", self.kernel_init, axes, shape)
        # Gathered over fsdp before the product, in its dtype: the compiler would else go through
        # slices of the width, products too thin to fill a TPU's matrix units.
        whole = (None if axis == "embed" else axis for axis in axes)
        kernel = constrain(kernel.astype(self.dtype), *whole)
        n = len(self.in_shape)
        y = jnp.tensordot(
            x.astype(self.dtype),
            kernel,
            axes=n,
            precision=self.precision,
            preferred_element_type=self.out_dtype or self.dtype,
        )
        if self.scale != 1.0:
            y = y * jnp.asarray(self.scale, y.dtype)
        if self.bias_init is None:
            return y
        # Biases along the model width stay whole on every device, like the norm scales.
        bias_axes = tuple(None if a == "embed" else a for a in self.out_axes)
        bias = param(self, "bias", self.bias_init, bias_axes, self.out_shape)
        return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class Embedding(nn.Module):
    """Token embedding table [rows, width]: ids int32 [B, L] -> [B, L, width] in `dtype`."""

    rows: int
    width: int
    embedding_init: Initializer
    dtype: Any = jnp.float32

    def setup(self) -> None:
        shape = (self.rows, self.width)
        self.embedding = param(self, "embedding", self.embedding_init, ("vocab", "embed"), shape)

    def __call__(self, ids: Array) -> Array:
        # The width of the table is gathered first: looking up in a table split by width would
        # give activations split by width, which the compiler can only turn into activations
        # split by batch through a full copy. The cast comes last so that the gradient of a
        # frequent token (the mask) is summed in float32.
        table = constrain(self.embedding, "vocab", None)
        rows = constrain(jnp.take(table, ids, axis=0), "batch", None, None)
        return rows.astype(self.dtype)

    def attend(self, h: Array) -> Array:
        """Logits of a tied output projection, float32: [..., width] -> [..., rows]."""
        table, wide = self.embedding.astype(self.dtype), at_least_float32(self.dtype)
        return jnp.einsum("...d,vd->...v", h, table, preferred_element_type=wide)


def output_kernel(params: Any) -> Array:
    """The kernel [width, rows] of an output layer, or of the table that it is tied to."""
    if "output" in params:
        return params["output"]["kernel"]
    return params["vocab_embed"]["embedding"].T


class LayerNorm(nn.Module):
    """Layer normalisation with a scale and no bias, computed and returned in float32."""

    width: int
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = _norm_scale(self, self.width)
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return _per_feature(scale, centred * jax.lax.rsqrt(variance + self.eps))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a scale, computed and returned in float32.

    zero_centred: the parameter is what the scale has beyond 1, so that a decay draws it to 1.
    """

    width: int
    eps: float = 1e-6
    zero_centred: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = _norm_scale(self, self.width, zero_centred=self.zero_centred)
        x = x.astype(at_least_float32(x.dtype))
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return _per_feature(scale, x * jax.lax.rsqrt(mean_square + self.eps))


def _norm_scale(module: nn.Module, width: int, *, zero_centred: bool = False) -> Array:
    if zero_centred:
        return 1.0 + param(module, "scale", nn.initializers.zeros_init(), (None,), (width,))
    return param(module, "scale", nn.initializers.ones_init(), (None,), (width,))


def _per_feature(scale: Array, x: Array) -> Array:
    return x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def layer_stack(
    block: type[nn.Module],
    num_layers: int,
    *,
    scan_layers: bool,
    remat: str,
    in_axes: tuple[Any, ...],
) -> Any:
    """Class of `num_layers` blocks run one after another, parameters stacked on a leading axis.

    `scan_layers` compiles one block in a loop, otherwise the loop is unrolled; the parameters
    are the same. `remat` names what the backward pass recomputes: 'none', 'full', 'attention'
    (everything but attention, where that is the TPU's kernel) or 'dots' (everything but that and
    the matrix products with weights). `in_axes` as in flax.linen.scan.
    """
    if remat not in REMAT_POLICIES:
        raise InputError(f"remat is {remat!r}; use one of {', '.join(REMAT_POLICIES)}.")
    if remat != "none":
        # In a loop the compiler cannot merge the recomputation with the forward pass, so the
        # barrier against that would only cost time.
        block = nn.remat(block, prevent_cse=not scan_layers, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,  # pyright: ignore[reportArgumentType]
        length=num_layers,
        unroll=1 if scan_layers else num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def check_sequence(ids: Array, max_seq_len: int) -> None:
    """InputError unless ids is [B, L] with L at most max_seq_len."""
    if ids.ndim != 2:
        raise InputError(f"token ids have shape {ids.shape}; give [batch, length].")
    if ids.shape[1] > max_seq_len:
        raise InputError(
            f"the sequence length {ids.shape[1]} exceeds the model's max_seq_len {max_seq_len}; "
            "shorten the input or raise max_seq_len."
        )


def check_times(t: Array, ids: Array) -> None:
    """InputError unless t is of rows, [B] or [1], or of the positions of ids [B, L]."""
    if t.shape not in ((1,), ids.shape[:1], ids.shape):
        rows = ids.shape[0]
        raise InputError(f"t has shape {t.shape}; give [{rows}], [1] or {list(ids.shape)}.")


def check_heads(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int | None = None
) -> None:
    """InputError unless heads have an even number of features and share keys evenly.

    head_dim: None where the heads divide the width among them.
    """
    if head_dim is not None and head_dim % 2:
        raise InputError(f"head_dim is {head_dim}: it must be even.")
    if head_dim is None and (hidden_size % num_heads or (hidden_size // num_heads) % 2):
        raise InputError(
            f"hidden_size {hidden_size} with num_heads {num_heads}: hidden_size / num_heads must "
            "be an even whole number."
        )
    if num_heads % num_kv_heads:
        raise InputError(f"num_kv_heads is {num_kv_heads}; it must divide num_heads ({num_heads}).")
