"""Estimates of log p(text) that are tighter than the bound, and what each of them bounds.

All are sums over draws: K values of log w for each row, each with E[w] at most the probability that
a certain decoder gives the row. So their mean is a lower bound of that decoder's log p (in
expectation), and so is the logarithm of their mean, which is closer and rises with K.

 * bound: log w is the diffusion bound itself (`likelihood`), one value from `num_samples_t` times.
 * chain: the decoder that puts one token a call in place of a mask, in a random order or from left
   to right: log w = sum_i log x_hat_i(x_i | the tokens before it) is exact for the order it took.
   Of all orders, the decoder is their mixture.
 * importance: the ancestral sampler of N steps on the cosine grid, and a last draw of every token
   from x_hat. A path z_1 .. z_N is drawn by the forward process from x and weighed against the
   reverse one. The posteriors share their transition with the forward process, which cancels:
   log w = log p_T(z_N) + log x_hat(x) - log q_1(z_1|x_hat) + sum_n log q_{n-1}(z_{n-1}|x_hat) -
   log q_n(z_n|x_hat), with the x_hat of the noisier of both. With K = 1 and N -> infinity it is the
   bound; it rises with K.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.draws import fold_in, uniforms
from gidd_jax.errors import InputError
from gidd_jax.likelihood import Denoiser, log_likelihood
from gidd_jax.loss import at_ids, log_marginal, masked_logits
from gidd_jax.process import InterpolatingProcess, NoiseMass, expand_time
from gidd_jax.sampling.options import EstimatorOptions
from gidd_jax.sampling.schedule import has_masks, time_grid
from gidd_jax.sampling.times import CLEAN

PATH_GRID = "cosine"  # of the times of a path


class Quantity(NamedTuple):
    """A figure made of the draws of a row: its name, what it is to log p, and of which decoder."""

    name: str
    says: str
    is_mean: bool  # of the draws, else the logarithm of their mean weight


EXACT = Quantity("exact", "log p itself, of an autoregressive model", True)


def quantities(options: EstimatorOptions) -> list[Quantity]:
    """Return the figures that an estimator gives, from the loosest on."""
    if options.estimator == "bound":
        return [Quantity("bound", "lower bound of log p of the sampler with many steps", True)]
    if options.estimator == "importance":
        of = f"the ancestral sampler with {options.path_steps} steps"
        of += f", on the {PATH_GRID} grid and with a last draw of every token"
        return [
            Quantity("mean of log w", f"lower bound of log p of {of}", True),
            Quantity("log of mean w", f"tighter lower bound of log p of {of}", False),
        ]
    if options.chain_order == "left_to_right":
        return [Quantity("chain", "exact log p of one token a call from left to right", True)]
    of = "one token a call in random order"
    return [
        Quantity("mean over orders", f"lower bound of log p of {of}", True),
        Quantity("log of mean over orders", f"tighter lower bound of log p of {of}", False),
    ]


def check_estimator(process: InterpolatingProcess | None, options: EstimatorOptions) -> None:
    """Raise InputError when there is no such estimate for this process (None: autoregressive)."""
    if process is None:
        if options != EstimatorOptions(num_samples_t=options.num_samples_t):
            raise InputError(
                "this model is autoregressive: its log p is exact, leave out estimator"
            )
        return
    if options.estimator == "chain" and not has_masks(process):
        raise InputError(
            "estimator 'chain' needs a process with masks, this one has none: use 'importance'"
        )


def calls_per_row(options: EstimatorOptions, num_free: int) -> int:
    """Return the network calls behind the estimate of a row with so many free tokens."""
    if options.estimator == "bound":
        return options.num_samples_t + 1
    if options.estimator == "chain":
        return options.num_orders * num_free
    return options.num_paths * (options.path_steps + 1)


def num_draws(options: EstimatorOptions) -> int:
    """Return K, how many values of log w a row has."""
    return {"chain": options.num_orders, "importance": options.num_paths}.get(options.estimator, 1)


def log_mean_exp(draws: np.ndarray) -> np.ndarray:
    """Return log of the mean of exp over the first axis, float64."""
    draws = draws.astype(np.float64)
    largest = draws.max(axis=0)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(draws - largest).mean(axis=0)) + largest


def estimate(
    process: InterpolatingProcess,
    denoise: Denoiser,
    options: EstimatorOptions,
    keys: jax.Array,
    x: jax.Array,
    free: jax.Array,
    *,
    keep_padding_columns: bool = False,
) -> jax.Array:
    """Return the draws of log w by token, float32 [K, B, L] in nats; 0 where not free bool [B, L].

    The free tokens of x int32 [B, L] given the others, which are clean and at time 0. A row depends
    on its key [B] alone. Raises InputError where the process has no such estimate.
    """
    check_estimator(process, options)
    if options.estimator == "bound":
        return log_likelihood(
            process,
            denoise,
            keys,
            x,
            free,
            num_samples_t=options.num_samples_t,
            keep_padding_columns=keep_padding_columns,
        )[None]

    def log_x_hat(z: jax.Array, times: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(masked_logits(process, denoise(z, times), keep_padding_columns))

    draw, count = _chain(process, log_x_hat, options, x, free), options.num_orders
    if options.estimator == "importance":
        draw, count = _path(process, log_x_hat, options, x, free), options.num_paths
    return jax.lax.map(lambda number: draw(fold_in(keys, number)), jnp.arange(count))


def _chain(
    process: InterpolatingProcess,
    log_x_hat: Callable[[jax.Array, jax.Array], jax.Array],
    options: EstimatorOptions,
    x: jax.Array,
    free: jax.Array,
) -> Callable[[jax.Array], jax.Array]:
    length = x.shape[1]

    def draw(keys: jax.Array) -> jax.Array:
        place = jnp.broadcast_to(jnp.arange(length)[None].astype(jnp.float32), x.shape)
        order = uniforms(keys, length, 1)[..., 0] if options.chain_order == "random" else place
        rank = jnp.argsort(jnp.argsort(jnp.where(free, order, jnp.inf), axis=-1), axis=-1)

        def lift(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            number, total = carry
            is_open = free & (rank >= number)
            z = jnp.where(is_open, process.mask_id, x)
            said = at_ids(log_x_hat(z, jnp.where(is_open, process.t_max, CLEAN)), x)
            return number + 1, jnp.where(free & (rank == number), said, total)

        most = jnp.max(jnp.sum(free, axis=-1))
        start = jnp.int32(0), jnp.zeros(x.shape, jnp.float32)
        return jax.lax.while_loop(lambda carry: carry[0] < most, lift, start)[1]

    return draw


def _path(
    process: InterpolatingProcess,
    log_x_hat: Callable[[jax.Array, jax.Array], jax.Array],
    options: EstimatorOptions,
    x: jax.Array,
    free: jax.Array,
) -> Callable[[jax.Array], jax.Array]:
    t, s = (jnp.asarray(a[::-1].copy()) for a in time_grid(process, options.path_steps, PATH_GRID))

    def told(time: jax.Array) -> jax.Array:
        return jnp.where(free, time, CLEAN).astype(jnp.float32)

    def log_q(said: jax.Array, z: jax.Array, time: jax.Array) -> jax.Array:
        """log q_t(z|x_hat), [B, L]."""
        mass = process.mass_at(process.beta_pi(expand_time(time, z)), z)
        log_alpha = jnp.log(process.alpha(expand_time(time, z)))
        return log_marginal(log_alpha + at_ids(said, z), jnp.broadcast_to(mass, z.shape))

    def draw(keys: jax.Array) -> jax.Array:
        first = jax.vmap(lambda k, row: process.sample(k, row, s[0]))(fold_in(keys, 0), x)
        z = jnp.where(free, first, x)
        said = log_x_hat(z, told(s[0]))
        total = at_ids(said, x) - log_q(said, z, s[0])

        def step(
            carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            (z, total), (t, s, number) = carry, now
            noisier = _forward(process, fold_in(keys, 1 + number), z, t, s)
            noisier = jnp.where(free, noisier, x)
            said = log_x_hat(noisier, told(t))
            return (noisier, total + log_q(said, z, s) - log_q(said, noisier, t)), None

        numbers = jnp.arange(options.path_steps)
        (z, total), _ = jax.lax.scan(step, (z, total), (t, s, numbers))
        # The last time's marginal of uniformly distributed data, as in `likelihood.prior_kl`.
        mass = process.mass_at(process.beta_pi(t[-1]), z)
        is_token = z != process.mask_id
        prior = mass + jnp.where(is_token, process.alpha(t[-1]) / process.num_noise_tokens, 0.0)
        return jnp.where(free, total + jnp.log(prior), 0.0)

    return draw


def _forward(
    process: InterpolatingProcess, keys: jax.Array, z: jax.Array, t: jax.Array, s: jax.Array
) -> jax.Array:
    """Draw z_t ~ q(.|z_s) of rows [B, L]: z_s stays with alpha_{t|s}, or becomes noise."""
    _, mass = process.transition(t, s)
    share = NoiseMass(mass.mask, process.num_noise_tokens * mass.uniform)
    u = uniforms(keys, z.shape[1], 1)[..., 0]
    tokens = jax.vmap(lambda key: process.sample_background(key, z.shape[1:]))(fold_in(keys, 1))
    noise = jnp.where(u < share.mask, process.mask_id, tokens)
    return jnp.where(u < share.mask + share.uniform, noise, z).astype(jnp.int32)
