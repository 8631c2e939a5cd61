"""Forward processes against golden arrays, float64 definitions, identities and frequencies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import stats

from gidd_jax.errors import InputError
from gidd_jax.process import (
    HybridProcess,
    InterpolatingProcess,
    LogSnrProcess,
    MaskedProcess,
    NoiseMass,
)

# Settings of the golden files: (p_uniform, gamma, mask_id), 23 tokens.
GOLDEN_SETTINGS = {
    "pu0.0": (0.0, 1.0, 22),
    "pu0.1": (0.1, 1.0, 22),
    "pu0.2": (0.2, 1.0, 22),
    "pu0.5": (0.5, 1.0, 22),
    "pu0.1_g2": (0.1, 2.0, 22),
    "pu0.2_mid": (0.2, 1.0, 11),
}
# (shift, scale) of the log-SNR golden files, 23 tokens, mask 3.
LOG_SNR_SETTINGS = {
    "shift-1000_scale1": (-1000.0, 1.0),
    "shift0_scale1": (0.0, 1.0),
    "shift2_scale1": (2.0, 1.0),
    "shift1000_scale1": (1000.0, 1.0),
    "shift0.5_scale2": (0.5, 2.0),
}
IN_RANGE = slice(0, 37)  # the last two log-SNRs of the golden grid lie outside [-9, 9]

SKEWED = (0.05, 0.3, 0.0, 0.1, 0.02, 0.33, 0.2)  # over 7 tokens, mask 2
PROCESSES = {
    "hybrid": HybridProcess(7, 6, p_uniform=0.2),
    "hybrid-gamma2": HybridProcess(7, 2, p_uniform=0.5, gamma=2.0),
    "hybrid-gamma0.5": HybridProcess(7, 0, p_uniform=0.1, gamma=0.5),
    "hybrid-masks": HybridProcess(7, 6, p_uniform=0.0),
    "hybrid-skewed": HybridProcess(7, 2, p_uniform=0.4, background=SKEWED),
    "masked": MaskedProcess(7, 3),
    "log-snr": LogSnrProcess(7, 3, shift=0.0),
    "log-snr-uniform": LogSnrProcess(7, 6, shift=2.0),
    "log-snr-skewed": LogSnrProcess(7, 2, scale=0.5, shift=-1.0, background=SKEWED),
}
# float32 values, both ends included: what is tested is the arithmetic, not the rounding of t.
TIMES = np.float32([1e-4, 1e-3, 0.03, 0.25, 0.5, 0.8, 0.99, 0.999, 1 - 2e-4]).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class CosineProcess(InterpolatingProcess):
    """A schedule given by its two functions alone, as in the documentation of the module."""

    def alpha(self, t):
        return jnp.cos(0.5 * jnp.pi * t) ** 2

    def beta_pi(self, t):
        noise = jnp.sin(0.5 * jnp.pi * t) ** 2
        return NoiseMass(mask=0.9 * noise, uniform=0.1 * noise / (self.vocab_size - 1))


COSINE = CosineProcess(7, 5)
COSINE_ORACLE = oracle.Oracle(
    alpha=lambda t: np.cos(0.5 * np.pi * t) ** 2,
    noise=lambda t: oracle.mixture(
        COSINE, 0.9 * np.sin(0.5 * np.pi * t) ** 2, 0.1 * np.sin(0.5 * np.pi * t) ** 2
    ),
)


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def rtol(request):
    """Run the test in float32 and under x64; gives the relative tolerance."""
    with jax.enable_x64(request.param):
        yield 1e-10 if request.param else 2e-5


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


def golden_process(tag: str) -> HybridProcess:
    p_uniform, gamma, mask_id = GOLDEN_SETTINGS[tag]
    return HybridProcess(23, mask_id, p_uniform=p_uniform, gamma=gamma)


def case_ids(process: InterpolatingProcess, num_times: int) -> tuple[np.ndarray, np.ndarray]:
    """x, z_t [num_times, 4] with every kind of pair: kept, masked, and two replaced tokens."""
    tokens = [i for i in range(process.vocab_size) if i != process.mask_id]
    x = np.resize(tokens, (num_times, 1)) * np.ones((1, 4), int)
    others = np.array([[t for t in tokens if t != v][:2] for v in x[:, 0]])
    z_t = np.concatenate([x[:, :1], np.full((num_times, 1), process.mask_id), others], axis=1)
    return x, z_t


def distributions(process: InterpolatingProcess, rows: int, seed: int = 0) -> np.ndarray:
    """Random distributions over clean tokens, [rows, V]."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((rows, process.vocab_size))
    return oracle.softmax(logits, oracle.excluded_columns(process, process.vocab_size))


# Golden arrays of the original implementation.


@pytest.mark.parametrize("tag", GOLDEN_SETTINGS)
def test_hybrid_marginals_match_original(golden, tag, rtol):
    data, process = golden("c01_hybrid_process.npz"), golden_process(tag)
    t, want = data["t"], {k: data[f"{tag}/f64/{k}"] for k in ("alpha", "beta_pi", "log_B")}
    np.testing.assert_allclose(process.log_b, want["log_B"], rtol=1e-12)
    np.testing.assert_allclose(process.alpha(t), want["alpha"][:, 0], rtol=rtol)
    np.testing.assert_allclose(process.noise_probs(t), want["beta_pi"], rtol=rtol)
    for probs, suffix in (("prs", ""), ("prs_rounded", "_rounded")):
        got = process.marginal_probs(jnp.asarray(data[probs]), t)
        np.testing.assert_allclose(got, data[f"{tag}/f64/probs_at_t{suffix}"], rtol=rtol)
    prior = process.noise_probs(1.0)
    np.testing.assert_allclose(prior, np.exp(data[f"{tag}/f64/log_prior"]), atol=1e-12)


@pytest.mark.parametrize("tag", GOLDEN_SETTINGS)
def test_marginals_and_uniforms_give_the_original_draws(golden, tag):
    data, process = golden("c01_hybrid_process.npz"), golden_process(tag)
    with jax.enable_x64(True):
        onehot = jax.nn.one_hot(data["input_ids"], 23, dtype=jnp.float64)
        cumulative = np.array(process.marginal_probs(onehot, data["t"]).cumsum(-1))
    cumulative[..., -1] = 1 + 1e-4
    got = np.sum(cumulative <= data["uniforms"][..., None], axis=-1)
    np.testing.assert_array_equal(got, data[f"{tag}/f64/sample_zt"])


@pytest.mark.parametrize("bounds", [(0.0, 2.0), (0.25, 1.5)])
@pytest.mark.parametrize("tag", GOLDEN_SETTINGS)
def test_weights_match_original(golden, tag, bounds, rtol):
    data, process = golden("c02_loss_weights.npz"), golden_process(tag)
    x, z_t = data[f"{tag}/input_ids"], data[f"{tag}/z_t"]
    got = process.elbo_weights(x, z_t, data["t"])
    np.testing.assert_allclose(got, data[f"{tag}/f64/elbo_weights"], rtol=rtol)
    names = {"elbo": "none", "clip": "clip", "dynamic_v1_1": "dynamic"}
    for ours, theirs in names.items():
        got = process.loss_weights(
            x, z_t, data["t"], weighting=ours, min_weight=bounds[0], max_weight=bounds[1]
        )
        suffix = "0_2" if ours == "elbo" else f"{bounds[0]:g}_{bounds[1]:g}"  # no bounds there
        want = data[f"{tag}/f64/loss_weights_{theirs}_{suffix}"]
        # A target that is the mask does not occur in data; the original adds both indicators.
        columns = slice(0, 5) if ours == "dynamic_v1_1" else slice(0, 6)
        np.testing.assert_allclose(got[:, columns], want[:, columns], rtol=rtol)


@pytest.mark.parametrize("mask_id", [22, 11])
def test_masked_process_matches_original(golden, mask_id, rtol):
    data = golden("c04_mdlm.npz")
    name = f"mask{mask_id}/process/f64/"
    for eps in (1e-4, 1e-3):
        kept = data["t_grid"] > eps  # the original raises t to eps
        t, process = data["t_grid"][kept], MaskedProcess(23, mask_id, eps=eps)
        sigma, d_sigma = (data[f"sigmas/f64/{n}_eps{eps}"][kept] for n in ("sigma", "dsigma"))
        np.testing.assert_allclose(process.alpha(t), np.exp(-sigma), rtol=rtol)
        np.testing.assert_allclose(process.noise_rate(t).mask, d_sigma, rtol=rtol)
    kept = data["t_grid"] > 1e-4
    t, probs, process = data["t_grid"][kept], data["prs"][kept], MaskedProcess(23, mask_id)
    got = np.array(process.marginal_probs(jnp.asarray(probs), t))
    # The original overwrites the mask column by 1 - alpha; ours adds to what x_hat has there.
    got[..., mask_id] -= np.asarray(process.alpha(t))[:, None] * probs[..., mask_id]
    np.testing.assert_allclose(got, data[name + "probs_at_t"][kept], rtol=rtol)
    noisy = data["uniforms"][kept] < np.asarray(process.beta_pi(t).mask)[:, None]
    draws = np.where(noisy, mask_id, data[f"mask{mask_id}/sample_input_ids"][kept])
    np.testing.assert_array_equal(draws, data[name + "sample_zt"][kept])


@pytest.mark.parametrize("tag", LOG_SNR_SETTINGS)
def test_log_snr_process_matches_original_in_float64(golden, tag):
    data = golden("c10_easydel_schedule_loss.npz")
    shift, scale = LOG_SNR_SETTINGS[tag]
    process = LogSnrProcess(23, 3, shift=shift, scale=scale)
    x, z_t, probs = (data[k][IN_RANGE] for k in ("labels", "input_ids", "probs"))
    want = {
        k: data[f"{tag}/{k}/f64"][IN_RANGE]
        for k in ("alpha", "marginal_probs", "pi_lambda_at_ids", "loss_weights", "elbo_weights")
    }
    with jax.enable_x64(True):
        t = jax.nn.sigmoid(-data["log_snr"][IN_RANGE])
        np.testing.assert_allclose(process.log_snr(t), data["log_snr"][IN_RANGE], rtol=1e-10)
        np.testing.assert_allclose(process.alpha(t), want["alpha"], rtol=1e-10)
        got = process.marginal_probs(jnp.asarray(probs), t)
        np.testing.assert_allclose(got, want["marginal_probs"], rtol=1e-10)
        # The original clamps pi at 1e-8 inside the weights, which touches scale 2 only.
        free = (want["pi_lambda_at_ids"] > 1e-8) | (want["pi_lambda_at_ids"] == 0)
        assert free.all() == (scale == 1.0)
        got = process.loss_weights(x, z_t, t, weighting="dynamic", min_weight=-9, max_weight=9)
        np.testing.assert_allclose(
            np.where(free, got, 0), np.where(free, want["loss_weights"], 0), rtol=1e-10
        )
        got = process.elbo_weights(x, z_t, t)
        np.testing.assert_allclose(
            np.where(free, got, 0), np.where(free, want["elbo_weights"], 0), rtol=1e-10
        )


@pytest.mark.parametrize("tag", [t for t in LOG_SNR_SETTINGS if "1000" not in t])
def test_log_snr_process_in_float32(golden, tag):
    # t = sigmoid(-log_snr) near 1 is itself rounded (1 - t = 1e-4 to 3e-4 relative), so the golden
    # values belong to another t: the definition is evaluated at the rounded t instead.
    data = golden("c10_easydel_schedule_loss.npz")
    shift, scale = LOG_SNR_SETTINGS[tag]
    process = LogSnrProcess(23, 3, shift=shift, scale=scale)
    inside = slice(1, 36)  # the ends are at the clipping of the log-SNR
    t = np.asarray(jax.nn.sigmoid(-data["log_snr"][inside])).astype(np.float64)
    x, z_t, probs = (data[k][inside] for k in ("labels", "input_ids", "probs"))
    reference, rows = oracle.of(process), t[:, None] * np.ones((1, 4))
    np.testing.assert_allclose(process.alpha(t), reference.alpha(t), rtol=2e-5)
    got = process.marginal_probs(jnp.asarray(probs), t)
    np.testing.assert_allclose(got, reference.marginal(probs, t), rtol=2e-5)
    want = reference.weights(x, z_t, rows)
    np.testing.assert_allclose(process.elbo_weights(x, z_t, t), want, rtol=5e-5)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_log_snr_limits_are_masking_and_uniform(shift, rtol):
    process = LogSnrProcess(7, 3, shift=shift)
    mass = process.beta_pi(TIMES)
    noise, none = (mass.mask, mass.uniform) if shift < 0 else (6 * mass.uniform, mass.mask)
    t = np.clip(TIMES, process.t_min, process.t_max)
    np.testing.assert_allclose(noise, t, rtol=rtol)
    np.testing.assert_array_equal(none, 0.0)
    for loss in (process.elbo_weights, process.dynamic_weights):
        x, z_t = case_ids(process, len(TIMES))
        arguments = (x, z_t, TIMES) if loss == process.elbo_weights else (x, z_t, TIMES, False)
        assert np.isfinite(loss(*arguments)).all()


def test_sample_t_matches_original(golden, monkeypatch):
    data = golden("c08_utils.npz")
    names = {k.rsplit("/", 1)[0] for k in data if k.startswith("sample_t/")}
    assert len(names) == 16
    for name in sorted(names):
        batch_size, eps = (part[1:] for part in name.split("/")[1].split("_")[:2])
        process = HybridProcess(23, 22, p_uniform=0.1, t_eps=float(eps.removeprefix("ps")))
        uniforms = data[f"{name}/u"]
        with jax.enable_x64(True), monkeypatch.context() as patch:
            patch.setattr(jax.random, "uniform", lambda key, shape=(), u=uniforms: u.reshape(shape))
            got = process.sample_t(
                jax.random.key(0), int(batch_size), stratified=name.endswith("lowdisc")
            )
        np.testing.assert_allclose(got, data[f"{name}/t_f64"], rtol=1e-10)


# Definitions in float64, and identities.


def test_masses_and_weights_are_accurate_at_both_ends(process, rtol):
    reference = oracle.of(process)
    t = np.clip(TIMES, np.float32(process.t_min * 1.0001), np.float32(process.t_max * 0.9999))
    t = np.float32(t).astype(np.float64)
    x, z_t = case_ids(process, len(t))
    np.testing.assert_allclose(process.alpha(t), reference.alpha(t), rtol=rtol)
    np.testing.assert_allclose(process.noise_probs(t), reference.noise(t), rtol=rtol)
    log_snr = np.log(reference.alpha(t)) - np.log(1 - reference.alpha(t))
    np.testing.assert_allclose(process.log_snr(t), log_snr, rtol=rtol, atol=rtol)
    rows = t[:, None] * np.ones((1, 4))
    reachable = oracle.at(reference.noise(rows), z_t) + (z_t == x) > 0
    want = reference.weights(x[reachable], z_t[reachable], rows[reachable])
    got = np.asarray(process.elbo_weights(x, z_t, t))[reachable]
    np.testing.assert_allclose(got, want, rtol=rtol)


def test_closed_form_weights_equal_the_derivative(process):
    x, z_t = case_ids(process, len(TIMES))
    t = np.clip(TIMES, process.t_min * 1.0001, process.t_max * 0.9999)
    with jax.enable_x64(True):
        generic = InterpolatingProcess.elbo_weights(process, x, z_t, t)
        closed = np.asarray(process.elbo_weights(x, z_t, t))
    reachable = np.asarray(generic) != 0
    assert reachable.sum() >= len(TIMES)
    np.testing.assert_allclose(closed[reachable], generic[reachable], rtol=1e-9)


@pytest.mark.parametrize("weighting", ["elbo", "clip", "dynamic", "dynamic_v1_1"])
def test_dynamic_weights_of_the_paper(weighting, rtol):
    process = HybridProcess(9, 4, p_uniform=0.3, gamma=1.0)
    x, z_t = case_ids(process, len(TIMES))
    b = 2 * 0.3 / 0.7
    reference = oracle.of(process)
    alpha = reference.alpha(TIMES)[:, None]
    log_snr = np.log(alpha / (1 - alpha))
    elbo = reference.weights(x, z_t, TIMES[:, None] * np.ones((1, 4)))
    kinds = (z_t == x, z_t == 4)
    want = {
        "elbo": elbo,
        "clip": np.clip(elbo, 0.1, 1.7),
        "dynamic": np.select(kinds, (b / 8 * np.exp(-log_snr / 2), 2.0), 1.0).clip(0.1, 1.7),
        "dynamic_v1_1": np.select(
            kinds, (b / 9 * np.exp(0.5 / (1 + np.exp(TIMES[:, None]))), 2.0), 1.0
        ).clip(0.1, 1.7),
    }
    got = process.loss_weights(x, z_t, TIMES, weighting=weighting, min_weight=0.1, max_weight=1.7)
    np.testing.assert_allclose(got, want[weighting], rtol=rtol)


@pytest.mark.parametrize("step", [0.3, 1e-3, 1e-4])
def test_transitions_of_close_times_are_accurate(process, step, rtol):
    # the ends too: the difference that defines the noise cancels there in float32
    t = np.float32([2e-4 + step, 0.1 + step, 0.4 + step, 0.5, 0.9, 0.999]).astype(np.float64)
    s = np.float32(t - step).astype(np.float64)
    alpha_ts, mass = process.transition(t, s)
    want_alpha, want = oracle.of(process).transition(t, s)
    np.testing.assert_allclose(alpha_ts, want_alpha, rtol=min(rtol, 1e-5))
    got = process.mass_at(NoiseMass(*(m[:, None] for m in mass)), jnp.arange(7)[None])
    np.testing.assert_allclose(got, want, rtol=max(min(rtol, 1e-5), 1e-9), atol=1e-15)
    total = np.asarray(alpha_ts) + np.asarray(got).sum(axis=-1)
    np.testing.assert_allclose(total, 1.0, rtol=min(rtol, 1e-6))


def transition_matrices(process: InterpolatingProcess, t, s) -> np.ndarray:
    """q(z_t|z_s) [B, z_s, z_t]."""
    alpha_ts, mass = process.transition(t, s)
    ids = jnp.arange(process.vocab_size)[None]
    noise = process.mass_at(NoiseMass(*(m[:, None] for m in mass)), ids)
    stay = np.asarray(alpha_ts)[:, None, None] * np.eye(process.vocab_size)
    return stay + np.asarray(noise)[:, None, :]


def test_chapman_kolmogorov(process, rtol):
    # far apart, and close at the start and at the end
    r = np.float32([0.01, 0.3, 0.9]).astype(np.float64)
    s = np.float32([0.2, 0.301, 0.9001]).astype(np.float64)
    t = np.float32([0.7, 0.302, 0.9002]).astype(np.float64)
    s_r, t_s, t_r = (transition_matrices(process, *pair) for pair in ((s, r), (t, s), (t, r)))
    np.testing.assert_allclose(s_r @ t_s, t_r, rtol=max(rtol, 1e-9), atol=1e-15)
    clean = jnp.asarray(distributions(process, 12).reshape(3, 4, 7))
    at_s, at_t = (np.asarray(process.marginal_probs(clean, u)) for u in (s, t))
    np.testing.assert_allclose(at_s @ t_s, at_t, rtol=max(rtol, 1e-9))


def test_posterior_is_bayes_by_enumeration(process, rtol):
    vocab, reference = process.vocab_size, oracle.of(process)
    t, s = (np.float32(u).astype(np.float64) for u in ([0.02, 0.5, 0.97], [0.01, 0.1, 0.96]))
    x_hat = distributions(process, 3 * vocab).reshape(3, vocab, vocab)
    z_t = np.tile(np.arange(vocab), (3, 1))
    got = np.asarray(process.posterior_probs(jnp.asarray(x_hat), jnp.asarray(z_t), t, s))
    alpha_ts, noise = reference.transition(t, s)
    step = alpha_ts[:, None, None] * np.eye(vocab) + noise[:, None, :]  # [B, z_s, z_t]
    start = np.stack(
        [reference.marginal(np.eye(vocab), np.full(vocab, u)) for u in s]
    )  # [B, x, z_s]
    joint = np.einsum("bzx,bxs,bsz->bzs", x_hat, start, step)
    possible = joint.sum(-1) > 0  # a masking process never shows some tokens only if x_hat has none
    want = joint / np.where(possible, joint.sum(-1), 1)[..., None]
    np.testing.assert_allclose(got[possible], want[possible], rtol=3 * rtol, atol=rtol / 1000)
    np.testing.assert_allclose(got[possible].sum(-1), 1.0, rtol=rtol)


@pytest.mark.parametrize("name", ["hybrid-skewed", "masked", "log-snr"])
def test_time_may_vary_by_token_and_be_traced(name):
    process = PROCESSES[name]
    x, z_t = case_ids(process, 2)
    t = np.float32([[0.1, 0.4, 0.6, 0.9], [0.8, 0.3, 0.02, 0.5]])
    compiled = jax.jit(
        InterpolatingProcess.loss_weights, static_argnums=0, static_argnames="weighting"
    )
    got = compiled(process, x, z_t, t, weighting="elbo")
    onehot = jax.nn.one_hot(x, process.vocab_size)
    marginals = jax.jit(InterpolatingProcess.marginal_probs, static_argnums=0)(process, onehot, t)
    for column in range(4):
        rows = slice(column, column + 1)
        want = process.elbo_weights(x[:, rows], z_t[:, rows], t[:, column])
        np.testing.assert_allclose(got[:, rows], want, rtol=1e-6)
        want = process.marginal_probs(onehot[:, rows], t[:, column])
        np.testing.assert_allclose(marginals[:, rows], want, rtol=1e-6)


# Draws.


def chi_square_p(draws: np.ndarray, probs: np.ndarray) -> float:
    """p-value of the counts of token ids against exact probabilities; impossible ids fail."""
    counts = np.bincount(draws.ravel(), minlength=len(probs))
    assert len(counts) == len(probs)
    assert counts[probs == 0].sum() == 0
    if np.sum(probs > 0) == 1:
        return 1.0
    expected = probs[probs > 0] / probs.sum() * draws.size
    return float(stats.chisquare(counts[probs > 0], expected).pvalue)


@pytest.mark.parametrize("time", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("name", [*PROCESSES, "cosine"])
def test_samples_follow_the_marginal(name, time):
    process = PROCESSES.get(name, COSINE)
    reference = COSINE_ORACLE if name == "cosine" else oracle.of(process)
    x = np.array([v for v in range(7) if v != process.mask_id][:2])
    t = jnp.full((2,), time)
    z_t = np.asarray(process.sample(jax.random.key(7), jnp.tile(x[:, None], (1, 60_000)), t))
    for row, token in enumerate(x):
        probs = reference.marginal(np.eye(7)[token], np.float64(time))
        assert chi_square_p(z_t[row], np.where(probs < 1e-7, 0, probs)) > 1e-3
    # independent across positions and rows: the pairs of neighbours follow the product
    probs = reference.marginal(np.eye(7)[x], np.full(2, time))
    across = np.outer(*probs).ravel()
    if across.min() * 60_000 > 5:
        assert chi_square_p(z_t[0] * 7 + z_t[1], across) > 1e-3
    along = np.outer(probs[0], probs[0]).ravel()
    if along.min() * 30_000 > 5:
        assert chi_square_p(z_t[0, ::2] * 7 + z_t[0, 1::2], along) > 1e-3


def test_samples_follow_a_time_per_token():
    process = PROCESSES["hybrid"]
    t = jnp.tile(jnp.array([[0.2, 0.9]]), (30_000, 1))
    z_t = np.asarray(process.sample(jax.random.key(3), jnp.full((30_000, 2), 1), t))
    for column, time in enumerate((0.2, 0.9)):
        probs = oracle.of(process).marginal(np.eye(7)[1], np.float64(time))
        assert chi_square_p(z_t[:, column], probs) > 1e-3


def test_prior_samples_follow_the_prior(process):
    prior = process.prior()
    want = oracle.mixture(
        process, np.float64(prior.mask), np.float64(prior.uniform) * process.num_noise_tokens
    )
    np.testing.assert_allclose(want.sum(), 1.0, rtol=1e-6)
    noise = oracle.of(process).noise(np.float64(min(process.t_max, 1 - 1e-9)))
    np.testing.assert_allclose(want, noise / noise.sum(), atol=2e-2)
    draws = np.asarray(process.sample_prior(jax.random.key(11), (300, 200)))
    assert draws.dtype == np.int32
    assert chi_square_p(draws, want) > 1e-3


def test_background_is_sampled_as_given():
    probs = np.array(SKEWED)
    draws = np.asarray(PROCESSES["hybrid-skewed"].sample_background(jax.random.key(5), (90_000,)))
    assert chi_square_p(draws, probs) > 1e-3
    even = np.asarray(PROCESSES["masked"].sample_background(jax.random.key(5), (90_000,)))
    assert chi_square_p(even, oracle.token_distribution(PROCESSES["masked"])) > 1e-3


def test_stratified_times_fill_one_stratum_each(process):
    low, high = process.t_min, process.t_max
    keys = jax.random.split(jax.random.key(0), 400)
    t = np.asarray(jax.vmap(lambda key: process.sample_t(key, 16))(keys), np.float64)
    u = (t - low) / (high - low)
    assert u.min() > -1e-6
    assert u.max() < 1 + 1e-6
    # one shared offset: sorted times are 1/16 apart, each sequence by itself is uniform
    np.testing.assert_allclose(np.diff(np.sort(u, axis=1), axis=1), 1 / 16, atol=1e-5)
    assert stats.kstest(u[:, 0], "uniform").pvalue > 1e-3
    assert stats.kstest(u[:, 11], "uniform").pvalue > 1e-3


def test_independent_times_are_uniform():
    process = HybridProcess(7, 6, p_uniform=0.1, t_eps=0.05)
    t = np.asarray(process.sample_t(jax.random.key(2), 20_000, stratified=False))
    assert stats.kstest((t - 0.05) / 0.9, "uniform").pvalue > 1e-3
    assert np.diff(np.sort(t)).std() > 2e-5  # exponential gaps, not a grid


# A process from two functions, values and errors.


def test_a_process_of_two_functions_works(rtol):
    x, z_t = case_ids(COSINE, len(TIMES))
    rows = TIMES[:, None] * np.ones((1, 4))
    np.testing.assert_allclose(COSINE.noise_probs(TIMES), COSINE_ORACLE.noise(TIMES), rtol=rtol)
    got = np.asarray(COSINE.elbo_weights(x, z_t, TIMES))
    # cos^2 near t = 1 is known to the rounding of pi t / 2 only
    np.testing.assert_allclose(got[:-3], COSINE_ORACLE.weights(x, z_t, rows)[:-3], rtol=rtol)
    np.testing.assert_allclose(
        COSINE.loss_weights(x, z_t, TIMES, weighting="clip", max_weight=1.5),
        np.clip(got, 0, 1.5),
        rtol=rtol,
    )
    t, s = np.array([0.3, 0.7]), np.array([0.1, 0.6])
    alpha_ts, mass = COSINE.transition(t, s)
    want_alpha, want = COSINE_ORACLE.transition(t, s)
    np.testing.assert_allclose(alpha_ts, want_alpha, rtol=rtol)
    np.testing.assert_allclose(mass.mask, want[:, 5], rtol=rtol)
    np.testing.assert_allclose(mass.uniform, want[:, 0], rtol=rtol)
    x_hat = jnp.asarray(distributions(COSINE, 14).reshape(2, 7, 7))
    posterior = COSINE.posterior_probs(x_hat, jnp.tile(jnp.arange(7), (2, 1)), t, s)
    np.testing.assert_allclose(jnp.sum(posterior, axis=-1), 1.0, rtol=rtol)
    with pytest.raises(InputError, match="use 'elbo' or 'clip'"):
        COSINE.loss_weights(x, z_t, TIMES, weighting="dynamic")


def test_processes_are_hashable_values(process):
    same = dataclasses.replace(process)
    assert same == process
    assert hash(same) == hash(process)
    assert dataclasses.replace(process, t_eps=0.01) != process
    traces = []

    def alpha(p, t):
        traces.append(p)
        return p.alpha(t)

    compiled = jax.jit(alpha, static_argnums=0)
    np.testing.assert_allclose(compiled(process, 0.5), compiled(same, 0.5))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HybridProcess(1, 0, p_uniform=0.1), "at least 2"),
        (lambda: HybridProcess(5, 5, p_uniform=0.1), r"\[0, 5\)"),
        (lambda: HybridProcess(5, -1, p_uniform=0.1), r"\[0, 5\)"),
        (lambda: HybridProcess(5, 4, p_uniform=1.0), r"\[0, 1\)"),
        (lambda: HybridProcess(5, 4, p_uniform=-0.1), r"\[0, 1\)"),
        (lambda: HybridProcess(5, 4, p_uniform=float("nan")), r"\[0, 1\)"),
        (lambda: HybridProcess(5, 4, p_uniform=0.1, gamma=0.0), r"\(0, 2\]"),
        (lambda: HybridProcess(5, 4, p_uniform=0.1, gamma=2.01), r"\(0, 2\]"),
        (lambda: MaskedProcess(5, 4, eps=1.0), r"\[0, 1\)"),
        (lambda: MaskedProcess(5, 4, t_eps=0.5), r"\(0, 0.5\)"),
        (lambda: MaskedProcess(5, 4, t_eps=0.0), r"\(0, 0.5\)"),
        (lambda: LogSnrProcess(5, 4, scale=-1.0), "not be negative"),
        (lambda: LogSnrProcess(5, 4, min_log_snr=3.0, max_log_snr=3.0), "below max_log_snr"),
        (lambda: MaskedProcess(3, 2, background=(0.5, 0.4, 0.1)), "0 at the mask"),
        (lambda: MaskedProcess(3, 2, background=(0.5, 0.4, 0.0)), "sum to 1"),
        (lambda: MaskedProcess(3, 2, background=(1.0, 0.0)), "3 probabilities"),
        (lambda: MaskedProcess(3, 2, background=(1.5, -0.5, 0.0)), "3 probabilities"),
    ],
)
def test_illegal_parameters_name_the_legal_range(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_unknown_weightings_name_the_legal_ones():
    ids = jnp.zeros((1, 1), int)
    with pytest.raises(InputError, match="elbo, clip, dynamic, dynamic_v1_1"):
        MaskedProcess(3, 2).loss_weights(ids, ids, 0.5, weighting="none")
    with pytest.raises(InputError, match="use 'elbo' or 'clip'"):
        MaskedProcess(3, 2).loss_weights(ids, ids, 0.5, weighting="dynamic")
