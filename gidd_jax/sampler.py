"""Sampling: one denoising step, and the compiled loops for diffusion and autoregressive models.

Every row draws from its own key, so that a sample depends on the seed and its number alone, not
on the batch it was made in. All probabilities and draws are float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.likelihood import Denoiser
from gidd_jax.loss import log_probs_at, masked_logits
from gidd_jax.process import InterpolatingProcess, expand_time

GRIDS = ("uniform", "reference")
BLOCK = 256  # tokens per block of the two-level categorical draw


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """Return one key per row number, [B]."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def uniforms(keys: jax.Array, length: int, count: int) -> list[jax.Array]:
    """Return `count` arrays [B, length] of uniform numbers in [0, 1), each row from its key."""

    def draw(key: jax.Array, number: int) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, number), (length,))

    return [jax.vmap(lambda key, n=n: draw(key, n))(keys) for n in range(count)]


def index_from_uniform(weights: jax.Array, u: jax.Array) -> jax.Array:
    """Return the index drawn by u in [0, 1) from weights [..., K] >= 0; never one of weight 0."""
    cumulative = jnp.cumsum(weights, axis=-1)
    target = u[..., None] * cumulative[..., -1:]
    index = jnp.sum(cumulative <= target, axis=-1)
    # Where u * total rounds up to the total, take the last index with weight.
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights > 0, axis=-1), axis=-1)
    return jnp.minimum(index, last).astype(jnp.int32)


def categorical(probs: jax.Array, u_block: jax.Array, u_token: jax.Array) -> jax.Array:
    """Draw token ids from probs [..., V] (not necessarily normalised), shape of the uniforms.

    First a block of tokens, then a token of it: two uniforms resolve probabilities down to 2^-46,
    where one float32 uniform (or its Gumbel) would end at 2^-23.
    """
    blocks = -(-probs.shape[-1] // BLOCK)
    pad = blocks * BLOCK - probs.shape[-1]
    padded = jnp.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(0, pad)])
    padded = padded.reshape(*probs.shape[:-1], blocks, BLOCK)
    block = index_from_uniform(jnp.sum(padded, axis=-1), u_block)
    chosen = jnp.take_along_axis(padded, block[..., None, None], axis=-2)[..., 0, :]
    return block * BLOCK + index_from_uniform(chosen, u_token)


def temper(log_x_hat: jax.Array, temperature: float) -> jax.Array:
    """Return log-probabilities proportional to x_hat^(1/temperature); 0 puts all on the largest."""
    if temperature == 1.0:
        return log_x_hat
    if temperature == 0.0:
        best = jnp.argmax(log_x_hat, axis=-1, keepdims=True)
        ids = jnp.arange(log_x_hat.shape[-1]).reshape((1,) * (log_x_hat.ndim - 1) + (-1,))
        return jnp.where(ids == best, 0.0, -jnp.inf)
    return jax.nn.log_softmax(log_x_hat / temperature)


def draw_noise(process: InterpolatingProcess, keys: jax.Array, length: int) -> jax.Array:
    """Draw background tokens [B, length], each row from its key."""
    return jax.vmap(lambda key: process.sample_background(key, (length,)))(keys)


def ancestral_step(
    process: InterpolatingProcess,
    keys: jax.Array,
    log_x_hat: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
    s: jax.Array,
) -> jax.Array:
    """Draw z_s ~ q(.|z_t, x_hat), int32 [B, L], without forming the posterior.

    q(z_s|z_t) is a mixture: z_t stays with probability alpha_{t|s} q_s(z_t)/q_t(z_t), otherwise
    z_s ~ q_s = alpha_s x_hat + beta_s pi_s. One categorical draw; the distribution is that of
    `process.posterior_probs`. t and s: float32 [] or [B]; keys [B].
    """
    u_redraw, u_kind, u_block, u_token = uniforms(keys, z_t.shape[1], 4)
    t, s = expand_time(t, z_t), expand_time(s, z_t)
    _, step_mass = process.transition(t, s)
    x_hat_z = jnp.exp(log_probs_at(log_x_hat, z_t))
    q_t = process.alpha(t) * x_hat_z + process.mass_at(process.beta_pi(t), z_t)
    redraw = u_redraw * q_t < process.mass_at(step_mass, z_t)

    alpha_s, mass_s = process.alpha(s), process.beta_pi(s)
    clean = categorical(jnp.exp(log_x_hat), u_block, u_token)
    noise = draw_noise(process, jax.vmap(lambda k: jax.random.fold_in(k, 4))(keys), z_t.shape[1])
    kind = jnp.where(u_kind < alpha_s + mass_s.mask, process.mask_id, noise)
    return jnp.where(redraw, jnp.where(u_kind < alpha_s, clean, kind), z_t).astype(jnp.int32)


def filtered_posterior(
    process: InterpolatingProcess,
    log_x_hat: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
    s: jax.Array,
    min_p: float,
) -> jax.Array:
    """Return the dense posterior [B, L, C] without its entries below min_p, normalised.

    Where no entry reaches min_p, the largest one remains.
    """
    probs = process.posterior_probs(jnp.exp(log_x_hat), z_t, t, s)
    largest = jnp.max(probs, axis=-1, keepdims=True)
    kept = jnp.where(probs >= jnp.minimum(min_p, largest), probs, 0.0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def time_grid(
    process: InterpolatingProcess, num_steps: int, grid: str = "uniform"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the times t and s of each step, float32 [num_steps], noisiest first.

    uniform: num_steps transitions from t_max to t_min. reference: the original's pairs, which
    leave out the noisiest point and end with a step from t_min to itself.
    Raises InputError for an unknown grid or num_steps < 1.
    """
    if grid not in GRIDS:
        raise InputError(f"unknown grid {grid!r}: use one of {', '.join(GRIDS)}")
    if num_steps < 1:
        raise InputError(f"num_steps must be at least 1: {num_steps}")
    points = np.linspace(process.t_min, process.t_max, num_steps + 1).astype(np.float32)
    if grid == "reference":
        return points[-2::-1], np.concatenate([points[-3::-1], points[:1]])
    return points[:0:-1], points[-2::-1]


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How diffusion samples are drawn; raises InputError for values outside their range.

    min_p > 0 drops posterior entries below it (dense posterior); fill_masks: replace what is still
    masked after the last step by one draw from x_hat.
    """

    num_steps: int = 128
    temperature: float = 1.0
    min_p: float = 0.0
    grid: str = "uniform"
    fill_masks: bool = True
    keep_padding_columns: bool = False

    def __post_init__(self):
        if self.temperature < 0:
            raise InputError(f"temperature must not be negative: {self.temperature}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must lie in [0, 1]: {self.min_p}")
        if self.grid not in GRIDS:
            raise InputError(f"unknown grid {self.grid!r}: use one of {', '.join(GRIDS)}")
        if self.num_steps < 1:
            raise InputError(f"num_steps must be at least 1: {self.num_steps}")


def sample_diffusion(
    process: InterpolatingProcess,
    denoise: Denoiser,
    options: SamplerOptions,
    keys: jax.Array,
    length: int,
) -> jax.Array:
    """Draw token ids int32 [B, length] by ancestral sampling: one scan, one network call a step."""

    def log_x_hat(z_t: jax.Array, t: jax.Array) -> jax.Array:
        logits = denoise(z_t, jnp.full(z_t.shape[:1], t))
        logits = masked_logits(process, logits, options.keep_padding_columns)
        # Columns that only pad the vocabulary are not tokens: x_hat may keep their mass, as the
        # original's softmax does, but nothing is drawn from them.
        return temper(jax.nn.log_softmax(logits), options.temperature)[..., : process.vocab_size]

    def step(z_t: jax.Array, now: tuple[jax.Array, jax.Array, jax.Array]):
        number, t, s = now
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        log_probs = log_x_hat(z_t, t)
        if options.min_p == 0.0:
            return ancestral_step(process, step_keys, log_probs, z_t, t, s), None
        probs = filtered_posterior(process, log_probs, z_t, t, s, options.min_p)
        return categorical(probs, *uniforms(step_keys, length, 2)), None

    t, s = time_grid(process, options.num_steps, options.grid)
    numbers = jnp.arange(1, options.num_steps + 1)
    prior_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    z = jax.vmap(lambda key: process.sample_prior(key, (length,)))(prior_keys)
    z, _ = jax.lax.scan(step, z, (numbers, jnp.asarray(t), jnp.asarray(s)))
    if not options.fill_masks:
        return z

    def fill(z: jax.Array) -> jax.Array:
        last_keys = jax.vmap(lambda key: jax.random.fold_in(key, options.num_steps + 1))(keys)
        probs = jnp.exp(log_x_hat(z, jnp.float32(process.t_min)))
        clean = categorical(probs, *uniforms(last_keys, length, 2))
        return jnp.where(z == process.mask_id, clean, z)

    return jax.lax.cond(jnp.any(z == process.mask_id), fill, lambda z: z, z)


Cache = Any
DecodeStep = Callable[[jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]


def sample_autoregressive(
    decode: DecodeStep,
    cache: Cache,
    keys: jax.Array,
    length: int,
    *,
    temperature: float,
    min_p: float,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    vocab_size: int,
    excluded_ids: tuple[int, ...] = (),
) -> jax.Array:
    """Draw token ids int32 [B, length] one by one with a key-value cache, from bos_id on.

    decode(ids [B, 1], cache, position) -> (logits [B, 1, C], cache). After eos_id a row is
    padded with pad_id. `excluded_ids` are never drawn (mask and padding are not text).
    """
    ids = jnp.arange(vocab_size)
    banned = jnp.isin(ids, jnp.asarray(excluded_ids, jnp.int32))

    def step(carry: tuple[jax.Array, jax.Array, Cache], position: jax.Array):
        last, done, cache = carry
        logits, cache = decode(last[:, None], cache, position)
        logits = jnp.where(banned[None], -jnp.inf, logits[:, 0, :vocab_size].astype(jnp.float32))
        probs = jnp.exp(temper(jax.nn.log_softmax(logits), temperature))
        probs = jnp.where(probs >= min_p * jnp.max(probs, axis=-1, keepdims=True), probs, 0.0)
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, position))(keys)
        u_block, u_token = uniforms(step_keys, 1, 2)
        token = categorical(probs, u_block[:, 0], u_token[:, 0])
        token = jnp.where(done, pad_id, token)
        return (token, done | (token == eos_id), cache), token

    rows = keys.shape[0]
    start = (jnp.full((rows,), bos_id, jnp.int32), jnp.zeros((rows,), bool), cache)
    _, tokens = jax.lax.scan(step, start, jnp.arange(length - 1))
    return jnp.concatenate([jnp.full((rows, 1), bos_id, jnp.int32), tokens.T], axis=1)
