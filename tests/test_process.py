"""Forward processes against golden arrays, float64 definitions and identities.

Shapes repeat on purpose (33 times, 23 tokens): every operation is compiled once.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

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
IN_RANGE = np.r_[0:32, 36]  # 33 rows of the golden grid, whose log-SNRs lie in [-9, 9]

SKEWED = np.random.default_rng(0).dirichlet(np.ones(23))
SKEWED[2] = 0  # the mask
SKEWED = tuple(SKEWED / SKEWED.sum())
PROCESSES = {
    "hybrid": HybridProcess(23, 22, p_uniform=0.2),
    "hybrid-gamma2": HybridProcess(23, 2, p_uniform=0.5, gamma=2.0),
    "hybrid-gamma0.5": HybridProcess(23, 0, p_uniform=0.1, gamma=0.5),
    "hybrid-masks": HybridProcess(23, 22, p_uniform=0.0),
    "hybrid-skewed": HybridProcess(23, 2, p_uniform=0.4, background=SKEWED),
    "masked": MaskedProcess(23, 3),
    "log-snr": LogSnrProcess(23, 3, shift=0.0),
    "log-snr-uniform": LogSnrProcess(23, 22, shift=2.0),
    "log-snr-skewed": LogSnrProcess(23, 2, scale=0.5, shift=-1.0, background=SKEWED),
}
# float32 values, both ends included: what is tested is the arithmetic, not the rounding of t.
TIMES = oracle.float32_values(
    np.r_[1e-4, 2e-4, 1e-3, np.linspace(0.01, 0.99, 27), 0.999, 1 - 2e-4, 1 - 1e-4]
)


@dataclasses.dataclass(frozen=True)
class CosineProcess(InterpolatingProcess):
    """A schedule given by its two functions alone, as in the documentation of the module."""

    def alpha(self, t):
        return jnp.cos(0.5 * jnp.pi * t) ** 2

    def beta_pi(self, t):
        noise = jnp.sin(0.5 * jnp.pi * t) ** 2
        return NoiseMass(mask=0.9 * noise, uniform=0.1 * noise / (self.vocab_size - 1))


COSINE = CosineProcess(23, 5)
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


def case_ids(process: InterpolatingProcess) -> tuple[oracle.Array, oracle.Array]:
    """x, z_t [33, 6] with every kind of pair: kept, masked, and four replaced tokens."""
    tokens = np.array([i for i in range(process.vocab_size) if i != process.mask_id])
    first = np.arange(len(TIMES)) % len(tokens)
    x = np.repeat(tokens[first][:, None], 6, axis=1)
    others = tokens[(first[:, None] + np.array([1, 3, 6, 14])) % len(tokens)]
    z_t = np.concatenate([x[:, :1], np.full((len(TIMES), 1), process.mask_id), others], axis=1)
    return x, z_t


def per_token(t: oracle.Array) -> oracle.Array:
    """t [33] repeated to [33, 6]."""
    return np.repeat(t[:, None], 6, axis=1)


def inside(process: InterpolatingProcess) -> oracle.Array:
    """TIMES clipped to what the process draws (float32 values)."""
    t = np.clip(TIMES, process.t_min * (1 + 1e-6), process.t_max * (1 - 2e-7))
    return oracle.float32_values(t)


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
    columns = [0, 1, 2, 3, 0, 1]
    x, z_t = (data[k][IN_RANGE][:, columns] for k in ("labels", "input_ids"))
    want = {
        k: data[f"{tag}/{k}/f64"][IN_RANGE]
        for k in ("alpha", "marginal_probs", "pi_lambda_at_ids", "loss_weights", "elbo_weights")
    }
    for k in ("pi_lambda_at_ids", "loss_weights", "elbo_weights"):
        want[k] = want[k][:, columns]
    with jax.enable_x64(True):
        t = jax.nn.sigmoid(-data["log_snr"][IN_RANGE])
        np.testing.assert_allclose(process.log_snr(t), data["log_snr"][IN_RANGE], rtol=1e-10)
        np.testing.assert_allclose(process.alpha(t), want["alpha"], rtol=1e-10)
        probs = np.repeat(data["probs"][IN_RANGE][:, None], 2, axis=1)
        got = process.marginal_probs(jnp.asarray(probs), t)
        np.testing.assert_allclose(got[:, 0], want["marginal_probs"], rtol=1e-10)
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
    rows = slice(1, 34)  # the ends are at the clipping of the log-SNR
    t = np.asarray(jax.nn.sigmoid(-data["log_snr"][rows])).astype(np.float64)
    x, z_t = (data[k][rows][:, [0, 1, 2, 3, 0, 1]] for k in ("labels", "input_ids"))
    reference = oracle.of(process)
    np.testing.assert_allclose(process.alpha(t), reference.alpha(t), rtol=2e-5)
    np.testing.assert_allclose(process.noise_probs(t), reference.noise(t), rtol=2e-5)
    want = reference.weights(x, z_t, per_token(t))
    np.testing.assert_allclose(process.elbo_weights(x, z_t, t), want, rtol=2e-5)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_log_snr_limits_are_masking_and_uniform(shift, rtol):
    process = LogSnrProcess(23, 3, shift=shift)
    t = inside(process)
    mass = process.beta_pi(t)
    noise, none = (mass.mask, mass.uniform) if shift < 0 else (22 * mass.uniform, mass.mask)
    np.testing.assert_allclose(noise, t, rtol=rtol)
    np.testing.assert_array_equal(none, 0.0)
    x, z_t = case_ids(process)
    token = t[:, None] / 22
    kinds = (z_t == x, z_t == 3)
    if shift < 0:
        want = np.select(kinds, (0.0, 1.0), 0.0)
    else:
        want = np.select(kinds, (token / (token + 1 - t[:, None]), 0.0), 1.0)
    np.testing.assert_allclose(process.dynamic_weights(x, z_t, t, False), want, rtol=rtol)
    want = want / (t * (1 - t))[:, None]
    np.testing.assert_allclose(process.elbo_weights(x, z_t, t), want, rtol=rtol)


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
    reference, t = oracle.of(process), inside(process)
    x, z_t = case_ids(process)
    np.testing.assert_allclose(process.alpha(t), reference.alpha(t), rtol=rtol)
    np.testing.assert_allclose(process.noise_probs(t), reference.noise(t), rtol=rtol)
    log_snr = np.log(reference.alpha(t)) - np.log(1 - reference.alpha(t))
    np.testing.assert_allclose(process.log_snr(t), log_snr, rtol=rtol, atol=rtol)
    rows = per_token(t)
    reachable = oracle.at(reference.noise(rows), z_t) + (z_t == x) > 0
    want = reference.weights(x[reachable], z_t[reachable], rows[reachable])
    got = np.asarray(process.elbo_weights(x, z_t, t))[reachable]
    np.testing.assert_allclose(got, want, rtol=rtol)


def test_closed_form_weights_equal_the_derivative(process):
    (x, z_t), t = case_ids(process), np.clip(inside(process), 1.3e-4, 1 - 1.3e-4)
    with jax.enable_x64(True):
        generic = InterpolatingProcess.elbo_weights(process, x, z_t, t)
        closed = np.asarray(process.elbo_weights(x, z_t, t))
    reachable = np.asarray(generic) != 0
    assert reachable.sum() >= len(TIMES)
    np.testing.assert_allclose(closed[reachable], generic[reachable], rtol=1e-9)


@pytest.mark.parametrize("weighting", ["elbo", "clip", "dynamic", "dynamic_v1_1"])
def test_dynamic_weights_of_the_paper(weighting, rtol):
    process = HybridProcess(23, 4, p_uniform=0.3, gamma=1.0)
    x, z_t = case_ids(process)
    b = 2 * 0.3 / 0.7
    reference = oracle.of(process)
    alpha = reference.alpha(TIMES)[:, None]
    log_snr = np.log(alpha / (1 - alpha))
    elbo = reference.weights(x, z_t, per_token(TIMES))
    kinds = (z_t == x, z_t == 4)
    want = {
        "elbo": elbo,
        "clip": np.clip(elbo, 0.1, 1.7),
        "dynamic": np.select(kinds, (b / 22 * np.exp(-log_snr / 2), 2.0), 1.0).clip(0.1, 1.7),
        "dynamic_v1_1": np.select(
            kinds, (b / 23 * np.exp(0.5 / (1 + np.exp(TIMES[:, None]))), 2.0), 1.0
        ).clip(0.1, 1.7),
    }
    got = process.loss_weights(x, z_t, TIMES, weighting=weighting, min_weight=0.1, max_weight=1.7)
    np.testing.assert_allclose(got, want[weighting], rtol=rtol)


@pytest.mark.parametrize("name", ["hybrid-skewed", "masked", "log-snr"])
def test_time_may_vary_by_token_and_be_traced(name):
    process = PROCESSES[name]
    x, z_t = case_ids(process)
    onehot = jax.nn.one_hot(x, 23)
    t = np.stack([np.roll(inside(process), 5 * i) for i in range(6)], axis=1)

    @jax.jit
    def compiled(t):
        return process.elbo_weights(x, z_t, t), process.marginal_probs(onehot, t)

    weights, marginals = compiled(t)
    for column in range(6):
        want = process.elbo_weights(x, z_t, t[:, column])[:, column]
        np.testing.assert_allclose(weights[:, column], want, rtol=1e-5)
        want = process.marginal_probs(onehot, t[:, column])[:, column]
        np.testing.assert_allclose(marginals[:, column], want, rtol=1e-5)


# A process from two functions, values and errors.


def test_a_process_of_two_functions_works(rtol):
    x, z_t = case_ids(COSINE)
    t = np.clip(TIMES, 0, 0.98)  # cos^2 near t = 1 is known to the rounding of pi t / 2 only
    np.testing.assert_allclose(COSINE.alpha(t), COSINE_ORACLE.alpha(t), rtol=rtol)
    np.testing.assert_allclose(COSINE.noise_probs(t), COSINE_ORACLE.noise(t), rtol=rtol)
    elbo = COSINE_ORACLE.weights(x, z_t, per_token(t))
    np.testing.assert_allclose(COSINE.elbo_weights(x, z_t, t), elbo, rtol=rtol)
    clip = COSINE.loss_weights(x, z_t, t, weighting="clip", max_weight=1.5)
    np.testing.assert_allclose(clip, np.clip(elbo, 0, 1.5), rtol=rtol)
    # log_snr = log(cos^2 / sin^2), so that its derivative is -2 pi / sin(pi t).
    per_log_snr = elbo * np.sin(np.pi * per_token(t)) / (2 * np.pi)
    dynamic = COSINE.loss_weights(x, z_t, t, weighting="dynamic", max_weight=1e9)
    np.testing.assert_allclose(dynamic, per_log_snr, rtol=rtol, atol=rtol)
    with pytest.raises(InputError, match="use 'elbo', 'clip' or 'dynamic'"):
        COSINE.loss_weights(x, z_t, t, weighting="dynamic_v1_1")


def test_dynamic_weights_are_those_of_the_log_snr_family_where_both_are_defined():
    process = LogSnrProcess(23, 5, scale=0.5, shift=1.0)
    x, z_t = case_ids(process)
    t = np.clip(TIMES, 0.01, 0.99)
    want = process.dynamic_weights(x, z_t, t, v1_1=False)
    got = InterpolatingProcess.dynamic_weights(process, x, z_t, t, v1_1=False)
    np.testing.assert_allclose(got, want, rtol=1e-4)


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
    with pytest.raises(InputError, match="use 'elbo', 'clip' or 'dynamic'"):
        MaskedProcess(3, 2).loss_weights(ids, ids, 0.5, weighting="dynamic_v1_1")
