"""Arrays that both sides of a comparison get alike, made with numpy from fixed seeds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

MASK, PAD = "[MASK]", "[PAD]"


def token_ids(shape: Mapping[str, Any], batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Clean token ids int32 [batch, length]; the last id of the vocabulary is the mask."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, shape["vocab_size"] - 1, (batch, length)).astype(np.int32)


def times(batch: int) -> np.ndarray:
    """Times float32 [batch], spread as a stratified draw spreads them."""
    return ((np.arange(batch) + 0.5) / batch).astype(np.float32)


def noisy_ids(shape: Mapping[str, Any], x: np.ndarray, t: np.ndarray, seed: int = 1) -> np.ndarray:
    """Noisy ids like those of the hybrid process: masks with probability 0.9 t, else 10% random."""
    rng = np.random.default_rng(seed)
    u = rng.random(x.shape)
    masked, random = u < 0.9 * t[:, None], u > 0.9
    other = rng.integers(0, shape["vocab_size"] - 1, x.shape)
    z = np.where(masked, shape["vocab_size"] - 1, np.where(random, other, x))
    return z.astype(np.int32)


def projection(shape: Mapping[str, Any], tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [tokens, width], kernel [width, vocab_size] and bias [vocab_size], float32."""
    rng = np.random.default_rng(2)
    width, vocab_size = shape["hidden_size"], shape["vocab_size"]
    h = rng.standard_normal((tokens, width), np.float32)
    kernel = rng.standard_normal((width, vocab_size), np.float32) * np.float32(width**-0.5)
    return h, kernel, rng.standard_normal(vocab_size, np.float32)


def word_tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer of so many ids; the last is the mask, before it padding, and one end."""
    import tokenizers

    from gidd_jax.data.tokenizer import Tokenizer

    words = [f"w{i}" for i in range(vocab_size - 3)] + ["<|endoftext|>", PAD, MASK]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocab, unk_token=words[-3]))
    return Tokenizer(
        backend,
        bos_id=None,
        eos_id=vocab_size - 3,
        pad_id=vocab_size - 2,
        mask_id=vocab_size - 1,
        name="words",
    )


def random_parameters(network: Any, seed: int = 3) -> Any:
    """Return parameters of a network, the output layer too drawn at random."""
    import jax
    import jax.numpy as jnp

    from gidd_jax.parallel.sharding import unbox

    ids, t = jnp.zeros((1, 8), jnp.int32), jnp.zeros(1, jnp.float32)
    params = unbox(jax.jit(network.init)(jax.random.key(seed), ids, t)["params"])
    kernel = params["output"]["kernel"]
    drawn = jax.random.normal(jax.random.key(seed + 1), kernel.shape) * kernel.shape[0] ** -0.5
    params["output"]["kernel"] = drawn
    return params
