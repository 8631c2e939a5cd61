"""Checks of a forward process: its masses, weights, transitions, draws, bound and losses.

Every check returns its error and the bound that a right process meets. References are float64
NumPy, made of nothing but the values of `alpha` and `beta_pi`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from gidd_jax.draws import row_keys
from gidd_jax.likelihood import prior_kl, reconstruction_nll
from gidd_jax.loss import gidd_loss
from gidd_jax.ops.fused_loss import fused_loss
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.loop import sample_diffusion
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.sampling.schedule import time_grid

TOY_VOCAB_SIZE, TOY_MASK_ID = 8, 3
NUM_TIMES = 25
STENCIL = np.array([3, -32, 168, -672, 0, 672, -168, 32, -3]) / 840  # first derivative, order 8
NUM_DRAWS = 1 << 16
NUM_STEPS = 8  # of the sampler
PANELS, NODES = 16, 16  # of the quadrature


class Check(NamedTuple):
    """The largest error that was found, and the largest that is right."""

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return bool(self.error <= self.bound)  # not for NaN


def formula_checks(process: InterpolatingProcess) -> Iterator[Check]:
    """Yield the checks of masses, weights and transitions, for a vocabulary of any size."""
    yield masses_sum(process)
    yield autodiff_weights(process)
    if type(process).elbo_weights is not InterpolatingProcess.elbo_weights:
        yield own_weights(process)
    for check in (float32_weights, rates, transitions, chapman_kolmogorov):
        yield check(process)


def toy_checks(process: InterpolatingProcess) -> Iterator[Check]:
    """Yield the checks that enumerate the vocabulary: a `reduced` process is enough for them."""
    for check in (posterior, noising, prior, sampler, bound, fused):
        yield check(process)


def reduced(process: InterpolatingProcess) -> InterpolatingProcess:
    """Return the same process with few enough tokens to enumerate."""
    if process.vocab_size <= 2 * TOY_VOCAB_SIZE:
        return process
    background = None
    if process.background is not None:
        tokens = np.sort(np.delete(process.background, process.mask_id))
        tokens = tokens[np.linspace(0, len(tokens) - 1, TOY_VOCAB_SIZE - 1).round().astype(int)]
        background = tuple(np.insert(tokens / tokens.sum(), TOY_MASK_ID, 0.0))
    return dataclasses.replace(
        process, vocab_size=TOY_VOCAB_SIZE, mask_id=TOY_MASK_ID, background=background
    )


# What alpha and beta_pi say, in float64.


def float64(function: Callable[..., Any], *args: np.ndarray) -> Any:
    """Return function(*args), computed in float64 and as NumPy arrays."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(function)(*map(jnp.asarray, args)))


def masses(process: InterpolatingProcess, t: np.ndarray) -> np.ndarray:
    """Return alpha_t and the noise masses of the mask and of each other token, [3, T]."""
    values = float64(lambda t: (process.alpha(t), *process.beta_pi(t)), t)
    return np.stack(np.broadcast_arrays(*values, t)[:3]).astype(np.float64)


def times(process: InterpolatingProcess, margin: float = 0.1) -> np.ndarray:
    """Return times [NUM_TIMES], evenly spread by logit up to `margin` from both ends."""
    low = process.t_min * (1 + margin)
    high = 1 - (1 - process.t_max) * (1 + margin)
    first, last = (np.log(t) - np.log1p(-t) for t in (low, high))
    return 1 / (1 + np.exp(-np.linspace(first, last, NUM_TIMES)))


def derivatives(process: InterpolatingProcess, t: np.ndarray) -> np.ndarray:
    """Return the derivatives of `masses` by t, [3, T], from differences of values."""
    step = 0.02 * np.minimum(t, 1 - t)  # both ends may be singular
    points = t + np.arange(-4, 5)[:, None] * step
    values = masses(process, points.ravel()).reshape(3, *points.shape)
    return np.einsum("k,mkt->mt", STENCIL, values) / step


def mass_at(process: InterpolatingProcess, mask_uniform: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the entry at each token id [K] of noise masses [2, T], [T, K]."""
    ratio = np.ones(process.vocab_size)
    if process.background is not None:
        ratio = np.asarray(process.background) * process.num_noise_tokens
    mask, uniform = mask_uniform[:, :, None]
    return np.where(ids == process.mask_id, mask, uniform * ratio[ids])


class Marginals(NamedTuple):
    """alpha_t [T] and beta_t pi_t over the vocabulary [T, V]."""

    alpha: np.ndarray
    noise: np.ndarray

    def of(self, probs: np.ndarray) -> np.ndarray:
        """Return q_t(.|probs) for probs [K, V], [T, K, V]."""
        return self.alpha[:, None, None] * probs + self.noise[:, None, :]


def marginals(process: InterpolatingProcess, t: np.ndarray) -> Marginals:
    """Return the marginals at times [T]."""
    alpha, *noise = masses(process, t)
    return Marginals(alpha, mass_at(process, np.stack(noise), np.arange(process.vocab_size)))


def bayes(
    process: InterpolatingProcess, x_hat: np.ndarray, t: np.ndarray, s: np.ndarray
) -> np.ndarray:
    """Return q(z_s|z_t, x_hat) [T, z_t, z_s] for x_hat [V]; NaN where z_t is impossible."""
    at_t, at_s = marginals(process, t), marginals(process, s)
    alpha_ts = at_t.alpha / at_s.alpha
    noise = at_t.noise - alpha_ts[:, None] * at_s.noise
    step = alpha_ts[:, None, None] * np.eye(process.vocab_size) + noise[:, :, None]
    joint = step * at_s.of(x_hat[None])
    total = joint.sum(-1, keepdims=True)
    return np.divide(joint, total, out=np.full_like(joint, np.nan), where=total > 0)


# Masses, weights and transitions: nothing is enumerated.


def masses_sum(process: InterpolatingProcess) -> Check:
    """alpha_t, mask mass and N times the uniform mass are masses that sum to one."""
    t = np.concatenate([[process.t_min], times(process), [process.t_max]])
    values = masses(process, t)
    values[2] *= process.num_noise_tokens
    wrong = np.max(np.abs(values.sum(0) - 1)), np.max(np.abs(np.minimum(values, 0)))
    return Check("masses: alpha_t and beta_t pi_t sum to 1, none negative", np.max(wrong), 1e-6)


class _Weights(NamedTuple):
    """ELBO weights from numerical derivatives, [T, K], for pairs x, z int32 [T, K] at times [T].

    scale: the size of the terms whose difference they are; 1 where there are none.
    """

    x: np.ndarray
    z: np.ndarray
    t: np.ndarray
    values: np.ndarray
    scale: np.ndarray

    def error(self, weights: np.ndarray) -> float:
        return float(np.max(np.abs(weights - self.values) / self.scale))


def _weights(process: InterpolatingProcess) -> _Weights:
    t = times(process).astype(np.float32).astype(np.float64)  # float32 sees the same times
    tokens = _least_and_most_noisy(process)
    pairs = [(x, z) for x in tokens for z in (*tokens, process.mask_id)]
    x, z = (np.array(ids) for ids in zip(*pairs, strict=True))
    values, slopes = masses(process, t), derivatives(process, t)
    decay = slopes[0] / values[0]
    rate = mass_at(process, slopes[1:] - decay * values[1:], z)
    scale = mass_at(process, np.abs(slopes[1:]) + np.abs(decay * values[1:]), z)
    prob = mass_at(process, values[1:], z) + np.where(x == z, values[0][:, None], 0)
    possible = prob > 0
    rate, scale = (np.divide(a, prob, out=0 * a, where=possible) for a in (rate, scale))
    x, z = (np.broadcast_to(ids.astype(np.int32), rate.shape) for ids in (x, z))
    return _Weights(x, z, t, rate, np.where(scale > 0, scale, 1))


def _least_and_most_noisy(process: InterpolatingProcess) -> list[int]:
    """Two clean tokens (or the only one): of the least noise mass above 0, and of the most."""
    if process.background is None:
        tokens = np.delete(np.arange(process.vocab_size), process.mask_id)
    else:
        order = np.argsort(process.background)
        tokens = order[np.asarray(process.background)[order] > 0]
    return sorted({int(tokens[0]), int(tokens[-1])})


def autodiff_weights(process: InterpolatingProcess) -> Check:
    """R_t / q_t by jax.jvp through alpha and beta_pi against numerical derivatives."""
    want = _weights(process)
    generic = functools.partial(InterpolatingProcess.elbo_weights, process)
    got = float64(generic, want.x, want.z, want.t)
    return Check("weights: autodiff = numerical derivatives", want.error(got), 1e-6)


def own_weights(process: InterpolatingProcess) -> Check:
    """The process's own elbo_weights against numerical derivatives."""
    want = _weights(process)
    got = float64(process.elbo_weights, want.x, want.z, want.t)
    return Check("weights: its own elbo_weights = numerical derivatives", want.error(got), 1e-6)


def float32_weights(process: InterpolatingProcess) -> Check:
    """The weights that training uses, in float32."""
    want = _weights(process)
    t = jnp.asarray(want.t, jnp.float32)
    got = jax.jit(process.elbo_weights)(want.x, want.z, t)
    return Check("weights: float32 = numerical derivatives", want.error(np.asarray(got)), 1e-2)


def rates(process: InterpolatingProcess) -> Check:
    """R_t and the weights, relative to the terms whose difference they are."""
    want = _weights(process)
    own = float64(process.elbo_weights, want.x, want.z, want.t)
    smallest = np.min(np.minimum(want.values, own) / want.scale)
    error = np.abs(np.minimum(smallest, 0))
    return Check("rates: R_t and the weights never negative", error, 1e-6)


def _transition(process: InterpolatingProcess, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """alpha_{t|s} and the noise masses of the mask and of each other token, [3, T]."""
    alpha_ts, mass = float64(process.transition, t, s)
    return np.stack([alpha_ts, *mass])


def transitions(process: InterpolatingProcess) -> Check:
    """q(z_t|z_s) is a distribution for all s < t."""
    grid = times(process)
    s, t = (grid[i] for i in np.triu_indices(NUM_TIMES, 1))
    values = _transition(process, t, s)
    values[2] *= process.num_noise_tokens
    wrong = np.max(np.abs(values.sum(0) - 1)), np.max(np.abs(np.minimum(values, 0)))
    return Check("transitions: q(z_t|z_s) sums to 1, never negative", np.max(wrong), 1e-6)


def chapman_kolmogorov(process: InterpolatingProcess) -> Check:
    """The steps from r to s and s to t make that from r to t; from s to t q_s becomes q_t."""
    grid = times(process)
    i, j, k = (g.ravel() for g in np.meshgrid(*[np.arange(NUM_TIMES)] * 3, indexing="ij"))
    ordered = (i < j) & (j < k)
    r, s, t = (grid[index[ordered]] for index in (i, j, k))
    later, earlier = _transition(process, t, s), _transition(process, s, r)
    at_s, at_t = masses(process, s), masses(process, t)
    wrong = []
    for first, both in ((earlier, _transition(process, t, r)), (at_s, at_t)):
        product, scale = later[0] * first, np.abs(later[0] * first) + 1e-12
        product[1:] += later[1:]
        scale[1:] += np.abs(later[1:])
        wrong.append(np.max(np.abs(product - both) / scale))
    return Check("Chapman-Kolmogorov: r to s to t = r to t, q_s to q_t", np.max(wrong), 1e-6)


# Toys: vocabularies that are enumerated.


def toy_data(process: InterpolatingProcess) -> np.ndarray:
    """Return an uneven distribution over the clean tokens, [V]."""
    p_data = 0.6 ** np.arange(process.vocab_size)
    p_data[process.mask_id] = 0
    return p_data / p_data.sum()


def posterior(process: InterpolatingProcess) -> Check:
    """q(z_s|z_t, x_hat) sums to one and is what Bayes' rule gives."""
    size, x_hat = process.vocab_size, toy_data(process)
    grid = times(process)
    s, t = (grid[i] for i in np.triu_indices(NUM_TIMES, 1))
    z_t = np.broadcast_to(np.arange(size), (len(t), size))
    probs = np.broadcast_to(x_hat, (len(t), size, size))
    got = float64(process.posterior_probs, probs, z_t, t, s)
    want = bayes(process, x_hat, t, s)
    possible = ~np.isnan(want)
    normalised = got.sum(-1)[possible.all(-1)]
    wrong = np.max(np.abs(got - want)[possible]), np.max(np.abs(normalised - 1))
    return Check("posterior: q(z_s|z_t, x_hat) sums to 1 and is Bayes'", np.max(wrong), 1e-6)


def surprise(ids: np.ndarray, probs: np.ndarray) -> float:
    """Return -log10 of the chance of draws [R, n] as far from the probabilities [R, V] as these.

    Exact binomial tests of every frequency, corrected for their number; at least 0.
    """
    size = probs.shape[1]
    if np.min(ids) < 0 or np.max(ids) >= size:
        return np.inf
    count = np.stack([np.bincount(row, minlength=size) for row in ids])
    n, probs = ids.shape[1], np.clip(probs, 0, 1)
    tails = stats.binom.logcdf(count, n, probs), stats.binom.logsf(count - 1, n, probs)
    chance = np.minimum(*tails) + np.log(2 * probs.size)
    return float(np.max(np.maximum(0, -chance))) / np.log(10)


def noising(process: InterpolatingProcess) -> Check:
    """Frequencies of `sample` against q_t(.|x), for all x at three times."""
    t = process.t_min + (process.t_max - process.t_min) * np.array([0.1, 0.5, 0.9])
    clean = np.flatnonzero(toy_data(process))
    probs = marginals(process, t).of(np.eye(process.vocab_size)[clean])
    x = np.repeat(np.tile(clean, len(t))[:, None], NUM_DRAWS, axis=1)
    t_rows = jnp.asarray(np.repeat(t, len(clean)), jnp.float32)
    ids = jax.jit(process.sample)(jax.random.key(0), jnp.asarray(x, jnp.int32), t_rows)
    error = surprise(np.asarray(ids), probs.reshape(-1, process.vocab_size))
    return Check("noising: draws of z_t have the frequencies q_t (-log10 p)", error, 6)


def prior(process: InterpolatingProcess) -> Check:
    """Total variation between the prior, where sampling starts, and q_t of the last time."""
    at_end = marginals(process, np.array([process.t_max])).of(toy_data(process)[None])[0, 0]
    error = 0.5 * np.abs(_prior(process) - at_end).sum()
    return Check("prior: the marginal at t_max (total variation)", error, 0.05)


def _prior(process: InterpolatingProcess) -> np.ndarray:
    mass = np.array([[float(m)] for m in process.prior()])
    return mass_at(process, mass, np.arange(process.vocab_size))[0]


def sampler(process: InterpolatingProcess) -> Check:
    """Frequencies of the ancestral sampler against its exact distribution, with x_hat = p_data."""
    p_data, length = toy_data(process), 256
    logits = jnp.asarray(np.log(np.where(p_data > 0, p_data, 1)), jnp.float32)
    options = SamplerOptions(num_steps=NUM_STEPS, fill_masks=False)

    def draw(keys: jax.Array) -> jax.Array:
        return sample_diffusion(
            process,
            lambda z, t: jnp.broadcast_to(logits, (*z.shape, len(p_data))),
            options,
            keys,
            length,
        ).ids

    ids = jax.jit(draw)(row_keys(jax.random.key(1), jnp.arange(NUM_DRAWS // length)))
    probs = _prior(process)
    grid = (a.astype(np.float64) for a in time_grid(process, NUM_STEPS))
    for step in bayes(process, p_data, *grid):
        possible = probs > 0
        probs = probs[possible] @ step[possible]
    error = surprise(np.asarray(ids).reshape(1, -1), probs[None])
    return Check("sampler: ancestral draws have their frequencies (-log10 p)", error, 6)


def quadrature(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Return times and weights of an integral over [low, high]; dense near 0 and 1.

    Gauss-Legendre in panels of theta = arccos(1 - 2t).
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    first, last = np.arccos(1 - 2 * low), np.arccos(1 - 2 * high)
    edges = np.linspace(first, last, PANELS + 1)
    half = 0.5 * np.diff(edges)[:, None]
    theta = (0.5 * (edges[1:] + edges[:-1])[:, None] + half * nodes).ravel()
    return (1 - np.cos(theta)) / 2, 0.5 * (half * weights).ravel() * np.sin(theta)


def bound(process: InterpolatingProcess) -> Check:
    """The three terms of the bound against -log p(x), for one token and x_hat = p_data."""
    p_data, size = toy_data(process), process.vocab_size
    clean = np.flatnonzero(p_data)
    t, weights = quadrature(process.t_min, process.t_max)
    points = np.concatenate([t, [process.t_min]])
    q = marginals(process, points).of(np.eye(size)[clean])  # [T + 1, x, z]
    logits = np.log(np.where(p_data > 0, p_data, 1))

    def terms(points: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = np.meshgrid(clean, np.arange(size), indexing="ij")
        x, z = (jnp.broadcast_to(ids.ravel(), (len(points), ids.size)) for ids in pairs)
        scores = jnp.broadcast_to(logits, (*x.shape, size))
        integrand = gidd_loss(process, scores, x, z, points, weighting="elbo").elbo
        return integrand, reconstruction_nll(process, scores, x, z, points)

    integrand, nll = float64(terms, points)
    at_end = float64(functools.partial(prior_kl, process), clean[None])[0]
    integrand, nll = (
        (q * np.where(q > 0, a.reshape(q.shape), 0)).sum(-1) for a in (integrand, nll)
    )
    # The package's prior term is that of evenly distributed data: exchange it for these data's.
    last = marginals(process, np.array([process.t_max]))
    even = np.where(p_data > 0, 1 / len(clean), 0)
    ours, theirs = (last.of(p[None])[0, 0] for p in (p_data, even))
    possible = ours > 0
    ratio = np.log(ours[possible] / theirs[possible])
    exchange = last.of(np.eye(size)[clean])[0][:, possible] @ ratio
    total = nll[-1] + weights @ integrand[:-1] + at_end - exchange
    error = np.max(np.abs(total + np.log(p_data[clean])))
    return Check("bound: of one token with x_hat = p_data is -log p (nats)", error, 1e-4)


def fused(process: InterpolatingProcess) -> Check:
    """Value and gradient of the fused loss against the plain one, on random logits."""
    rng, size = np.random.default_rng(0), process.vocab_size
    x = jnp.asarray(rng.choice(np.flatnonzero(toy_data(process)), (16, 8)), jnp.int32)
    logits = jnp.asarray(2 * rng.standard_normal((*x.shape, size)), jnp.float32)
    t = process.sample_t(jax.random.key(2), len(x))
    z_t = process.sample(jax.random.key(3), x, t)
    coefficient = process.elbo_weights(x, z_t, t) / x.size

    def plain_sum(logits: jax.Array) -> jax.Array:
        terms = gidd_loss(process, logits, x, z_t, t, weighting="elbo")
        return jnp.sum(terms.loss) / x.size

    def fused_sum(logits: jax.Array) -> jax.Array:
        projection = jnp.eye(size), None
        case = x, z_t, t, coefficient
        options = {"cross_entropy": False, "vocab_size": size}
        return fused_loss(process, logits, *projection, *case, **options)[0]

    with jax.default_matmul_precision("highest"):
        want, want_grad = jax.jit(jax.value_and_grad(plain_sum))(logits)
        got, got_grad = jax.jit(jax.value_and_grad(fused_sum))(logits)
    largest = jnp.max(jnp.abs(want_grad))
    wrong = jnp.abs(got / want - 1), jnp.max(jnp.abs(got_grad - want_grad)) / largest
    return Check("loss: fused = plain, value and gradient", float(np.max(wrong)), 1e-4)
