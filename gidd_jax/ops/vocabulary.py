"""Where the vocabulary lies in a chunk of logits: on which axis, and on which devices.

On CPU the logits are [V, n], where sums over the vocabulary are faster, elsewhere [n, V]. On CPU
XLA joins neither a sum nor a product with what is computed before or after it: there both go by
blocks of columns, small enough to stay in the cache, so that no array of that size is written.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

BLOCKS = 64
Terms = Callable[[Array, Array], tuple[Array, ...]]  # of logits and what meets them
product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Layout of the logits [V, n] or [n, V] of n tokens; `mesh_axis`: that splits V, or None."""

    mesh_axis: str | None
    major: bool

    @property
    def axis(self) -> int:
        return 0 if self.major else 1

    def tokens(self, a: Array) -> Array:
        """Return values of tokens [n] as they meet the logits."""
        return jnp.expand_dims(a, self.axis)

    def columns(self, a: Array) -> Array:
        """Return values of columns [V] as they meet the logits."""
        return jnp.expand_dims(a, 1 - self.axis)

    def ids(self, width: int) -> Array:
        """Return the token ids of the `width` columns of this device."""
        ids = jnp.arange(width)
        return ids if self.mesh_axis is None else ids + width * jax.lax.axis_index(self.mesh_axis)

    def total(self, a: Array) -> Array:
        """Sum over the devices that share the columns."""
        return a if self.mesh_axis is None else jax.lax.psum(a, self.mesh_axis)

    def pick(self, a: Array, ids: Array) -> Array:
        """Return each token's value at its id, [n], on whichever device it lies."""
        width = a.shape[self.axis]
        if self.mesh_axis is not None:
            ids = ids - width * jax.lax.axis_index(self.mesh_axis)
        here = jnp.clip(ids, 0, width - 1)
        picked = jnp.squeeze(jnp.take_along_axis(a, self.tokens(here), self.axis), self.axis)
        return self.total(jnp.where(here == ids, picked, 0.0))

    def sum(self, a: Array) -> Array:
        """Sum over the vocabulary, [n]."""
        if not self.major:
            return self.total(jnp.sum(a, axis=1))
        # This is one long sequential sum per token, too inexact in float32: sum blocks, then their
        # sums. The barrier keeps the compiler from making one sum of them again.
        block = math.gcd(a.shape[0], BLOCKS)
        partial = jnp.sum(a.reshape(-1, block, a.shape[1]), axis=1)
        return self.total(jnp.sum(jax.lax.optimization_barrier(partial), axis=0))

    def sums(self, terms: Terms, a: Array, of_columns: Array) -> tuple[Array, ...]:
        """Sum over the vocabulary, [n], each of the terms of a and of values of columns [V]."""
        return tuple(map(self.sum, self._by_blocks(jnp.add, 0.0, terms, a, of_columns)))

    def largest(self, term: Terms, a: Array, of_columns: Array) -> Array:
        """Return the largest over the vocabulary, [n], of the only term."""
        (rows,) = self._by_blocks(jnp.maximum, -jnp.inf, term, a, of_columns)
        largest = jnp.max(rows, axis=self.axis)
        return largest if self.mesh_axis is None else jax.lax.pmax(largest, self.mesh_axis)

    def _by_blocks(
        self,
        join: Callable[[Array, Array], Array],
        start: float,
        terms: Terms,
        a: Array,
        of_columns: Array,
    ) -> tuple[Array, ...]:
        if not self.major:
            return terms(a, self.columns(of_columns))
        count = math.gcd(a.shape[0], BLOCKS)
        a = a.reshape(count, -1, a.shape[1])
        of_columns = of_columns.reshape(count, -1, 1)

        def add(i: Array, so_far: tuple[Array, ...]) -> tuple[Array, ...]:
            return jax.tree.map(join, so_far, terms(a[i], of_columns[i]))

        shapes = jax.eval_shape(lambda: terms(a[0], of_columns[0]))
        first = jax.tree.map(lambda s: jnp.full(s.shape, start, s.dtype), shapes)
        return jax.lax.fori_loop(0, count, add, first)

    def logits(self, h: Array, kernel: Array) -> Array:
        """Return h kernel for h [n, D] and kernel [D, V]."""
        if self.major:
            return product(kernel, h, (((0,), (1,)), ((), ())))
        return product(h, kernel, (((1,), (0,)), ((), ())))

    def gradient_h(self, dl: Array, kernel: Array) -> Array:
        """Return dl kernel^T [n, D] for dl, the gradient by the logits."""
        return product(dl, kernel, (((self.axis,), (1,)), ((), ())))

    def add_gradient_kernel(self, so_far: Array, h: Array, dl: Array) -> Array:
        """Return so_far + h^T dl, [D, V]."""
        dims = (((0,), (1 - self.axis,)), ((), ()))
        if not self.major:
            return so_far + product(h, dl, dims)
        count = math.gcd(dl.shape[0], BLOCKS)
        width = dl.shape[0] // count

        def add(i: Array, so_far: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(dl, i * width, width, axis=0)
            old = jax.lax.dynamic_slice_in_dim(so_far, i * width, width, axis=1)
            new = old + product(h, part, dims)
            return jax.lax.dynamic_update_slice_in_dim(so_far, new, i * width, axis=1)

        return jax.lax.fori_loop(0, count, add, so_far)


class OnChip(Vocabulary):
    """The vocabulary of a block of rows inside a kernel, where all arrays have two axes.

    Values of tokens are [n, 1], those of columns [1, V]. A value at an id is a sum, for a TPU's
    kernel cannot gather.
    """

    def tokens(self, a: Array) -> Array:
        return a

    def columns(self, a: Array) -> Array:
        return a

    def pick(self, a: Array, ids: Array) -> Array:
        here = jax.lax.broadcasted_iota(jnp.int32, a.shape, 1) == ids
        return self.sum(jnp.where(here, a, 0.0))

    def sum(self, a: Array) -> Array:
        return jnp.sum(a, axis=1, keepdims=True)

    def largest(self, term: Terms, a: Array, of_columns: Array) -> Array:
        return jnp.max(term(a, of_columns)[0], axis=1, keepdims=True)
