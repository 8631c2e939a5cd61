"""A network that is exactly right: the leave-one-out prior of a Markov chain under any process.

Data: x_1 ~ mu, x_{i+1} ~ A[x_i]. What minimises the bound is p(x_i | z without i), in closed form
by forward-backward. So the law of what a sampler generates, and what a bound should be, are known,
and every sampler can be measured against them. Tokens of the chain are the ids other than the mask,
in their order; all is float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.process import InterpolatingProcess, expand_time


class Chain(NamedTuple):
    """A Markov chain over V tokens: `start` mu [V], `moves` A [V, V], whose rows sum to 1."""

    start: np.ndarray
    moves: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.start)


def draw_chain(seed: int, num_tokens: int, sharpness: float = 1.5) -> Chain:
    """Return a chain whose logits are normal with deviation `sharpness`: 0 is uniform."""
    rng = np.random.default_rng(seed)
    weights = np.exp(sharpness * rng.standard_normal((num_tokens + 1, num_tokens)))
    probs = weights / weights.sum(axis=-1, keepdims=True)
    return Chain(probs[0], probs[1:])


def check_chain(chain: Chain) -> Chain:
    """Return the chain; InputError unless it is one of at least two tokens."""
    start, moves = np.asarray(chain.start, float), np.asarray(chain.moves, float)
    legal = start.ndim == 1 and len(start) >= 2 and moves.shape == (len(start), len(start))
    rows = np.vstack([start, moves]) if legal else np.zeros((1, 1))
    if not legal or not (np.all(rows >= 0) and np.allclose(rows.sum(-1), 1, atol=1e-6)):
        raise InputError(
            "a chain needs start [V] and moves [V, V], V at least 2, of probabilities that sum to 1"
        )
    return Chain(start, moves)


def chain_ids(process: InterpolatingProcess) -> np.ndarray:
    """Return the ids of the chain's tokens, int32 [vocab_size - 1]: all but the mask."""
    ids = np.arange(process.vocab_size)
    return ids[ids != process.mask_id].astype(np.int32)


def leave_one_out(
    process: InterpolatingProcess, chain: Chain
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the exact network: (z int32 [B, L], times [B] or [B, L]) -> log x_hat [B, L, vocab].

    x_hat_i(v) ∝ f_i(v) g_i(v) with emissions e_i(v) = q_t(z_i|v): f_1 = mu, f_i(v) ∝ sum_u
    f_{i-1}(u) e_{i-1}(u) A(u, v); g_L = 1, g_i(u) ∝ sum_v A(u, v) e_{i+1}(v) g_{i+1}(v). A position
    at time 0 is given: its emission is 1 at its token. Raises InputError when the chain has other
    tokens than the process.
    """
    check_chain(chain)
    if chain.num_tokens != process.vocab_size - 1:
        raise InputError(
            f"the chain has {chain.num_tokens} tokens and the process {process.vocab_size - 1} "
            "beside the mask: give as many"
        )
    ids = jnp.asarray(chain_ids(process))
    start, moves = (jnp.asarray(a, jnp.float32) for a in (chain.start, chain.moves))

    def normalised(values: jax.Array) -> jax.Array:
        return values / jnp.sum(values, axis=-1, keepdims=True)

    def denoise(z: jax.Array, times: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            x_hat = predict(z, jnp.broadcast_to(expand_time(times, z), z.shape))
        return jnp.full((*z.shape, process.vocab_size), -jnp.inf).at[..., ids].set(jnp.log(x_hat))

    def predict(z: jax.Array, times: jax.Array) -> jax.Array:
        t = jnp.maximum(times, process.t_min)
        is_z = (z[..., None] == ids[None, None]).astype(jnp.float32)
        noise = process.mass_at(process.beta_pi(t), z)
        emission = process.alpha(t)[..., None] * is_z + noise[..., None]
        emission = jnp.where((times <= 0)[..., None], is_z, emission)
        by_place = jnp.moveaxis(emission, 1, 0)  # [L, B, V]
        first = jnp.broadcast_to(start, by_place.shape[1:])

        def forward(f: jax.Array, e: jax.Array) -> tuple[jax.Array, jax.Array]:
            return normalised((f * e) @ moves), f

        def backward(g: jax.Array, e: jax.Array) -> tuple[jax.Array, jax.Array]:
            return normalised((g * e) @ moves.T), g

        _, before = jax.lax.scan(forward, first, by_place)
        _, after = jax.lax.scan(backward, jnp.ones_like(first), by_place, reverse=True)
        return jnp.moveaxis(normalised(before * after), 0, 1)

    return denoise


def draw_rows(chain: Chain, process: InterpolatingProcess, count: int, length: int, seed: int):
    """Return rows of the chain as ids int32 [count, length]."""
    return chain_ids(process)[draw_places(chain, count, length, seed)]


def draw_places(chain: Chain, count: int, length: int, seed: int) -> np.ndarray:
    """Return rows of the chain as the numbers of its tokens, [count, length]."""
    rng = np.random.default_rng(seed)
    start, moves = np.cumsum(chain.start), np.cumsum(chain.moves, axis=-1)
    places = np.empty((count, length), np.int64)
    u = rng.random((length, count))
    last = chain.num_tokens - 1  # a sum may end just below 1
    places[:, 0] = np.minimum(np.searchsorted(start, u[0], side="right"), last)
    for i in range(1, length):
        below = u[i][:, None] >= moves[places[:, i - 1]]
        places[:, i] = np.minimum(below.sum(axis=-1), last)
    return places


def places_of(process: InterpolatingProcess, ids: np.ndarray) -> np.ndarray:
    """Return the numbers of the chain's tokens, of the shape of ids; -1 at masks."""
    numbers = np.full(process.vocab_size, -1)
    numbers[chain_ids(process)] = np.arange(process.vocab_size - 1)
    return numbers[ids]


def log_prob(chain: Chain, places: np.ndarray) -> np.ndarray:
    """Return log p of rows of the chain's token numbers [N, L], float64 [N]; -inf with a mask."""
    with np.errstate(divide="ignore"):
        start, moves = np.log(chain.start), np.log(chain.moves)
    total = start[places[:, 0]] + moves[places[:, :-1], places[:, 1:]].sum(axis=-1)
    return np.where((places < 0).any(axis=-1), -np.inf, total)


def entropy(chain: Chain, length: int) -> float:
    """Return the entropy of a row, H(mu) + sum_i E[H(A[x_i])], in nats."""

    def of(probs: np.ndarray) -> np.ndarray:
        return -np.sum(np.where(probs > 0, probs * np.log(np.where(probs > 0, probs, 1)), 0), -1)

    total, law, moves = of(chain.start), chain.start, of(chain.moves)
    for _ in range(length - 1):
        total += law @ moves
        law = law @ chain.moves
    return float(total)


def all_rows(chain: Chain, length: int) -> np.ndarray:
    """Return every row of token numbers, [V^length, length], the first position slowest."""
    grid = np.meshgrid(*[np.arange(chain.num_tokens)] * length, indexing="ij")
    return np.stack([axis.ravel() for axis in grid], axis=-1)


def law(chain: Chain, length: int, given: np.ndarray | None = None) -> np.ndarray:
    """Return the probabilities of `all_rows`, [V^length]; given [length]: numbers of tokens that
    are known, -1 where a token is free."""
    rows = all_rows(chain, length)
    probs = np.exp(log_prob(chain, rows))
    if given is not None:
        given = np.asarray(given)
        probs = np.where(((rows == given) | (given < 0)).all(axis=-1), probs, 0.0)
    return probs / probs.sum()


def frequencies(chain: Chain, places: np.ndarray) -> np.ndarray:
    """Return how often each of `all_rows` was drawn, [V^L] that sum to 1 less what has masks."""
    legal = places[(places >= 0).all(axis=-1)]
    number = legal @ (chain.num_tokens ** np.arange(places.shape[1])[::-1])
    return np.bincount(number, minlength=chain.num_tokens ** places.shape[1]) / len(places)


def total_variation(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return half the sum of differences of two laws; what a law lacks (masks) counts as well."""
    lost = abs(1 - found.sum())
    return float(0.5 * (np.abs(found - wanted).sum() + lost))


def noise_floor(probs: np.ndarray, count: int) -> float:
    """Return the expected total variation of the frequencies of `count` exact draws."""
    return float(0.5 * np.sqrt(2 / (np.pi * count)) * np.sqrt(probs * (1 - probs)).sum())


def bigram_law(chain: Chain, length: int) -> np.ndarray:
    """Return the mean law of neighbouring tokens over a row, [V, V]."""
    total, at = np.zeros(chain.moves.shape), chain.start
    for _ in range(length - 1):
        total += at[:, None] * chain.moves
        at = at @ chain.moves
    return total / (length - 1)


def bigrams(chain: Chain, places: np.ndarray) -> np.ndarray:
    """Return the frequencies of neighbouring tokens in rows of token numbers [N, L], [V, V]."""
    left, right = places[:, :-1].ravel(), places[:, 1:].ravel()
    legal, size = (left >= 0) & (right >= 0), chain.num_tokens
    found = np.bincount(left[legal] * size + right[legal], minlength=size**2)
    return found.reshape(size, size) / len(left)
