"""Upper bounds on -log p(x): the diffusion bound with both of its boundary terms, and exact values.

-log p(x) <= reconstruction + middle + prior (paper, theorem 2), per token and in nats:
reconstruction E[-log p(x|z)] at the first time, middle the integral of the ELBO integrand,
prior KL(q_T(.|x) || p_T) at the last time. The original reports the middle term alone, which is
too good by one to several percent for hybrid noise.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.draws import fold_in, row_keys
from gidd_jax.loss import (
    at_ids,
    autoregressive_loss,
    gidd_loss,
    log_marginal,
    masked_logits,
)
from gidd_jax.process import InterpolatingProcess, expand_time

# (z_t [B, L], t [B], or [B, L] where positions are at times of their own) -> logits [B, L, C]
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


class RowBounds(NamedTuple):
    """What each row of a batch adds to a corpus: nats summed over its scored tokens.

    reconstruction, middle, prior [B]: the terms of the bound; tokens int32 [B]; integrand [S, B]:
    the draws behind the middle term; original [B]: the integrand at one time per row, the
    original's whole estimate. Exact models have no draws (S = 0), and their -log p as `middle`.
    """

    reconstruction: jax.Array
    middle: jax.Array
    prior: jax.Array
    tokens: jax.Array
    integrand: jax.Array
    original: jax.Array

    @property
    def total(self) -> jax.Array:
        return self.reconstruction + self.middle + self.prior


class Profile(NamedTuple):
    """The integrand by time: edges [bins + 1], mean [bins] in nats per token (NaN where no draw
    fell), tokens [bins]: tokens times draws behind each mean."""

    edges: np.ndarray
    mean: np.ndarray
    tokens: np.ndarray


class Nelbo(NamedTuple):
    """The three terms of the bound, float32 [B, L], in nats per token."""

    reconstruction: jax.Array
    middle: jax.Array
    prior: jax.Array

    @property
    def total(self) -> jax.Array:
        return self.reconstruction + self.middle + self.prior


def reconstruction_nll(
    process: InterpolatingProcess,
    logits: jax.Array,
    x: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
    keep_padding_columns: bool = False,
) -> jax.Array:
    """Return -log q(x|z_t, x_hat), [B, L]: the last step of the model, from time t to the data."""
    log_x_hat = jax.nn.log_softmax(masked_logits(process, logits, keep_padding_columns))
    t = expand_time(t, x)
    log_alpha, at_z = jnp.log(process.alpha(t)), process.mass_at(process.beta_pi(t), z_t)
    log_q_z_given_x = log_marginal(jnp.where(z_t == x, log_alpha, -jnp.inf), at_z)
    log_q_z = log_marginal(log_alpha + at_ids(log_x_hat, z_t), at_z)
    # Under masks alone an unmasked token is certain: 0/0 in the general formula.
    certain = (z_t == x) & (at_z == 0)
    nll = log_q_z - log_q_z_given_x - at_ids(log_x_hat, x)
    return jnp.where(certain, 0.0, nll)


def prior_kl(process: InterpolatingProcess, x: jax.Array) -> jax.Array:
    """Return KL(q_T(.|x) || p_T), [B, L]; p_T is the marginal of uniformly distributed data."""
    t = jnp.float32(process.t_max)
    alpha, mass = process.alpha(t), process.beta_pi(t)
    at_x = process.mass_at(mass, x)
    data = alpha / process.num_noise_tokens
    # sum over v of q(v|x) log(q(v|x) / p_T(v)); every v but x has q(v|x) = b_v, p_T(v) = b_v + data
    ids = jnp.arange(process.vocab_size)
    others = jnp.where(ids == process.mask_id, 0.0, process.mass_at(mass, ids))
    log_ratio = jnp.log1p(data / jnp.where(others > 0, others, 1.0))
    terms = jnp.where(others > 0, others * log_ratio, 0.0)
    at_x_term = (alpha + at_x) * (jnp.log(alpha + at_x) - jnp.log(data + at_x))
    return at_x_term - (jnp.sum(terms) - terms[x])


def sample_times(
    process: InterpolatingProcess, key: jax.Array, num_samples: int, num_rows: int
) -> jax.Array:
    """Draw times [num_samples, num_rows], stratified over all of them together.

    The times of one row lie 1/num_samples of the range apart, and rows that follow each other
    are spread over that width, so that a row's own estimate and a batch's are stratified as well.
    """
    step = round(num_rows * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, num_rows) != 1:  # then multiples of the step visit every stratum
        step += 1
    strata = np.arange(num_rows, dtype=np.int64) * step % num_rows
    strata = np.arange(num_samples)[:, None] * num_rows + strata[None, :]
    return process.sample_t(key, num_samples * num_rows)[strata]


def sample_integrand(
    process: InterpolatingProcess,
    denoise: Denoiser,
    keys: jax.Array,
    times: jax.Array,
    x: jax.Array,
    *,
    keep_padding_columns: bool = False,
    given: jax.Array | None = None,
) -> jax.Array:
    """Draw the ELBO integrand of x [B, L] at times [S, B], float32 [S, B, L] in nats per unit t.

    keys [B]: what a row draws does not depend on the others. given bool [B, L]: tokens that are
    known, stay clean in z_t, are at time 0 and cost nothing.
    """

    def draw(number: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        z_t = jax.vmap(process.sample)(fold_in(keys, number), x, t)
        z_t = _keep(given, x, z_t)
        losses = gidd_loss(
            process,
            denoise(z_t, _times(given, t)),
            x,
            z_t,
            t,
            weighting="elbo",
            keep_padding_columns=keep_padding_columns,
        )
        return number + 1, _keep(given, jnp.zeros_like(losses.elbo), losses.elbo)

    _, integrand = jax.lax.scan(draw, jnp.uint32(0), times)
    return integrand


def sample_reconstruction(
    process: InterpolatingProcess,
    denoise: Denoiser,
    keys: jax.Array,
    x: jax.Array,
    *,
    keep_padding_columns: bool = False,
    given: jax.Array | None = None,
) -> jax.Array:
    """Draw the reconstruction term of x [B, L] at the first time, [B, L] in nats; keys [B]."""
    t = jnp.full((x.shape[0],), process.t_min, jnp.float32)
    z_t = _keep(given, x, jax.vmap(process.sample)(keys, x, t))
    logits = denoise(z_t, _times(given, t))
    nll = reconstruction_nll(process, logits, x, z_t, t, keep_padding_columns)
    return _keep(given, jnp.zeros_like(nll), nll)


def _times(given: jax.Array | None, t: jax.Array) -> jax.Array:
    """Return t [B] where nothing is given, else the times [B, L], 0 at what is given."""
    return t if given is None else jnp.where(given, 0.0, t[:, None])


def _keep(given: jax.Array | None, kept: jax.Array, other: jax.Array) -> jax.Array:
    return other if given is None else jnp.where(given, kept, other)


def nelbo(
    process: InterpolatingProcess,
    denoise: Denoiser,
    key: jax.Array,
    x: jax.Array,
    *,
    num_samples_t: int = 1,
    keep_padding_columns: bool = False,
    given: jax.Array | None = None,
) -> Nelbo:
    """Estimate the bound for token ids x [B, L] with `num_samples_t` times per sequence.

    given as in `nelbo_at`. The times of all draws are stratified together. Unbiased for every
    number of times; num_samples_t + 1 network calls.
    """
    time_key, draw_key = jax.random.split(key)
    times = sample_times(process, time_key, num_samples_t, x.shape[0])
    keys = row_keys(draw_key, jnp.arange(x.shape[0]))
    options: _Options = {"keep_padding_columns": keep_padding_columns, "given": given}
    return nelbo_at(process, denoise, keys, times, x, **options)


def nelbo_at(
    process: InterpolatingProcess,
    denoise: Denoiser,
    keys: jax.Array,
    times: jax.Array,
    x: jax.Array,
    *,
    keep_padding_columns: bool = False,
    given: jax.Array | None = None,
) -> Nelbo:
    """Estimate the bound for x [B, L] at given times [S, B], each row with its own key [B].

    With `given` (bool [B, L]) it bounds -log p(the other tokens | the given ones).
    """
    options: _Options = {"keep_padding_columns": keep_padding_columns, "given": given}
    draws = sample_integrand(process, denoise, fold_in(keys, 0), times, x, **options)
    reconstruction = sample_reconstruction(process, denoise, fold_in(keys, 1), x, **options)
    middle = jnp.mean(draws, axis=0) * (process.t_max - process.t_min)
    prior = prior_kl(process, x)
    return Nelbo(reconstruction, middle, _keep(given, jnp.zeros_like(prior), prior))


class _Options(TypedDict):
    keep_padding_columns: bool
    given: jax.Array | None


def log_likelihood(
    process: InterpolatingProcess,
    denoise: Denoiser,
    keys: jax.Array,
    x: jax.Array,
    free: jax.Array,
    *,
    num_samples_t: int,
    keep_padding_columns: bool = False,
) -> jax.Array:
    """Return a lower bound of log p(free tokens | the others) by token, float32 [B, L] in nats.

    x int32 and free bool [B, L]; 0 where not free. A row depends on its key [B] alone, not on the
    other rows. num_samples_t + 1 network calls.
    """

    def row_times(key: jax.Array) -> jax.Array:
        return sample_times(process, key, num_samples_t, 1)[:, 0]

    times = jax.vmap(row_times, out_axes=1)(fold_in(keys, 0))
    bound = nelbo_at(
        process,
        denoise,
        fold_in(keys, 1),
        times,
        x,
        keep_padding_columns=keep_padding_columns,
        given=~free,
    )
    return -bound.total


def autoregressive_nelbo(predict: Callable[[jax.Array], jax.Array], x: jax.Array) -> Nelbo:
    """Return the exact -log p of each token but the first (0) as the middle term, [B, L]."""
    nll = jnp.pad(autoregressive_loss(predict(x), x), [(0, 0), (1, 0)])
    return Nelbo(jnp.zeros_like(nll), nll, jnp.zeros_like(nll))


def perplexity(nats: float) -> float:
    """Return exp(nats per token); infinite where no float is as large."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def row_bounds(
    process: InterpolatingProcess,
    denoise: Denoiser,
    keys: jax.Array,
    times: jax.Array,
    original_times: jax.Array,
    x: jax.Array,
    mask: jax.Array,
    *,
    keep_padding_columns: bool = False,
    given: jax.Array | None = None,
) -> RowBounds:
    """Estimate the bound, and the original's figure, of rows x [B, L] over mask bool [B, L].

    times [S, B] for the bound, original_times [B] for the original's figure; keys [B]; given bool
    [B, L]: tokens that are known, and not scored. S + 2 network calls.
    """
    options: _Options = {"keep_padding_columns": keep_padding_columns, "given": given}
    mask = mask if given is None else mask & ~given
    draws = sample_integrand(process, denoise, fold_in(keys, 0), times, x, **options)
    reconstruction = sample_reconstruction(process, denoise, fold_in(keys, 1), x, **options)
    original = sample_integrand(
        process, denoise, fold_in(keys, 2), original_times[None], x, **options
    )
    integrand = _row_sums(draws, mask[None])
    return RowBounds(
        reconstruction=_row_sums(reconstruction, mask),
        middle=jnp.mean(integrand, axis=0) * (process.t_max - process.t_min),
        prior=_row_sums(prior_kl(process, x), mask),
        tokens=jnp.sum(mask, axis=-1),
        integrand=integrand,
        original=_row_sums(original[0], mask),
    )


def autoregressive_row_bounds(
    predict: Callable[[jax.Array], jax.Array], x: jax.Array, mask: jax.Array
) -> RowBounds:
    """Return the exact -log p of rows x [B, L], over mask [B, L] but for each row's first token."""
    scored = mask & (jnp.arange(x.shape[1]) > 0)[None]
    nll = _row_sums(autoregressive_nelbo(predict, x).middle, scored)
    none = jnp.zeros((0, x.shape[0]), jnp.float32)
    zeros = jnp.zeros_like(nll)
    return RowBounds(zeros, nll, zeros, jnp.sum(scored, axis=-1), none, nll)


def _row_sums(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1)


def original_estimate(row_nats: Sequence[np.ndarray], row_tokens: Sequence[np.ndarray]) -> float:
    """Return the figure of the original's evaluation script, in nats per token.

    For each batch the integrand summed over each row and its tokens, [rows]. Batch means over
    tokens are averaged by their numbers of sequences, as `eval/loss.py` there does.
    """
    means = [nats.sum() / tokens.sum() for nats, tokens in zip(row_nats, row_tokens, strict=True)]
    return float(np.average(means, weights=[len(nats) for nats in row_nats]))


def integrand_profile(
    process: InterpolatingProcess,
    t: np.ndarray,
    integrand: np.ndarray,
    tokens: np.ndarray,
    num_bins: int = 20,
) -> Profile:
    """Average draws of rows (times t and integrand [S, N], tokens [N]) in equal bins of t.

    The mean over the bins times the range of t estimates the middle term per token.
    """
    edges = np.linspace(process.t_min, process.t_max, num_bins + 1)
    bins = np.clip(np.searchsorted(edges, t, side="right") - 1, 0, num_bins - 1).ravel()
    nats = np.bincount(bins, integrand.ravel(), num_bins)
    counts = np.bincount(bins, np.broadcast_to(tokens, t.shape).ravel(), num_bins)
    mean = np.divide(nats, counts, out=np.full(num_bins, np.nan), where=counts > 0)
    return Profile(edges, mean, counts.astype(np.int64))
