"""The loss of a chunk of tokens and its gradient, from the chunk's logits.

The formulas of `loss.py`, with the few sums over the vocabulary that they need, written so that
they hold for logits of any layout (`vocabulary.py`), in the compiler's hands and inside a kernel.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax.loss import expm1, itakura_saito, positive
from gidd_jax.ops.vocabulary import Vocabulary
from gidd_jax.process import InterpolatingProcess

Array = jax.Array


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


class Columns(NamedTuple):
    """What the loss depends on by column of the logits, each [V].

    offset: what is added to the products; ratio: the noise mass over that of `Targets.uniform`.
    """

    ids: Array
    offset: Array
    ratio: Array


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
class ChunkLoss:
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

    def softmax(self, products: Array, columns: Columns, targets: Targets) -> Softmax:
        v = self.vocabulary
        largest = v.largest(lambda a, offset: (a + offset,), products, columns.offset)
        logits = products + v.columns(columns.offset)
        at_x = v.pick(logits, targets.x) - largest
        is_x = v.columns(columns.ids) == v.tokens(targets.x)
        e = jnp.where(is_x, 0.0, jnp.exp(logits - v.tokens(largest)))
        rest = v.sum(e)
        total = rest + jnp.exp(at_x)
        return Softmax(e, is_x, total, rest / total, at_x - jnp.log(total))

    def columns(self, bias: Array) -> Columns:
        """Return what the loss depends on by column, of this device's columns with bias [V]."""
        ids = self.vocabulary.ids(bias.shape[0])
        ratio = jnp.zeros(ids.shape, jnp.float32)
        if not self.cross_entropy:
            ratio = jnp.where(ids < self.vocab_size, self._ratio(ids), ratio)
        return Columns(ids, self.offset(bias, ids), ratio)

    def terms(
        self, products: Array, columns: Columns, targets: Targets, with_gradient: bool
    ) -> tuple[Terms, Array | None]:
        """Return the terms of tokens, and the gradient of the summed loss by their logits."""
        v, softmax = self.vocabulary, self.softmax(products, columns, targets)
        if not self.cross_entropy:
            return self._gidd(softmax, columns, targets, with_gradient)
        # The masked-only bound has KL = -alpha log x_hat_x on masks; alpha is in coefficient.
        terms = Terms(-softmax.log_at_x, jnp.zeros_like(softmax.log_at_x))
        if not with_gradient:
            return terms, None
        others = v.tokens(targets.coefficient / softmax.total) * softmax.e
        at_x = v.tokens(-targets.coefficient * softmax.rest)
        return terms, jnp.where(softmax.is_x, at_x, others)

    def _gidd(
        self, softmax: Softmax, columns: Columns, targets: Targets, with_gradient: bool
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

        kl_others, g_others = v.sums(others, e, columns.ratio)

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
        g_z = signal_z / (signal_z + positive(at_z)) * -expm1(log_ratio_z)
        g_all = g_others + g_x + g_z
        dl = others(e, v.columns(columns.ratio))[1] - v.tokens(g_all / total) * e
        dl = jnp.where(is_x, v.tokens(g_x - x_hat_x * g_all), dl)
        dl = dl + jnp.where(v.columns(columns.ids) == v.tokens(z), v.tokens(g_z), 0.0)
        return Terms(kl, is_div), v.tokens(coefficient) * dl

    def _ratio(self, ids: Array) -> Array | float:
        assert self.process is not None
        if self.process.background is None:
            return 1.0
        last = self.vocab_size - 1
        return self.process.background_ratio(jnp.minimum(ids, last))


def _log(mass: Array) -> Array:
    return jnp.where(mass > 0, jnp.log(positive(mass)), -jnp.inf)
