"""How noise in training departs from one time a row on every token: times of positions, givens.

Each option is a share of the rows; none by default. The evaluation knows nothing of them: its bound
is that of the process.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax.process import InterpolatingProcess
from gidd_jax.training.givens import draw_givens


class Noised(NamedTuple):
    """Noisy tokens z_t int32 [B, L] and their times t, float32 [B] or [B, L]; bool [B, L] where a
    token is given instead, clean and without loss (None: nowhere); lengths int32 [B] of rows that
    end early, further tokens are neither seen nor counted (None: none does)."""

    z_t: jax.Array
    t: jax.Array
    given: jax.Array | None = None
    lengths: jax.Array | None = None

    @property
    def within(self) -> jax.Array | None:
        """Which positions belong to a row that ends early, bool [B, L]; None: all."""
        if self.lengths is None:
            return None
        return jnp.arange(self.z_t.shape[1])[None] < self.lengths[:, None]

    @property
    def left_out(self) -> jax.Array | None:
        """Which positions have no loss, given or beyond the row, bool [B, L]; None: none."""
        if self.within is None:
            return self.given
        return ~self.within if self.given is None else self.given | ~self.within

    @property
    def times(self) -> jax.Array:
        """The times of positions, [B] or [B, L], and [B, L] with 0 where some are given."""
        if self.given is None:
            return self.t
        return jnp.where(self.given, 0.0, self.t if self.t.ndim == 2 else self.t[:, None])


@dataclasses.dataclass(frozen=True)
class Noising:
    """Shares of the rows with times by position, ascending times, given tokens of a kind.

    block_length: each block of so many tokens has its own time; 0: rows have one. short_rows: share
    of the rows that end early, after any number of tokens alike.

    whole_vocabulary: noise that is not the mask is drawn from all ids, the mask among them, as in
    the scaling paper's code; the process has it from the others.
    """

    by_position: float = 0.0
    ascending: float = 0.0
    givens: float = 0.0
    givens_kind: str = "mixed"
    short_rows: float = 0.0
    whole_vocabulary: bool = False
    block_length: int = 0

    def times(self, process: InterpolatingProcess, key: jax.Array, rows: jax.Array, length: int):
        """Return the times of positions, [B, length], of rows at times [B]; [B] if no share is."""
        if self.block_length:
            rows = block_times(process, rows, length, self.block_length)
        if self.by_position == self.ascending == 0:
            return rows
        time_key, choice_key = jax.random.split(key)
        u = jax.random.uniform(time_key, (len(rows), length))
        choice = jax.random.uniform(choice_key, rows.shape[:1])
        return position_times(process, rows, u, choice, self.by_position, self.ascending)

    def noisy(
        self, process: InterpolatingProcess, key: jax.Array, x: jax.Array, t: jax.Array
    ) -> jax.Array:
        """Draw z_t, ids of the shape of x [B, L], at times [B] or [B, L]."""
        if not self.whole_vocabulary:
            return process.sample(key, x, t)
        ids = jax.random.randint(jax.random.fold_in(key, 1), x.shape, 0, process.vocab_size)
        return process.corrupt(x, t, process.noise_draws(key, x.shape)._replace(ids=ids))

    def lengths(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
        """Return after how many tokens each row of a batch [B, L] ends, int32 [B]; None: none."""
        if self.short_rows == 0:
            return None
        choice_key, length_key = jax.random.split(key)
        drawn = jax.random.randint(length_key, shape[:1], 1, shape[1] + 1)
        is_short = jax.random.uniform(choice_key, shape[:1]) < self.short_rows
        return jnp.where(is_short, drawn, shape[1])

    def given(
        self, key: jax.Array, mask: jax.Array | None, marked: jax.Array | None
    ) -> jax.Array | None:
        """Return which positions are given, bool [B, L], some of the mask and the marked ones."""
        if mask is None or self.givens == 0:
            return marked
        return draw_givens(key, mask, self.givens, marked, self.givens_kind)


PLAIN = Noising()  # one time a row, nothing given but what rows mark


def position_times(
    process: InterpolatingProcess,
    rows: jax.Array,
    u: jax.Array,
    choice: jax.Array,
    by_position: float,
    ascending: float = 0.0,
) -> jax.Array:
    """Return times [B, L] of positions: their own in some rows, ascending in some, else the row's.

    rows [B] the times of rows, or [B, L] of their blocks; u [B, L] and choice [B] uniforms in
    [0, 1): the position's own time, and which rows are which.
    """
    own = process.t_min + (process.t_max - process.t_min) * u
    length = u.shape[-1]
    ramp = jnp.arange(1, length + 1, dtype=u.dtype)[None] / (length + 1)
    ramp = jnp.clip(ramp, process.t_min, process.t_max)
    choice = choice[:, None]
    rows = rows[:, None] if rows.ndim == 1 else rows
    rest = jnp.where(choice < by_position + ascending, ramp, rows)
    return jnp.where(choice < by_position, own, rest)


def block_times(
    process: InterpolatingProcess, rows: jax.Array, length: int, block_length: int
) -> jax.Array:
    """Return times [B, length], one a block: a row's blocks are spread evenly over all times.

    rows [B]: the time of the first block, of which the others follow, so that each has the
    distribution of a row's.
    """
    count = -(-length // block_length)
    span = process.t_max - process.t_min
    shifts = jnp.arange(count) / count
    u = ((rows[:, None] - process.t_min) / span + shifts[None]) % 1.0
    return jnp.repeat(process.t_min + span * u, block_length, axis=1)[:, :length]
