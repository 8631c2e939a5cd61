"""Output projection and loss in one: never more logits in memory than those of a chunk of tokens.

The forward pass computes the loss and its gradients together, chunk by chunk: logits once, their
softmax, the few sums over the vocabulary that the closed forms of `loss.py` need, the gradient by
the logits, and its two products. The backward pass only scales by the cotangent. Three matrix
products, as many as any version needs.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gidd_jax.loss import itakura_saito, positive
from gidd_jax.ops.vocabulary import Vocabulary
from gidd_jax.process import InterpolatingProcess, expand_time

Array = jax.Array

# Logits of a chunk: at least as many as keep the processor busy, at most 2 GiB of float32.
LEAST_LOGITS = {"cpu": 1 << 20, "gpu": 1 << 27, "tpu": 1 << 27}
MOST_LOGITS = 1 << 29


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


class Softmax(NamedTuple):
    """x_hat of a chunk: e / total but for x, where e [V, n] or [n, V] is 0.

    rest: 1 - x_hat_x; log_at_x: log x_hat_x, each [n].
    """

    e: Array
    is_x: Array
    total: Array
    rest: Array
    log_at_x: Array


@dataclasses.dataclass(frozen=True)
class FusedLoss:
    """The loss of a process (None: cross-entropy) on the features of the output projection.

    vocab_size columns are tokens; others only pad the projection.
    """

    process: InterpolatingProcess | None
    cross_entropy: bool
    vocab_size: int
    keep_padding_columns: bool
    vocabulary: Vocabulary

    def offset(self, bias: Array, ids: Array) -> Array:
        """Return what is added to the products of features and columns: -inf leaves them out."""
        excluded = jnp.zeros(ids.shape, bool)
        if self.process is not None:
            excluded = ids == self.process.mask_id
        if not self.keep_padding_columns:
            excluded |= ids >= self.vocab_size
        return jnp.where(excluded, -jnp.inf, bias)

    def softmax(
        self, h: Array, kernel: Array, bias: Array, ids: Array, targets: Targets
    ) -> Softmax:
        v = self.vocabulary
        products, offset = v.logits(h, kernel), self.offset(bias, ids)
        largest = v.largest(lambda a, offset: (a + offset,), products, offset)
        logits = products + v.columns(offset)
        at_x = v.pick(logits, targets.x) - largest
        is_x = v.columns(ids) == v.tokens(targets.x)
        e = jnp.where(is_x, 0.0, jnp.exp(logits - v.tokens(largest)))
        rest = v.sum(e)
        total = rest + jnp.exp(at_x)
        return Softmax(e, is_x, total, rest / total, at_x - jnp.log(total))

    def chunk(
        self, h: Array, kernel: Array, bias: Array, targets: Targets, with_gradient: bool
    ) -> tuple[Terms, Array | None]:
        """Return the terms of a chunk, and the gradient of the summed loss by its logits."""
        ids, v = self.vocabulary.ids(kernel.shape[1]), self.vocabulary
        softmax = self.softmax(h, kernel, bias, ids, targets)
        if not self.cross_entropy:
            return self._gidd(softmax, ids, targets, with_gradient)
        # The masked-only bound has KL = -alpha log x_hat_x on masks; alpha is in coefficient.
        terms = Terms(-softmax.log_at_x, jnp.zeros_like(softmax.log_at_x))
        if not with_gradient:
            return terms, None
        others = v.tokens(targets.coefficient / softmax.total) * softmax.e
        at_x = v.tokens(-targets.coefficient * softmax.rest)
        return terms, jnp.where(softmax.is_x, at_x, others)

    def _gidd(
        self, softmax: Softmax, ids: Array, targets: Targets, with_gradient: bool
    ) -> tuple[Terms, Array | None]:
        # The formulas of loss.gidd_divergences, and their derivatives by x_hat.
        process, v = self.process, self.vocabulary
        assert process is not None
        e, is_x, total, rest, log_at_x = softmax
        x, z, coefficient, alpha, uniform, at_x, at_z = targets

        def others(e: Array, ratio: Array) -> tuple[Array, Array]:
            # Of each v but x, the term of the KL and x_hat_v dKL/dx_hat_v.
            mass = v.tokens(uniform) * ratio
            safe = positive(mass)
            signal = v.tokens(alpha / total) * e
            kl = jnp.where(mass > 0, mass * jnp.log1p(signal / safe), 0.0)
            return kl, jnp.where(mass > 0, -signal * safe / (safe + signal), 0.0)

        ratio = jnp.where(ids < self.vocab_size, self._ratio(ids), 0.0)
        kl_others, g_others = v.sums(others, e, ratio)

        near = rest < 0.5
        q_x = alpha + at_x
        ratio_near = -jnp.log1p(-alpha / q_x * jnp.where(near, rest, 0.0))
        log_q_hat_x = jnp.logaddexp(jnp.log(alpha) + log_at_x, _log(at_x))
        log_ratio_x = jnp.where(near, ratio_near, jnp.log(q_x) - log_q_hat_x)
        kl = q_x * log_ratio_x - kl_others

        x_hat_x = jnp.exp(log_at_x)
        signal_z = alpha * jnp.where(z == x, x_hat_x, v.pick(e, z) / total)
        ratio_z = -jnp.log1p(signal_z / positive(at_z))
        scored = (z != process.mask_id) & (at_z > 0)
        log_ratio_z = jnp.where(scored, jnp.where(z == x, log_ratio_x, ratio_z), 0.0)
        is_div = itakura_saito(log_ratio_z)
        if not with_gradient:
            return Terms(kl, is_div), None

        # At x and at z; what is left of the softmax is the sum of all.
        g_x = -q_x * alpha * x_hat_x / (alpha * x_hat_x + at_x)
        g_z = signal_z / (signal_z + positive(at_z)) * -jnp.expm1(log_ratio_z)
        g_all = g_others + g_x + g_z
        dl = others(e, v.columns(ratio))[1] - v.tokens(g_all / total) * e
        dl = jnp.where(is_x, v.tokens(g_x - x_hat_x * g_all), dl)
        dl = dl + jnp.where(v.columns(ids) == v.tokens(z), v.tokens(g_z), 0.0)
        return Terms(kl, is_div), v.tokens(coefficient) * dl

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
        v = config.vocabulary
        dh = v.gradient_h(low, low_kernel)
        d_kernel = v.add_gradient_kernel(carry[0], h, low)
        return (d_kernel, carry[1] + jnp.sum(dl, axis=1 - v.axis)), (losses, terms, dh)

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
    vocabulary = Vocabulary(vocab_axis, major=backend == "cpu")
    config = FusedLoss(process, cross_entropy, vocab_size, keep_padding_columns, vocabulary)
    if bias is None:
        bias = jnp.zeros(kernel.shape[1], jnp.float32)
    size = tokens_per_chunk or chunk_size(kernel.shape[1] // split, kernel.shape[0], backend)
    return _fused(config, _Layout(batch_axes, vocab_axis), size, h, kernel, bias, targets)
