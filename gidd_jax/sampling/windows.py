"""Blocks from left to right without computing what lies before them again.

A network whose finished tokens see only each other (`models.gidd`) has their keys and values once
and for all: they are kept while a block is denoised, and every call computes the tokens from the
block on. The samples are those of whole rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gidd_jax.errors import InputError
from gidd_jax.models.gidd import Cache, TimeFreeTransformer, blocks_of
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.sampling.schedule import Schedule
from gidd_jax.sampling.thinning import at, put


class View(NamedTuple):
    """Where windows are: the cache of what lies before `start` int32 [B]; they reach to `end` int32
    [B] (None: as far as they do)."""

    cache: Cache
    start: jax.Array
    end: jax.Array | None = None


class Place(NamedTuple):
    """Which call it is: of the rows' tokens to generate, bool [B, L], all, those of its blocks and
    those still to come; its entry of the schedule."""

    free: jax.Array
    active: jax.Array
    ahead: jax.Array
    now: Schedule


class Windows(NamedTuple):
    """A network by windows of rows of ids int32 [B, L].

    open: (cache, ids, start, whether it is the first) -> the cache of what lies before start; the
    first cache may be None, or have its shapes alone; features: (view, noisy ids) -> what the
    projection reads, [B, L, D], 0 outside of the windows. block_length: blocks begin at its
    multiples (0: where tokens to generate begin).
    """

    open: Callable[[Cache | None, jax.Array, jax.Array, jax.Array], Cache]
    features: Callable[[View, jax.Array], jax.Array]
    block_length: int = 0

    def empty(self, ids: jax.Array) -> View:
        """Return a view of the shapes that `moved` fills."""
        start = jnp.zeros(ids.shape[:1], jnp.int32)
        shapes = jax.eval_shape(self.open, None, ids, start, start > 0)
        return View(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), start, start)

    def moved(self, view: View | None, ids: jax.Array, place: Place) -> View:
        """Return the view of a call: at the first step of a block its windows are opened.

        With blocks at multiples of block_length each row goes from block to block, also through
        those in which it has nothing to generate: the cache grows by one at a time.
        """
        assert view is not None
        free, active, ahead, now = place

        def opened() -> View:
            if not self.block_length:
                start = jnp.argmax(active, axis=-1).astype(jnp.int32)
                end = jnp.full_like(start, ids.shape[1])
                return View(self.open(view.cache, ids, start, now.block == 0), start, end)
            row = jnp.argmax(free, axis=-1).astype(jnp.int32) // self.block_length
            start, end = ((row + n) * self.block_length for n in (now.first, now.block + 1))
            # Of what is opened again the cache already has what lies before.
            cache = jax.lax.cond(
                now.reopens,
                lambda: view.cache,
                lambda: self.open(view.cache, ids, start, now.block == 0),
            )
            return View(cache, start, end)

        # Schedules may have more blocks than rows.
        opens = (now.step == 0) & jnp.any(active | ahead)
        return jax.lax.cond(opens, opened, lambda: view)

    def denoiser(self, view: View | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Return the network as the loop asks it: (noisy ids, times) -> features."""
        assert view is not None
        return lambda z_t, times: self.features(view, z_t)


def prefix_windows(
    network: Any, params: Any, width: int, lengths: jax.Array | None = None
) -> Windows:
    """Return the windows of a network that was trained with prompts: finished tokens are one.

    They see each other in both directions, so that each block computes them anew. A window sees
    them, itself and the noise after it: `width` tokens, at least as many as follow the first one to
    generate. lengths int32 [B]: positions from there on are padding.
    """
    run = _runner(network, params)

    def open_at(
        cache: Cache | None, ids: jax.Array, start: jax.Array, is_first: jax.Array
    ) -> Cache:
        del cache, is_first
        places = jnp.arange(ids.shape[1])
        return run(ids, places, (places[None] < start[:, None])[:, None, None])[1]

    def features(view: View, z_t: jax.Array) -> jax.Array:
        cache, start, _ = view
        rows, length = z_t.shape
        ends = jnp.full(rows, length) if lengths is None else lengths
        places = start[:, None] + jnp.arange(width)[None]
        before = jnp.arange(length)[None] < start[:, None]
        seen = jnp.concatenate([before, places < ends[:, None]], axis=1)
        h, _ = run(_ids_at(z_t, places), places, seen[:, None, None], cache)
        return _in_rows(length, places, h)

    return Windows(open_at, features)


def windows_of(
    network: Any,
    params: Any,
    options: SamplerOptions,
    width: int,
    lengths: jax.Array | None = None,
) -> Windows | None:
    """Return the windows of a network; None where it computes whole rows.

    width, lengths as in `prefix_windows`.
    """
    if not isinstance(network, TimeFreeTransformer) or options.guidance != 1.0:
        return None
    if network.block_length:
        return causal_windows(network, params, network.block_length, lengths, options.reopen)
    # Without prompts in training finished tokens saw what follows, and still must.
    if options.block_length and network.position_times:
        return prefix_windows(network, params, width, lengths)
    return None


def by_blocks(network: Any, options: SamplerOptions) -> SamplerOptions:
    """Return the options with the blocks that a model by blocks has.

    Raises InputError for options that it, or a model of whole rows, has no use for.
    """
    length = blocks_of(network)
    if length and options.block_length not in (0, length):
        raise InputError(
            f"block_length = {options.block_length}: this model was trained by blocks of {length}: "
            f"use {length}, or 0 for that"
        )
    if length and options.guidance != 1.0:
        raise InputError(
            "guidance needs a model of whole rows: this one is by blocks, leave it at 1"
        )
    options = dataclasses.replace(options, block_length=options.block_length or length)
    for name in ("stop_at_end", "reopen"):
        if getattr(options, name) and not options.block_length:
            raise InputError(
                f"{name} has no effect where all tokens are drawn at once: set block_length"
            )
    return options


def _runner(network: Any, params: Any) -> Callable[..., Any]:
    def run(ids: jax.Array, places: jax.Array, mask: jax.Array, cache: Cache | None = None) -> Any:
        return network.apply({"params": params}, ids, places, mask, cache=cache, method="run")

    return run


def _ids_at(ids: jax.Array, places: jax.Array) -> jax.Array:
    """Return the ids [B, W] at places [B, W] of rows [B, L]; outside the first or the last one."""
    return at(ids, jnp.clip(places, 0, ids.shape[1] - 1))


def _in_rows(length: int, places: jax.Array, values: jax.Array) -> jax.Array:
    """Return [B, length, D] with values [B, W, D] at places [B, W], 0 elsewhere."""
    zeros = jnp.zeros((len(values), length, values.shape[-1]), values.dtype)
    return put(zeros, places, values)


def causal_windows(
    network: Any,
    params: Any,
    block_length: int,
    lengths: jax.Array | None = None,
    reopen: int = 0,
) -> Windows:
    """Return the windows of a network that was trained by blocks (`TrainSettings.block_length`).

    A block sees itself and the finished blocks before it, and nothing that follows; so the keys and
    values of a finished block are computed once, when the next one begins. lengths as above.
    reopen: so many finished blocks may change again, in one window with the block after them, in
    which all see each other; until then they are computed anew with each block.
    """
    run = _runner(network, params)
    widest = (reopen + 1) * block_length

    def open_at(
        cache: Cache | None, ids: jax.Array, start: jax.Array, is_first: jax.Array
    ) -> Cache:
        def whole() -> Cache:
            places = jnp.arange(ids.shape[1])
            block = places // block_length
            mask = block[:, None] >= block[None]
            return run(ids, places, mask[None, None])[1]

        def extended() -> Cache:
            assert cache is not None
            places = start[:, None] - widest + jnp.arange(widest)[None]
            before = jnp.arange(ids.shape[1])[None] < places[:, :1]
            block = jnp.arange(widest) // block_length
            inside = (block[:, None] >= block[None])[None] & (places >= 0)[:, None]
            before = jnp.broadcast_to(before[:, None], (*places.shape, ids.shape[1]))
            seen = jnp.concatenate([before, inside], axis=-1)
            _, new = run(_ids_at(ids, places), places, seen[:, None], cache)
            first = places[:, 0]
            return Cache(
                _put_tokens(cache.keys, first, new.keys, axis=-2),
                _put_tokens(cache.values, first, new.values, axis=-1),
            )

        return whole() if cache is None else jax.lax.cond(is_first, whole, extended)

    def features(view: View, z_t: jax.Array) -> jax.Array:
        cache, start, reach = view
        rows, length = z_t.shape
        ends = jnp.full(rows, length) if lengths is None else lengths

        def of_width(width: int) -> jax.Array:
            places = start[:, None] + jnp.arange(width)[None]
            before = jnp.arange(length)[None] < start[:, None]
            last = ends if reach is None else jnp.minimum(ends, reach)
            seen = jnp.concatenate([before, places < last[:, None]], axis=1)
            h, _ = run(_ids_at(z_t, places), places, seen[:, None, None], cache)
            return _in_rows(length, places, h)

        if reopen == 0 or reach is None:
            return of_width(block_length)
        is_wide = jnp.any(reach - start > block_length)
        return jax.lax.cond(is_wide, lambda: of_width(widest), lambda: of_width(block_length))

    return Windows(open_at, features, block_length)


def _put_tokens(old: jax.Array, first: jax.Array, new: jax.Array, axis: int) -> jax.Array:
    """Put W tokens of new [layers, B, ...] into old [layers, B, ...] from place `first` [B] on.

    axis: of the tokens. Those before place 0 are dropped. A choice, no scatter: that would lay the
    whole cache out anew, with tokens first, and each call would lay it out back.
    """
    number = jnp.arange(old.shape[axis])[None] - first[:, None]
    shape = [1, len(first), *(1 for _ in old.shape[2:])]
    shape[axis] = old.shape[axis]
    number = number.reshape(shape)
    here = jnp.take_along_axis(new, jnp.clip(number, 0, new.shape[axis] - 1), axis=axis)
    return jnp.where((number >= 0) & (number < new.shape[axis]), here, old)


def aligned_blocks(free: jax.Array, block_length: int) -> jax.Array:
    """Return the number of each position's block [B, L], from 0 at the first free one's.

    Blocks begin at multiples of block_length.
    """
    block = jnp.arange(free.shape[1]) // block_length
    return block[None] - block[jnp.argmax(free, axis=-1)][:, None]
