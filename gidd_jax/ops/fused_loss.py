"""Output projection and loss in one: never more logits in memory than those of a chunk of tokens.

The forward pass computes the loss and its gradients together, chunk by chunk: logits once, their
softmax, the few sums over the vocabulary that the closed forms of `loss.py` need, the gradient by
the logits, and its two products. The backward pass only scales by the cotangent. Three matrix
products, as many as any version needs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gidd_jax.ops.chunk_loss import ChunkLoss, Columns, Targets, Terms
from gidd_jax.ops.row_kernel import ROWS, loss_by_rows, suits
from gidd_jax.ops.vocabulary import Vocabulary
from gidd_jax.process import InterpolatingProcess, expand_time

Array = jax.Array

# Logits of a chunk: at least as many as keep the processor busy, at most 2 GiB of float32.
LEAST_LOGITS = {"cpu": 1 << 20, "gpu": 1 << 27, "tpu": 1 << 27}
MOST_LOGITS = 1 << 29


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the work is divided.

    Mesh axes over which the rows of the batch and the columns of the logits are split; how many
    tokens are a chunk; whether a kernel goes through a chunk's logits by rows.
    """

    batch_axes: tuple[str, ...]
    vocab_axis: str | None
    chunk_size: int
    by_rows: bool


def pairwise_sum(values: Array) -> Array:
    """Sum a vector in pairs: a single loss of thousands of nats swallows no digits of others."""
    while values.shape[0] > 1:
        values = jnp.pad(values, (0, values.shape[0] % 2))
        values = values[0::2] + values[1::2]
    return values[0]


def _loss_by_passes(
    config: ChunkLoss,
    products: Array,
    columns: Columns,
    targets: Targets,
    with_gradient: bool,
    dtype: Any,
) -> tuple[Terms, tuple[Array, Array] | None]:
    """Return what `row_kernel.loss_by_rows` does, by the compiler: one pass for each sum."""
    terms, dl = config.terms(products, columns, targets, with_gradient)
    if dl is None:
        return terms, None
    return terms, (dl.astype(dtype), jnp.sum(dl, axis=1 - config.vocabulary.axis))


def _run(
    config: ChunkLoss,
    layout: _Layout,
    with_gradient: bool,
    h: Array,
    kernel: Array,
    bias: Array,
    targets: Targets,
) -> tuple[Array, Terms, tuple[Array, Array, Array] | None]:
    """Loop over the chunks of h [N, D]; the sums over other devices are left to the caller."""
    count, width = h.shape
    chunks = -(-count // layout.chunk_size)
    size = -(-count // chunks)
    if layout.by_rows:
        size = -(-size // ROWS) * ROWS
    low_kernel, columns = kernel.astype(h.dtype), config.columns(bias)

    # The last chunk is filled up with copies of the last token, with coefficient 0.
    row = jnp.minimum(jnp.arange(chunks * size), count - 1)
    counts = jnp.arange(chunks * size) < count

    def split(a: Array) -> Array:
        return a[row].reshape(chunks, size, *a.shape[1:])

    def step(carry: Any, part: tuple[Array, Targets]) -> tuple[Any, Any]:
        h, targets = part
        products = config.vocabulary.logits(h, low_kernel)
        find = loss_by_rows if layout.by_rows else _loss_by_passes
        terms, gradients = find(config, products, columns, targets, with_gradient, h.dtype)
        losses = targets.coefficient * (terms.kl + terms.is_div)
        if gradients is None:
            return carry, (losses, terms, None)
        dl, d_bias = gradients
        dh = config.vocabulary.gradient_h(dl, low_kernel)
        d_kernel = config.vocabulary.add_gradient_kernel(carry[0], h, dl)
        return (d_kernel, carry[1] + d_bias), (losses, terms, dh)

    zeros = None
    if with_gradient:
        zeros = (jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32))
    targets = jax.tree.map(split, targets)
    coefficient = jnp.where(counts.reshape(chunks, size), targets.coefficient, 0.0)
    parts = (split(h), targets._replace(coefficient=coefficient))
    carry, (losses, terms, dh) = jax.lax.scan(step, zeros, parts)
    loss = pairwise_sum(losses.reshape(-1))
    terms = Terms(*(a.reshape(-1)[:count] for a in terms))
    if not with_gradient:
        return loss, terms, None
    return loss, terms, (dh.reshape(-1, width)[:count], *carry)


def _on_mesh(
    config: ChunkLoss,
    layout: _Layout,
    with_gradient: bool,
    h: Array,
    kernel: Array,
    bias: Array,
    targets: Targets,
) -> tuple[Array, Terms, tuple[Array, Array, Array] | None]:
    """Run on h [B, L, D] with the collectives that the current mesh asks for."""

    def local(h: Array, kernel: Array, bias: Array, targets: Targets):
        rows = h.shape[:2]
        flat = jax.tree.map(lambda a: a.reshape(-1), targets)
        flat_h = h.reshape(-1, h.shape[-1])
        loss, terms, grads = _run(config, layout, with_gradient, flat_h, kernel, bias, flat)
        terms = Terms(*(a.reshape(rows) for a in terms))
        if layout.batch_axes:
            loss = jax.lax.psum(loss, layout.batch_axes)
        if grads is None:
            return loss, tuple(terms), None
        dh, d_kernel, d_bias = grads
        if layout.vocab_axis is not None:
            dh = jax.lax.psum(dh, layout.vocab_axis)
        if layout.batch_axes:
            d_kernel, d_bias = jax.lax.psum((d_kernel, d_bias), layout.batch_axes)
        return loss, tuple(terms), (dh.reshape(h.shape), d_kernel, d_bias)

    if not layout.batch_axes and layout.vocab_axis is None:
        loss, terms, grads = local(h, kernel, bias, targets)
        return loss, Terms(*terms), grads
    rows, columns = P(layout.batch_axes or None), P(None, layout.vocab_axis)
    specs = (rows, columns, P(layout.vocab_axis), jax.tree.map(lambda _: rows, targets))
    grad_specs = (rows, columns, P(layout.vocab_axis)) if with_gradient else None
    outs: Any = (P(), (rows, rows), grad_specs)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=outs, check_vma=False)
    loss, terms, grads = mapped(h, kernel, bias, targets)
    return loss, Terms(*terms), grads


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
    config: ChunkLoss,
    layout: _Layout,
    h: Array,
    kernel: Array,
    bias: Array,
    targets: Targets,
) -> tuple[Array, Terms]:
    return _on_mesh(config, layout, False, h, kernel, bias, targets)[:2]


def _fused_forward(
    config: ChunkLoss,
    layout: _Layout,
    h: Array,
    kernel: Array,
    bias: Array,
    targets: Targets,
) -> Any:
    loss, terms, grads = _on_mesh(config, layout, True, h, kernel, bias, targets)
    assert grads is not None
    dtypes = (h.dtype, kernel.dtype, bias.dtype)
    return (loss, terms), tuple(g.astype(d) for g, d in zip(grads, dtypes, strict=True))


def _fused_backward(config: ChunkLoss, layout: _Layout, grads: Any, cotangents: Any) -> Any:
    del config, layout
    scale = cotangents[0]  # the terms are for reports: no gradient flows through them
    return (*((scale * g).astype(g.dtype) for g in grads), None)


_fused.defvjp(_fused_forward, _fused_backward)


def chunk_size(columns: int, features: int, backend: str) -> int:
    """Return how many tokens' logits are held at a time, for a projection of features to columns.

    Each chunk moves the projection's weights and their gradient, 12 D bytes per column, beside
    6 n D operations and some 22 n bytes of its own: at 200 operations in the time of a byte, as
    accelerators have, 4 D tokens keep that near 5 %. On CPU 512 tokens do, as measured.
    """
    tokens = 512
    if backend != "cpu":
        tokens = min(max(1 << (4 * features - 1).bit_length(), 4096), 8192)
    least = LEAST_LOGITS.get(backend, LEAST_LOGITS["gpu"])
    return min(max(tokens, least // columns), MOST_LOGITS // columns)


def fused_loss(
    process: InterpolatingProcess | None,
    h: Array,
    kernel: Array,
    bias: Array | None,
    x: Array,
    z_t: Array,
    t: Array,
    coefficient: Array,
    *,
    cross_entropy: bool,
    vocab_size: int,
    keep_padding_columns: bool = False,
    batch_axes: tuple[str, ...] = (),
    vocab_axis: str | None = None,
    tokens_per_chunk: int | None = None,
    by_rows: bool | None = None,
) -> tuple[Array, Terms]:
    """Return sum(coefficient * (kl + is_div)), differentiable by h, kernel and bias, and its terms.

    h [B, L, D] features, kernel [D, C], bias [C] or None; x, z_t int32 and coefficient float32
    [B, L]; t [B] or [B, L]. With `cross_entropy` the term is -log x_hat_x (MDLM, autoregressive),
    otherwise KL and IS of the process. Axes of the current mesh over which batch and columns are
    split may be named; the sums over them are made here. by_rows: whether a kernel goes through
    each chunk's logits row by row (`loss_by_rows`); None: where that suits.
    """
    backend = jax.default_backend()
    mesh = jax.sharding.get_abstract_mesh()
    batch_axes = tuple(a for a in batch_axes if mesh.shape.get(a, 1) > 1)
    split = mesh.shape.get(vocab_axis, 1) if vocab_axis else 1
    if split == 1 or kernel.shape[1] % split:
        vocab_axis, split = None, 1
    zeros = jnp.zeros(x.shape, jnp.float32)
    if cross_entropy or process is None:
        targets = Targets(x, z_t, coefficient, zeros, zeros, zeros, zeros)
    else:
        time = expand_time(t, x)
        mass = process.beta_pi(time)
        targets = Targets(
            x,
            z_t,
            coefficient,
            alpha=zeros + process.alpha(time),
            uniform=zeros + mass.uniform,
            at_x=zeros + process.mass_at(mass, x),
            at_z=zeros + process.mass_at(mass, z_t),
        )
    wanted = suits(kernel.shape[1]) if by_rows is None else by_rows
    # A kernel cannot sum over devices, and runs on each of several only where the batch is split.
    goes_by_rows = wanted and split == 1 and (mesh.size <= 1 or batch_axes != ())
    vocabulary = Vocabulary(vocab_axis, major=backend == "cpu" and not goes_by_rows)
    # What is annealed has traced numbers, and they are all in the targets.
    tokens = None if process is None else process.settled()
    config = ChunkLoss(tokens, cross_entropy, vocab_size, keep_padding_columns, vocabulary)
    if bias is None:
        bias = jnp.zeros(kernel.shape[1], jnp.float32)
    size = tokens_per_chunk or chunk_size(kernel.shape[1] // split, kernel.shape[0], backend)
    layout = _Layout(batch_axes, vocab_axis, size, goes_by_rows)
    return _fused(config, layout, h, kernel, bias, targets)
