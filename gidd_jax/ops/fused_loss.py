"""Output projection and loss in one: never more logits in memory than those of a chunk of tokens.

The forward pass computes the loss and its gradients together, chunk by chunk: logits once, their
softmax, the few sums over the vocabulary that the closed forms of `loss.py` need, the gradient by
the logits, and its two products. The backward pass only scales by the cotangent. Three matrix
products, as many as any version needs.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gidd_jax.loss import itakura_saito, positive
from gidd_jax.process import InterpolatingProcess, expand_time

Array = jax.Array

# Logits of one chunk: few enough to stay near the processor, enough to keep its matrix units busy.
CHUNK_LOGITS = {"cpu": 1 << 20, "gpu": 1 << 28, "tpu": 1 << 27}
SUM_BLOCK = 64
MIN_CHUNK = 256  # tokens: below, reading the projection's weights again for each chunk shows


class Targets(NamedTuple):
    """What the loss of a token depends on besides its logits, each [N].

    coefficient: the factor of the token's loss in the sum that is trained on (0 leaves it out);
    alpha, uniform (noise mass of a token), at_x, at_z (noise mass of x and of z) are unused by
    the cross-entropy.
    """

    x: Array
    z: Array
    coefficient: Array
    alpha: Array
    uniform: Array
    at_x: Array
    at_z: Array


class Terms(NamedTuple):
    """Per-token divergences, float32 [N]: KL and IS, or the cross-entropy in `kl`."""

    kl: Array
    is_div: Array


@dataclasses.dataclass(frozen=True)
class FusedLoss:
    """The loss of a process (None: cross-entropy) on the features of the output projection.

    vocab_size columns are tokens; others only pad the projection. vocab_axis: mesh axis over which
    the columns are split, None if they are not.
    """

    process: InterpolatingProcess | None
    cross_entropy: bool
    vocab_size: int
    keep_padding_columns: bool
    vocab_axis: str | None
    backend: str

    @property
    def v_axis(self) -> int:
        """Vocabulary on the major axis of the logits on CPU, where such reductions are faster."""
        return 0 if self.backend == "cpu" else 1

    def tokens(self, a: Array) -> Array:
        return jnp.expand_dims(a, self.v_axis)

    def columns(self, a: Array) -> Array:
        return jnp.expand_dims(a, 1 - self.v_axis)

    def sum(self, a: Array) -> Array:
        """Sum over the vocabulary, [n]."""
        if self.v_axis == 1:
            return self.total(jnp.sum(a, axis=1))
        # On CPU this is one long sequential sum per token, too inexact in float32: sum blocks, then
        # their sums. The barrier keeps the compiler from making one sum of them again.
        block = math.gcd(a.shape[0], SUM_BLOCK)
        partial = jnp.sum(a.reshape(-1, block, a.shape[1]), axis=1)
        return self.total(jnp.sum(jax.lax.optimization_barrier(partial), axis=0))

    def total(self, a: Array) -> Array:
        return a if self.vocab_axis is None else jax.lax.psum(a, self.vocab_axis)

    def column_ids(self, width: int) -> Array:
        ids = jnp.arange(width)
        return ids if self.vocab_axis is None else ids + width * jax.lax.axis_index(self.vocab_axis)

    def excluded(self, ids: Array) -> Array:
        excluded = (
            jnp.zeros(ids.shape, bool) if self.process is None else (ids == self.process.mask_id)
        )
        return excluded if self.keep_padding_columns else excluded | (ids >= self.vocab_size)

    def softmax(self, h: Array, kernel: Array, bias: Array, ids: Array) -> tuple[Array, Array]:
        """Return x_hat of a chunk and log of it at the largest logit's shift, [V, n] or [n, V]."""
        left, right = (kernel, h) if self.v_axis == 0 else (h, kernel)
        dims = ((0,), (1,)) if self.v_axis == 0 else ((1,), (0,))
        logits = jax.lax.dot_general(
            left, right, (dims, ((), ())), preferred_element_type=jnp.float32
        )
        logits = logits + self.columns(bias)
        logits = jnp.where(self.columns(self.excluded(ids)), -jnp.inf, logits)
        largest = jnp.max(logits, axis=self.v_axis)
        if self.vocab_axis is not None:
            largest = jax.lax.pmax(largest, self.vocab_axis)
        shifted = logits - self.tokens(largest)
        unnormalised = jnp.exp(shifted)
        total = self.sum(unnormalised)
        return unnormalised / self.tokens(total), shifted - self.tokens(jnp.log(total))

    def chunk(
        self, h: Array, kernel: Array, bias: Array, targets: Targets, with_gradient: bool
    ) -> tuple[Terms, Array | None]:
        """Return the terms of a chunk, and the gradient of the summed loss by its logits."""
        ids = self.column_ids(kernel.shape[1])
        x_hat, log_x_hat = self.softmax(h, kernel, bias, ids)
        is_x = self.columns(ids) == self.tokens(targets.x)
        log_at_x = self.sum(jnp.where(is_x, log_x_hat, 0.0))
        if self.cross_entropy:
            # The masked-only bound has KL = -alpha log x_hat_x on masks; alpha is in coefficient.
            dl = None
            if with_gradient:
                dl = self.tokens(targets.coefficient) * (x_hat - is_x)
            return Terms(-log_at_x, jnp.zeros_like(log_at_x)), dl
        return self._gidd(x_hat, log_at_x, is_x, ids, targets, with_gradient)

    def _gidd(
        self,
        x_hat: Array,
        log_at_x: Array,
        is_x: Array,
        ids: Array,
        targets: Targets,
        with_gradient: bool,
    ) -> tuple[Terms, Array | None]:
        # The formulas of loss.gidd_divergences, and their derivatives by x_hat.
        process = self.process
        assert process is not None
        x, z, coefficient, alpha, uniform, at_x, at_z = targets
        ratio = self.columns(jnp.where(ids < self.vocab_size, self._ratio(ids), 0.0))
        mass = self.tokens(uniform) * ratio
        safe = positive(mass)
        signal = self.tokens(alpha) * x_hat
        noisy = (mass > 0) & ~is_x
        others = self.sum(jnp.where(noisy, mass * jnp.log1p(signal / safe), 0.0))

        rest = self.sum(jnp.where(is_x, 0.0, x_hat))
        near = rest < 0.5
        q_x = alpha + at_x
        ratio_near = -jnp.log1p(-alpha / q_x * jnp.where(near, rest, 0.0))
        log_q_hat_x = jnp.logaddexp(jnp.log(alpha) + log_at_x, _log(at_x))
        log_ratio_x = jnp.where(near, ratio_near, jnp.log(q_x) - log_q_hat_x)
        kl = q_x * log_ratio_x - others

        is_z = self.columns(ids) == self.tokens(z)
        x_hat_z = self.sum(jnp.where(is_z, x_hat, 0.0))
        ratio_z = -jnp.log1p(alpha * x_hat_z / positive(at_z))
        scored = (z != process.mask_id) & (at_z > 0)
        log_ratio_z = jnp.where(scored, jnp.where(z == x, log_ratio_x, ratio_z), 0.0)
        is_div = itakura_saito(log_ratio_z)
        if not with_gradient:
            return Terms(kl, is_div), None

        # x_hat_v dKL/dx_hat_v, x_hat_z dIS/dx_hat_z; what is left of the softmax is their sum.
        g = jnp.where(noisy, -signal * safe / (safe + signal), 0.0)
        x_hat_x = jnp.exp(log_at_x)
        g_x = -q_x * alpha * x_hat_x / (alpha * x_hat_x + at_x)
        g_z = alpha * x_hat_z / (alpha * x_hat_z + positive(at_z)) * -jnp.expm1(log_ratio_z)
        total = self.sum(g) + g_x + g_z
        dl = g + jnp.where(is_x, self.tokens(g_x), 0.0) + jnp.where(is_z, self.tokens(g_z), 0.0)
        dl = self.tokens(coefficient) * (dl - x_hat * self.tokens(total))
        return Terms(kl, is_div), dl

    def _ratio(self, ids: Array) -> Array | float:
        assert self.process is not None
        if self.process.background is None:
            return 1.0
        last = self.vocab_size - 1
        return self.process.background_ratio(jnp.minimum(ids, last))


def _log(mass: Array) -> Array:
    return jnp.where(mass > 0, jnp.log(positive(mass)), -jnp.inf)


def pairwise_sum(values: Array) -> Array:
    """Sum a vector in pairs: a single loss of thousands of nats swallows no digits of others."""
    while values.shape[0] > 1:
        values = jnp.pad(values, (0, values.shape[0] % 2))
        values = values[0::2] + values[1::2]
    return values[0]


def _run(
    config: FusedLoss,
    chunk_size: int,
    with_gradient: bool,
    h: Array,
    kernel: Array,
    bias: Array,
    targets: Targets,
) -> tuple[Array, Terms, tuple[Array, Array, Array] | None]:
    """Loop over the chunks of h [N, D]; the sums over other devices are left to the caller."""
    count, width = h.shape
    chunks = -(-count // chunk_size)
    size = -(-count // chunks)
    low_kernel = kernel.astype(h.dtype)

    # The last chunk is filled up with copies of the last token, with coefficient 0.
    row = jnp.minimum(jnp.arange(chunks * size), count - 1)
    counts = jnp.arange(chunks * size) < count

    def split(a: Array) -> Array:
        return a[row].reshape(chunks, size, *a.shape[1:])

    def step(carry: Any, part: tuple[Array, Targets]) -> tuple[Any, Any]:
        h, targets = part
        terms, dl = config.chunk(h, low_kernel, bias, targets, with_gradient)
        losses = targets.coefficient * (terms.kl + terms.is_div)
        if dl is None:
            return carry, (losses, terms, None)
        low = dl.astype(h.dtype)
        product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        v, n = config.v_axis, 1 - config.v_axis
        dh = product(low, low_kernel, (((v,), (1,)), ((), ())))
        d_kernel = carry[0] + product(h, low, (((0,), (n,)), ((), ())))
        return (d_kernel, carry[1] + jnp.sum(dl, axis=n)), (losses, terms, dh)

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


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Mesh axes over which the rows of the batch and the columns of the logits are split."""

    batch_axes: tuple[str, ...]
    vocab_axis: str | None


def _on_mesh(
    config: FusedLoss,
    layout: _Layout,
    chunk_size: int,
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
        loss, terms, grads = _run(config, chunk_size, with_gradient, flat_h, kernel, bias, flat)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(
    config: FusedLoss,
    layout: _Layout,
    chunk_size: int,
    h: Array,
    kernel: Array,
    bias: Array,
    targets: Targets,
) -> tuple[Array, Terms]:
    return _on_mesh(config, layout, chunk_size, False, h, kernel, bias, targets)[:2]


def _fused_forward(
    config: FusedLoss,
    layout: _Layout,
    chunk_size: int,
    h: Array,
    kernel: Array,
    bias: Array,
    targets: Targets,
) -> Any:
    loss, terms, grads = _on_mesh(config, layout, chunk_size, True, h, kernel, bias, targets)
    assert grads is not None
    dtypes = (h.dtype, kernel.dtype, bias.dtype)
    return (loss, terms), tuple(g.astype(d) for g, d in zip(grads, dtypes, strict=True))


def _fused_backward(
    config: FusedLoss, layout: _Layout, chunk_size: int, grads: Any, cotangents: Any
) -> Any:
    del config, layout, chunk_size
    scale = cotangents[0]  # the terms are for reports: no gradient flows through them
    return (*((scale * g).astype(g.dtype) for g in grads), None)


_fused.defvjp(_fused_forward, _fused_backward)


def chunk_size(width: int, backend: str) -> int:
    """Return how many tokens' logits of `width` columns are held at a time."""
    return max(MIN_CHUNK, CHUNK_LOGITS.get(backend, CHUNK_LOGITS["gpu"]) // width)


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
) -> tuple[Array, Terms]:
    """Return sum(coefficient * (kl + is_div)), differentiable by h, kernel and bias, and its terms.

    h [B, L, D] features, kernel [D, C], bias [C] or None; x, z_t int32 and coefficient float32
    [B, L]; t [B]. With `cross_entropy` the term is -log x_hat_x (MDLM, autoregressive), otherwise
    KL and IS of the process. Axes of the current mesh over which batch and columns are split may
    be named; the sums over them are made here.
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
    config = FusedLoss(
        process, cross_entropy, vocab_size, keep_padding_columns, vocab_axis, backend
    )
    if bias is None:
        bias = jnp.zeros(kernel.shape[1], jnp.float32)
    size = tokens_per_chunk or chunk_size(kernel.shape[1] // split, backend)
    return _fused(config, _Layout(batch_axes, vocab_axis), size, h, kernel, bias, targets)
