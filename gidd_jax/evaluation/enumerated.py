"""Checks of a process by enumerating a small vocabulary: draws, sampler, bound and losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from gidd_jax.draws import row_keys
from gidd_jax.evaluation.definitions import (
    NUM_TIMES,
    Check,
    bayes,
    float64,
    marginals,
    mass_at,
    times,
)
from gidd_jax.likelihood import prior_kl, reconstruction_nll
from gidd_jax.loss import gidd_loss
from gidd_jax.ops.fused_loss import fused_loss
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.loop import sample_diffusion
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.sampling.schedule import time_grid

NUM_DRAWS = 1 << 16
NUM_STEPS = 8  # of the sampler
PANELS, NODES = 16, 16  # of the quadrature


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
