"""Sampling from autoregressive models, token by token with a key-value cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gidd_jax.draws import categorical, fold_in
from gidd_jax.errors import InputError
from gidd_jax.loss import at_ids
from gidd_jax.sampling.loop import Drawn, Prompt, filtered_x_hat
from gidd_jax.sampling.options import SamplerOptions

Cache = Any
DecodeStep = Callable[[jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]


def sample_autoregressive(
    decode: DecodeStep,
    cache: Cache,
    options: SamplerOptions,
    keys: jax.Array,
    prompt: Prompt,
    *,
    eos_id: int,
    pad_id: int,
    vocab_size: int,
    excluded_ids: tuple[int, ...] = (),
) -> Drawn:
    """Continue the prompts, token by token: one scan, one call of `decode` a token.

    decode(ids [B, 1], cache, position) -> (logits [B, 1, C], cache). Each row of the prompt begins
    with at least one given token; after an eos_id that was drawn a row is padded with pad_id.
    `excluded_ids` (such as mask and padding) are never drawn.
    """
    banned = jnp.isin(jnp.arange(vocab_size), jnp.asarray(excluded_ids, jnp.int32))

    def step(carry: tuple[jax.Array, jax.Array, Cache], position: jax.Array):
        last, done, cache = carry
        logits, cache = decode(last[:, None], cache, position)
        logits = jnp.where(banned[None, None], -jnp.inf, logits[..., :vocab_size])
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        token = categorical(fold_in(keys, position), filtered_x_hat(options, log_probs))[:, 0]
        token = jnp.where(done, pad_id, token)
        free = prompt.free[:, position + 1]
        token = jnp.where(free, token, prompt.ids[:, position + 1])
        log_prob = jnp.where(free & ~done, at_ids(log_probs, token[:, None])[:, 0], 0.0)
        number = jnp.where(free & ~done, position + 1, 0)
        done |= free & (token == eos_id)
        return (token, done, cache), (token, log_prob, number)

    first = prompt.ids[:, 0]
    start = (first, jnp.zeros(first.shape, bool), cache)
    num_calls = prompt.ids.shape[1] - 1
    _, columns = jax.lax.scan(step, start, jnp.arange(num_calls))
    ids, log_probs, drawn_at = (column.T for column in columns)
    return Drawn(
        ids=jnp.concatenate([first[:, None], ids], axis=1),
        log_probs=jnp.pad(log_probs, [(0, 0), (1, 0)]),
        drawn_at=jnp.pad(drawn_at, [(0, 0), (1, 0)]).astype(jnp.int32),
        num_calls=jnp.int32(num_calls),
        network_calls=jnp.int32(num_calls),
        stopped_at=jnp.full(first.shape, num_calls, jnp.int32),
    )


def check_autoregressive(options: SamplerOptions) -> None:
    """Raise InputError for options that only diffusion models have."""
    of_diffusion = ("method", "grid", "block_length", "stop_at_end", "guidance")
    if any(getattr(options, name) != getattr(SamplerOptions, name) for name in of_diffusion):
        raise InputError(
            "this model is autoregressive, from left to right: method, grid, block_length, "
            "stop_at_end and guidance belong to diffusion models"
        )
