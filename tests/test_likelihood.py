"""The bound: unbiased against exact quadrature, the original's figure, exact likelihoods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from gidd_jax import likelihood
from gidd_jax.draws import row_keys
from gidd_jax.interchange.tensors import dit_format, llama_format, params_from_torch
from gidd_jax.loss import gidd_loss
from gidd_jax.models.dit import DiT
from gidd_jax.models.llama import Llama
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess

V, MASK = 6, 4
TOKENS = np.array([0, 1, 2, 3, 5])
# Ends of the range where rare events are not so rare that thousands of draws miss them.
PROCESSES = {
    "hybrid 0": HybridProcess(V, MASK, 0.0, t_eps=0.02),
    "hybrid 0.2": HybridProcess(V, MASK, 0.2, t_eps=0.02),
    "hybrid 0.5": HybridProcess(V, MASK, 0.5, gamma=2.0, t_eps=0.02),
    "masked": MaskedProcess(V, MASK, t_eps=0.02),
    "log-SNR hybrid": LogSnrProcess(V, MASK, min_log_snr=-4.0, max_log_snr=4.0),
    "log-SNR uniform": LogSnrProcess(V, MASK, shift=1000.0, min_log_snr=-4.0, max_log_snr=4.0),
}
all_processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))

_rng = np.random.default_rng(5)
TABLE = _rng.normal(size=(V, V + 2))  # logits by noisy token, with two padding columns
X_HAT = oracle.softmax(TABLE, np.isin(np.arange(V + 2), [MASK, V, V + 1]))[:, :V]


def denoise(z_t, t):
    del t
    return jnp.asarray(TABLE, jnp.float32)[z_t]


def nelbo(process, x, seed, num_samples_t, network=denoise):
    """The three terms as float64, computed in one jitted call."""

    @jax.jit
    def bound(key):
        return likelihood.nelbo(process, network, key, x, num_samples_t=num_samples_t)

    return likelihood.Nelbo(*(np.asarray(v, np.float64) for v in bound(jax.random.key(seed))))


def grid(process, nodes=400):
    """Gauss-Legendre nodes in arccos(1 - 2t), and their weights in t."""
    low, high = (np.arccos(1 - 2 * t) for t in (process.t_min, process.t_max))
    u, w = np.polynomial.legendre.leggauss(nodes)
    theta = low + (high - low) * (u + 1) / 2
    return (1 - np.cos(theta)) / 2, w * (high - low) / 2 * np.sin(theta) / 2


def exact_integrand(process, t):
    """Expectation over z_t of the integrand for each of TOKENS, float64 [len(t), 5]."""
    truth = oracle.of(process)
    t, x, z = np.meshgrid(t, TOKENS, np.arange(V), indexing="ij")
    prob = oracle.at(truth.marginal(np.eye(V)[x], t), z)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl, is_div = truth.divergences(X_HAT[z], x, z, t)
        values = prob * truth.weights(x, z, t) * (kl + np.where(z == MASK, 0, is_div))
    return np.where(prob > 0, values, 0).sum(-1)


def exact_terms(process):
    """Reconstruction, middle and prior of each of TOKENS, float64 [3, 5]."""
    truth, last, first = oracle.of(process), np.array(process.t_max), np.array(process.t_min)
    t, weights = grid(process)
    middle = weights @ exact_integrand(process, t)
    onehot = np.eye(V)
    q = truth.marginal(onehot[TOKENS], np.full(5, first))
    # p(x|z) of the last step is q(x|z, x_hat) = q(z|x) x_hat_x / q(z|x_hat)
    q_zx = truth.marginal(onehot, np.full(V, first))  # [x, z]
    with np.errstate(divide="ignore"):
        p = np.stack(
            [
                q_zx[:, z] * X_HAT[z] / truth.marginal(X_HAT[z][None], first[None])[0, z]
                for z in range(V)
            ],
            axis=1,
        )
        cost = np.where(q > 0, -q * np.log(np.where(q > 0, p[TOKENS], 1)), 0)
    average = np.where(np.arange(V) == MASK, 0, 1 / (V - 1))
    q_last, p_last = (
        truth.marginal(probs, np.full(len(probs), last))
        for probs in (onehot[TOKENS], average[None])
    )
    ratio = np.where(q_last > 0, q_last, 1) / np.where(p_last > 0, p_last, 1)
    return np.stack([cost.sum(-1), middle, np.sum(q_last * np.log(ratio), -1)])


@all_processes
def test_every_term_is_unbiased(process):
    """The mean of many draws is the quadrature, within four standard errors, for each token."""
    rows = 6000
    x = jnp.asarray(np.tile(TOKENS, (rows, 1)))
    bound = nelbo(process, x, 3, num_samples_t=4)
    for name, found, expected in zip(bound._fields, bound, exact_terms(process), strict=True):
        error = 4 * found.std(0) / np.sqrt(rows) + 5e-4 * np.abs(expected)
        assert np.all(np.abs(found.mean(0) - expected) < error), name


@pytest.mark.parametrize("name", ["hybrid 0.2", "masked"])
def test_bound_of_one_token_is_entropy_of_the_data(name):
    """With x_hat = p_data, whatever z_t: the exact terms here sum to -log p_data(x)."""
    process = PROCESSES[name]
    p = X_HAT[0]
    x = jnp.asarray(np.tile(TOKENS, (3000, 1)))

    def constant(z_t, t):
        del t
        return jnp.broadcast_to(jnp.asarray(TABLE[0], jnp.float32), (*z_t.shape, V + 2))

    total = nelbo(process, x, 1, num_samples_t=8, network=constant).total
    error = 4 * total.std(0) / np.sqrt(len(total)) + 2e-5
    # p_T is the noised average, not the noised data: the bound is above by at most its KL.
    slack = np.asarray(likelihood.prior_kl(process, x[0])) + 1e-4
    gap = total.mean(0) + np.log(p[TOKENS])
    assert np.all(gap > -error)
    assert np.all(gap < error + slack)


@pytest.mark.parametrize("num_samples", [1, 16])
def test_number_of_times_does_not_move_the_mean(num_samples):
    process = PROCESSES["hybrid 0.2"]
    x = jnp.asarray(np.tile(TOKENS, (9600 // num_samples, 1)))
    per_row = nelbo(process, x, 7, num_samples).middle.mean(1)
    expected = exact_terms(process)[1].mean()
    assert abs(per_row.mean() - expected) < 4 * per_row.std() / np.sqrt(len(per_row))


def unit_times(process, num_samples, num_rows, seed=0):
    """Times [S, N] mapped to the unit interval, float64."""
    times = likelihood.sample_times(process, jax.random.key(seed), num_samples, num_rows)
    return (np.asarray(times, np.float64) - process.t_min) / (process.t_max - process.t_min)


@pytest.mark.parametrize(("num_samples", "num_rows"), [(1, 1), (4, 8), (3, 7), (8, 1), (1, 60)])
def test_times_are_stratified_together_within_rows_and_within_batches(num_samples, num_rows):
    unit = unit_times(PROCESSES["hybrid 0.2"], num_samples, num_rows)
    # one in each stratum, counted from the first of them
    strata = (unit.ravel() - unit.min()) * num_samples * num_rows
    assert sorted(np.round(strata)) == list(range(num_samples * num_rows))
    np.testing.assert_allclose(strata, np.round(strata), atol=1e-3)
    assert np.all(np.diff(np.sort(unit, axis=0), axis=0) > 0.99 / num_samples - 1e-5)
    if num_rows == 60:  # any ten rows that follow each other leave no gap of three tenths
        for start in range(0, 51, 10):
            part = np.sort(unit[0, start : start + 10])
            assert np.diff([*part, part[0] + 1]).max() < 0.3


def test_times_are_uniform():
    """Over many keys each time covers the range evenly."""
    process = PROCESSES["hybrid 0.2"]
    draw = jax.jit(jax.vmap(lambda key: likelihood.sample_times(process, key, 2, 3)))
    times = np.asarray(draw(jax.random.split(jax.random.key(1), 4000)))
    counts = np.stack(
        [
            np.histogram(times[:, s, r], 10, (process.t_min, process.t_max))[0]
            for s in (0, 1)
            for r in range(3)
        ]
    )
    assert np.all(np.abs(counts - 400) < 5 * np.sqrt(400 * 0.9))


def test_given_tokens_stay_clean_and_cost_nothing():
    """Each other token then costs what it costs alone; the network sees the given ones clean."""
    process = PROCESSES["hybrid 0.5"]
    x = jnp.asarray(np.tile(TOKENS, (64, 1)))
    given = jnp.asarray(np.arange(5) < 2)[None].repeat(64, axis=0)
    keys = row_keys(jax.random.key(4), jnp.arange(64))

    def strict(z_t, t):
        return jnp.where(jnp.all(z_t[:, :2] == x[:, :2]), denoise(z_t, t), jnp.nan)

    @jax.jit
    def bounds(times):
        return (
            likelihood.nelbo_at(process, strict, keys, times, x, given=given),
            likelihood.nelbo_at(process, denoise, keys, times, x),
        )

    bound, free = bounds(likelihood.sample_times(process, jax.random.key(5), 2, 64))
    for term, alone in zip(bound, free, strict=True):
        np.testing.assert_array_equal(term[:, :2], 0.0)
        np.testing.assert_allclose(term[:, 2:], alone[:, 2:], rtol=1e-5, atol=1e-6)


def test_log_likelihood_of_a_row_does_not_depend_on_the_batch():
    """Nor on padding; its mean is the bound of the quadrature, given tokens left out."""
    process = PROCESSES["hybrid 0.2"]
    x = jnp.asarray(np.tile(TOKENS, (3000, 1)))
    free = jnp.broadcast_to(jnp.asarray(TOKENS != 1), x.shape)
    keys = row_keys(jax.random.key(8), jnp.arange(3000))

    @functools.partial(jax.jit, static_argnames="count")
    def score(keys, x, free, count=4):
        return likelihood.log_likelihood(process, denoise, keys, x, free, num_samples_t=count)

    scores = np.asarray(score(keys, x, free), np.float64)
    exact = exact_terms(process).sum(0)
    np.testing.assert_array_equal(scores[:, 1], 0.0)
    error = 4 * scores.std(0) / np.sqrt(3000)
    assert np.all(np.abs(scores.mean(0) + exact * (TOKENS != 1)) <= error)
    wide = jnp.pad(x[5:6], [(0, 0), (0, 3)]), jnp.pad(free[5:6], [(0, 0), (0, 3)])
    alone = np.asarray(score(keys[5:6], *wide))
    np.testing.assert_allclose(alone[0, :5], scores[5], rtol=1e-6)
    np.testing.assert_array_equal(alone[0, 5:], 0.0)


def rows_of(process, seed, x, mask, num_samples):
    """Jitted row_bounds with their times [S, B]."""
    keys = row_keys(jax.random.key(seed), jnp.arange(x.shape[0]))
    times = likelihood.sample_times(process, jax.random.key(seed + 1), num_samples, x.shape[0])
    original = likelihood.sample_times(process, jax.random.key(seed + 2), 1, x.shape[0])[0]
    bounds = jax.jit(functools.partial(likelihood.row_bounds, process, denoise))
    return bounds(keys, times, original, x, mask), np.asarray(times)


def test_row_bounds_leave_out_what_the_mask_hides():
    process = PROCESSES["hybrid 0.2"]
    x = jnp.asarray(_rng.choice(TOKENS, size=(6, 9)))
    lengths = np.array([9, 4, 0, 1, 9, 0])
    mask = np.arange(9)[None] < lengths[:, None]
    rows, times = rows_of(process, 0, x, jnp.asarray(mask), 3)
    np.testing.assert_array_equal(rows.tokens, lengths)
    assert rows.integrand.shape == times.shape == (3, 6)
    for row in (2, 5):
        assert all(values[row] == 0.0 for values in (*rows[:3], rows.original))
        assert not np.any(rows.integrand[:, row])
    # by token, from the same draws
    keys = row_keys(jax.random.key(0), jnp.arange(6))
    bound = likelihood.nelbo_at(process, denoise, keys, jnp.asarray(times), x)
    for found, by_token in zip(rows[:3], bound, strict=True):
        np.testing.assert_allclose(found, np.where(mask, by_token, 0).sum(1), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(rows.total, sum(np.asarray(v) for v in rows[:3]), rtol=1e-6)
    span = process.t_max - process.t_min
    np.testing.assert_allclose(rows.middle, rows.integrand.mean(0) * span, rtol=1e-6)


def test_original_estimate_is_the_middle_term_without_its_range():
    """Its mean over many rows is the mean of the integrand over t, not the integral."""
    process = PROCESSES["hybrid 0.2"]
    x = jnp.asarray(np.tile(TOKENS, (6000, 1)))
    rows, _ = rows_of(process, 3, x, jnp.ones(x.shape, bool), 1)
    nats, tokens = np.asarray(rows.original, np.float64), np.asarray(rows.tokens)
    figure = likelihood.original_estimate([nats], [tokens])
    expected = exact_terms(process)[1].mean() / (process.t_max - process.t_min)
    assert abs(figure - expected) < 4 * (nats / 5).std() / np.sqrt(6000)


def test_profile_follows_the_exact_integrand():
    """Bin by bin the mean over draws is the quadrature's mean; the bins average to the middle."""
    process = PROCESSES["hybrid 0.2"]
    num_rows = 6000
    x = jnp.asarray(np.tile(TOKENS, (num_rows, 1)))
    mask = jnp.ones(x.shape, bool).at[::2].set(False)  # rows that count nothing
    rows, times = rows_of(process, 6, x, mask, 4)
    integrand, tokens = np.asarray(rows.integrand, np.float64), np.asarray(rows.tokens)
    profile = likelihood.integrand_profile(process, times, integrand, tokens, 10)
    assert profile.tokens.sum() == 4 * 5 * num_rows // 2
    np.testing.assert_allclose(profile.tokens, 0.1 * profile.tokens.sum(), rtol=0.01)
    u, w = np.polynomial.legendre.leggauss(30)
    bins = zip(profile.edges[:-1], profile.edges[1:], profile.mean, strict=True)
    for low, high, mean in bins:
        t = low + (high - low) * (u + 1) / 2
        drawn = integrand[(times >= low) & (times < high) & (tokens > 0)[None]] / 5
        error = 4.5 * drawn.std() / np.sqrt(len(drawn))
        assert abs(mean - w @ exact_integrand(process, t).mean(1) / 2) < error
    middle = np.asarray(rows.middle, np.float64).sum() / tokens.sum()
    span = process.t_max - process.t_min
    assert profile.mean.mean() * span == pytest.approx(middle, rel=1e-3)


def test_empty_bins_of_a_profile_are_not_numbers():
    process = PROCESSES["hybrid 0.2"]
    profile = likelihood.integrand_profile(
        process, np.array([[0.1, process.t_max]]), np.array([[6.0, 8.0]]), np.array([3, 4]), 2
    )
    np.testing.assert_allclose(profile.mean, [2.0, 2.0])
    profile = likelihood.integrand_profile(
        process, np.array([[process.t_min]]), np.array([[6.0]]), np.array([3]), 2
    )
    np.testing.assert_array_equal(profile.mean, [2.0, np.nan])
    np.testing.assert_array_equal(profile.tokens, [3, 0])


def test_original_figure(golden):
    """Batch values and the final figures of the original's evaluation script."""
    arrays = golden("c08_eval_loss.npz")
    params = params_from_torch(golden("c05_dit_strong_state_dict.safetensors"), dit_format(4), 3)
    model = DiT(67, 64, num_layers=3, num_heads=4, cond_dim=32)
    process = HybridProcess(67, 66, 0.1)

    @functools.partial(jax.jit, static_argnames="weighting")
    def losses(x, z_t, t, weighting):
        with jax.default_matmul_precision("highest"):
            logits = model.apply({"params": params}, z_t, t)
        return gidd_loss(process, logits, x, z_t, t, weighting=weighting, keep_padding_columns=True)

    for theirs, ours in (("dynamic", "dynamic_v1_1"), ("none", "elbo")):
        nats, tokens = [], []
        for number in range(3):
            x, mask = (arrays[f"batch{number}/{k}"] for k in ("input_ids", "attention_mask"))
            z_t, t = (arrays[f"{theirs}/batch{number}/{k}"] for k in ("z_t", "t"))
            whole = [np.resize(a, (4, *a.shape[1:])) for a in (x, z_t, t)]  # the last has 2 rows
            found = losses(*whole, weighting=ours)
            loss, elbo = (np.asarray(v, np.float64)[: len(x)] for v in found[:2])
            nats.append((elbo * mask).sum(1))
            tokens.append(mask.sum(1))
            expected = arrays[f"{theirs}/per_batch"][number]
            assert loss.mean() == pytest.approx(expected[0], rel=2e-5)
            assert nats[-1].sum() / mask.sum() == pytest.approx(expected[3], rel=2e-5)
        elbo = likelihood.original_estimate(nats, tokens)
        assert elbo == pytest.approx(float(arrays[f"{theirs}/result_elbo"]), rel=2e-5)
        assert np.exp(elbo) == pytest.approx(float(arrays[f"{theirs}/result_ppl"]), rel=5e-5)
        # and not the mean over tokens, which the batches of unequal size tell apart
        assert elbo != pytest.approx(sum(map(np.sum, nats)) / sum(map(np.sum, tokens)), rel=1e-3)


def test_autoregressive_rows_are_exact(golden):
    arrays = golden("c06_ar.npz")
    params = params_from_torch(
        golden("c06_llama_state_dict.safetensors"),
        llama_format(Llama(67, 64, 2, 4).shape, False),
        2,
    )
    model = Llama(67, 64, num_layers=2, num_heads=4, max_seq_len=32)
    ids, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"]) > 0

    def predict(ids):
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, ids)

    rows = jax.jit(lambda ids: likelihood.autoregressive_row_bounds(predict, ids, mask))(ids)
    real = np.asarray(mask)[:, 1:]
    np.testing.assert_array_equal(rows.tokens, real.sum(1))
    expected = np.where(real, arrays["token_nll"], 0).sum(1)
    np.testing.assert_allclose(rows.total, expected, rtol=2e-6)
    figure = float(rows.total.sum() / rows.tokens.sum())
    assert figure == pytest.approx(float(arrays["loss_label_aligned_mask"]), rel=2e-6)
    assert rows.integrand.shape == (0, 3)
