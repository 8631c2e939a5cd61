"""Losses against golden arrays, float64 definitions, finite gradients and properties.

Shapes repeat on purpose (the golden [3, 7] tokens, 23 or 128 columns): operations compile once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_process import COSINE, COSINE_ORACLE, GOLDEN_SETTINGS, LOG_SNR_SETTINGS, PROCESSES

from gidd_jax.errors import InputError
from gidd_jax.loss import (
    autoregressive_loss,
    gidd_loss,
    itakura_saito,
    masked_logits,
    mdlm_loss,
    token_mean,
)
from gidd_jax.process import HybridProcess, InterpolatingProcess, LogSnrProcess, MaskedProcess

WEIGHTINGS = {"dynamic": "dynamic_v1_1", "clip": "clip", "none": "elbo"}  # original's name: ours


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def rtol(request):
    """Run the test in float32 and under x64; gives the relative tolerance."""
    with jax.enable_x64(request.param):
        yield 1e-10 if request.param else 2e-5


def golden_process(tag: str) -> HybridProcess:
    p_uniform, gamma, mask_id = GOLDEN_SETTINGS[tag]
    return HybridProcess(23, mask_id, p_uniform=p_uniform, gamma=gamma)


def value_and_grad(loss, logits):
    """The loss terms and the gradient of the mean training loss by the logits."""

    def mean(logits):
        terms = loss(logits)
        return token_mean(terms.loss), terms

    (_, terms), grad = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(logits))
    return terms, np.asarray(grad)


def random_case(
    process: InterpolatingProcess, seed: int, scale: float = 2.0, middle: float = 0.4
) -> tuple[oracle.Array, ...]:
    """Logits [3, 7, 23], x, z_t (all kinds of pairs, only reachable ones) and t [3], both ends."""
    rng = np.random.default_rng(seed)
    tokens = [v for v in range(process.vocab_size) if v != process.mask_id]
    t = oracle.float32_values([process.t_min * 1.01, middle, process.t_max * 0.999])
    logits = oracle.float32_values(scale * rng.standard_normal((3, 7, process.vocab_size)))
    x = rng.choice(tokens, (3, 7))
    z_t = np.where(rng.random(x.shape) < 0.5, x, rng.choice(tokens, x.shape))
    if isinstance(process, MaskedProcess):
        z_t = x.copy()
    z_t = np.where(rng.random(x.shape) < 0.3, process.mask_id, z_t)
    return logits, x, z_t, t


# Golden arrays of the original implementation.


@pytest.mark.parametrize("kind", ["plain", "rounded", "sharp"])
@pytest.mark.parametrize("tag", GOLDEN_SETTINGS)
def test_gidd_loss_matches_original(golden, tag, kind, rtol):
    data, process = golden("c03_gidd_loss.npz"), golden_process(tag)
    logits = data["logits" if kind == "plain" else f"logits_{kind}"]
    x, z_t, t = data[f"{tag}/input_ids"], data[f"{tag}/z_t"], data["t"]
    mask = data[f"{tag}/attention_mask"] == 1
    for name in ("dynamic",) if kind == "sharp" else WEIGHTINGS:
        want = {
            key.rsplit("/", 1)[1]: value
            for key, value in data.items()
            if key.startswith(f"{tag}/{kind}/{name}/f64/")
        }
        terms, grad = value_and_grad(
            lambda values, weighting=WEIGHTINGS[name]: gidd_loss(
                process, values, x, z_t, t, weighting=weighting, keep_padding_columns=True
            ),
            logits,
        )
        # float32 rounds log(a/b) to 1e-7 absolute, which is all there is of small divergences
        floor = rtol / 10 * np.abs(want["loss_none"]).max()
        np.testing.assert_allclose(terms.loss, want["loss_none"], rtol=rtol, atol=floor)
        floor = rtol / 10 * np.abs(want["elbo"]).max()
        np.testing.assert_allclose(terms.elbo, want["elbo"], rtol=rtol, atol=floor)
        floor = rtol / 10 * np.abs(want["grad_logits"]).max()
        np.testing.assert_allclose(grad, want["grad_logits"], rtol=rtol, atol=floor)
        np.testing.assert_allclose(token_mean(terms.loss), want["loss_tokenmean"], rtol=rtol)
        weights = process.loss_weights(x, z_t, t, weighting=WEIGHTINGS[name])
        for ours, theirs in ((terms.kl, "metric_kl_loss"), (terms.is_div, "metric_is_loss")):
            metric = token_mean(weights * ours, mask) / token_mean(weights, mask)
            np.testing.assert_allclose(metric, want[theirs], rtol=rtol)
        np.testing.assert_allclose(token_mean(terms.elbo, mask), want["metric_elbo"], rtol=rtol)


def test_gidd_loss_of_a_masked_process_matches_original(golden, rtol):
    data, process = golden("c03_gidd_loss.npz"), MaskedProcess(23, 22)
    x, z_t = data["mdlm_process/input_ids"], data["mdlm_process/z_t"]
    terms, grad = value_and_grad(
        lambda logits: gidd_loss(process, logits, x, z_t, data["t"], weighting="elbo"),
        data["logits"],
    )
    # The original weighs this process as a hybrid with log B = -20: by 1/(t(1-t)) on masks, where
    # its own alpha asks for 1/(t alpha), and by less than 1e-6 elsewhere.
    t, on_mask = data["t"][:, None], z_t == 22
    factor = np.where(on_mask, np.asarray(process.alpha(t)) / (1 - t), 0.0)
    want = {k: data[f"mdlm_process/plain/none/f64/{k}"] for k in ("loss_none", "grad_logits")}
    np.testing.assert_allclose(factor * terms.loss, want["loss_none"], rtol=rtol, atol=1e-6)
    got = factor[..., None] * grad
    np.testing.assert_allclose(got, want["grad_logits"], rtol=rtol, atol=1e-6)
    mdlm, mdlm_grad = value_and_grad(
        lambda logits: mdlm_loss(process, logits, x, z_t, data["t"]), data["logits"]
    )
    np.testing.assert_allclose(mdlm.elbo, terms.elbo, rtol=rtol)
    np.testing.assert_allclose(mdlm.loss, terms.loss, rtol=rtol)
    np.testing.assert_allclose(mdlm.kl[on_mask], terms.kl[on_mask], rtol=rtol)
    np.testing.assert_allclose(mdlm_grad, grad, rtol=10 * rtol, atol=rtol)


@pytest.mark.parametrize("mask_id", [22, 11])
@pytest.mark.parametrize("kind", ["plain/z_t", "plain/z_t_corrupted", "rounded/z_t"])
def test_mdlm_loss_matches_original(golden, mask_id, kind, rtol):
    data, process = golden("c04_mdlm.npz"), MaskedProcess(23, mask_id)
    x, z_t = (data[f"mask{mask_id}/{k}"] for k in ("input_ids", kind.split("/")[1]))
    logits = data["logits_rounded" if kind.startswith("rounded") else "logits"]
    name = f"mask{mask_id}/{kind}/f64/"
    terms, grad = value_and_grad(
        lambda values: mdlm_loss(process, values, x, z_t, data["t"], keep_padding_columns=True),
        logits,
    )
    np.testing.assert_allclose(terms.loss, data[name + "loss_none"], rtol=rtol)
    np.testing.assert_allclose(terms.elbo, data[name + "elbo"], rtol=rtol)
    floor = rtol / 10 * np.abs(data[name + "grad_logits"]).max()
    np.testing.assert_allclose(grad, data[name + "grad_logits"], rtol=rtol, atol=floor)
    mask = data[f"mask{mask_id}/attention_mask"] == 1
    np.testing.assert_allclose(token_mean(terms.elbo, mask), data[name + "metric_elbo"], rtol=rtol)


@pytest.mark.parametrize("tag", LOG_SNR_SETTINGS)
def test_log_snr_loss_matches_original(golden, tag):
    data = golden("c10_easydel_schedule_loss.npz")
    shift, scale = LOG_SNR_SETTINGS[tag]
    process = LogSnrProcess(23, 3, shift=shift, scale=scale)
    columns = [0, 1, 2, 3, 4, 5, 0]  # seven tokens, as in the other tests
    x, z_t = (data[f"loss/{k}"][:, columns] for k in ("labels", "input_ids"))
    want = {
        k: data[f"{tag}/loss/{k}/f64"][:, columns] for k in ("loss", "elbo", "kl_loss", "is_loss")
    }
    with jax.enable_x64(True):
        t = jax.nn.sigmoid(-data["loss/log_snr"][:, columns])  # [B, L]: a time for every token
        terms, grad = value_and_grad(
            lambda logits: gidd_loss(
                process, logits, x, z_t, t, weighting="dynamic", max_weight=1e3
            ),
            data["loss/logits"][:, columns],
        )
        weights = process.loss_weights(x, z_t, t, max_weight=1e3)
    # The original adds 1e-12 to the divisor inside the IS term, clips the ELBO weights at 0, and
    # clamps pi at 1e-8 in the weights, which only a scale above 1 feels.
    rtol = 1e-5 if scale == 1.0 else 3e-4
    np.testing.assert_allclose(weights * terms.kl, want["kl_loss"], rtol=rtol, atol=1e-12)
    is_loss, token = np.asarray(weights * terms.is_div), z_t != 3
    np.testing.assert_allclose(is_loss[token], want["is_loss"][token], rtol=rtol, atol=2e-5)
    np.testing.assert_allclose(terms.loss, want["loss"], rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(np.maximum(terms.elbo, 0), want["elbo"], rtol=rtol, atol=1e-8)
    grad = grad[:, :6] * 21 / 18
    np.testing.assert_allclose(grad, data[f"{tag}/loss/grad_mean/jax_f64"], rtol=1e-6, atol=1e-10)


# The definition in float64.

ORACLES = {name: (process, oracle.of(process)) for name, process in PROCESSES.items()}
ORACLES["cosine"] = (COSINE, COSINE_ORACLE)
STEEP = LogSnrProcess(23, 1, scale=2.0, shift=0.5)
ORACLES["log-snr-scale2"] = (STEEP, oracle.of(STEEP))


def definition(process, reference, logits, x, z_t, t):
    """KL, IS and ELBO integrand [B, L] from dense vectors over the vocabulary."""
    probs = oracle.softmax(logits, oracle.excluded_columns(process, logits.shape[-1]))
    rows = t[:, None] * np.ones(x.shape)
    kl, is_div = reference.divergences(probs, x, z_t, rows)
    return kl, is_div, reference.weights(x, z_t, rows) * (kl + is_div)


@pytest.mark.parametrize("name", ORACLES)
def test_gidd_loss_equals_the_definition(name, rtol):
    process, reference = ORACLES[name]
    logits, x, z_t, t = random_case(process, seed=1)
    terms = gidd_loss(process, jnp.asarray(logits), x, z_t, t, weighting="elbo")
    kl, is_div, elbo = definition(process, reference, logits, x, z_t, t)
    # cos^2 near t = 1 is known to the rounding of pi t / 2, which float32 feels
    close = {"rtol": 2e-3 if name == "cosine" and rtol > 1e-6 else rtol, "atol": rtol / 100}
    np.testing.assert_allclose(terms.kl, kl, **close)
    noisy = oracle.at(reference.noise(t[:, None] * np.ones(x.shape)), z_t) > 0  # elsewhere weight 0
    np.testing.assert_allclose(terms.is_div[noisy], is_div[noisy], **close)
    floor = close["atol"] * np.abs(elbo).max()
    np.testing.assert_allclose(terms.elbo, elbo, rtol=close["rtol"], atol=floor)
    np.testing.assert_array_equal(terms.loss, terms.elbo)


@pytest.mark.parametrize("name", ["hybrid", "hybrid-skewed", "masked", "log-snr-uniform"])
def test_gradient_equals_finite_differences_of_the_definition(name):
    process, reference = ORACLES[name]
    logits, x, z_t, t = random_case(process, seed=2)
    weights = np.asarray(process.loss_weights(x, z_t, t, weighting="clip"))
    with jax.enable_x64(True):
        _, grad = value_and_grad(
            lambda values: gidd_loss(process, values, x, z_t, t, weighting="clip"), logits
        )
    step = 1e-5
    for column in range(process.vocab_size):
        shift = step * np.eye(process.vocab_size)[column]
        # tokens do not see each other, so all positions are shifted at once
        high, low = (
            sum(definition(process, reference, logits + sign * shift, x, z_t, t)[:2])
            for sign in (1, -1)
        )
        want = weights * (high - low) / (2 * step) / x.size
        np.testing.assert_allclose(grad[..., column], want, rtol=1e-5, atol=1e-8)


def test_mask_only_hybrid_is_mdlm(rtol):
    # Both bounds are -log x_hat_x / t on masks: of alpha = 1 - t and of alpha = 1 - (1 - eps) t.
    hybrid, masked = HybridProcess(23, 3, p_uniform=0.0), MaskedProcess(23, 3, eps=1e-3)
    logits, x, z_t, t = random_case(masked, seed=3)
    values = jnp.asarray(logits)
    mdlm = mdlm_loss(masked, values, x, z_t, t).elbo
    probs = oracle.softmax(logits, oracle.excluded_columns(masked, 23))
    want = np.where(z_t == 3, -np.log(oracle.at(probs, x)) / t[:, None], 0)
    np.testing.assert_allclose(mdlm, want, rtol=rtol)
    got = gidd_loss(hybrid, values, x, z_t, t, weighting="elbo").elbo
    np.testing.assert_allclose(got[z_t == 3], want[z_t == 3], rtol=2e-5)
    np.testing.assert_allclose(got[z_t != 3], 0.0, atol=1e-2)  # p_uniform is floored, not 0
    got = gidd_loss(masked, values, x, z_t, t, weighting="clip", max_weight=1e9)
    np.testing.assert_allclose(got.loss, want, rtol=rtol)


# Columns beyond the vocabulary.


@pytest.mark.parametrize("name", ["hybrid", "hybrid-skewed", "masked", "log-snr"])
def test_padding_columns_take_no_part(name, rtol):
    process, _ = ORACLES[name]
    logits, x, z_t, t = random_case(process, seed=4)
    padded = np.concatenate([logits, 5 + np.zeros((*x.shape, 105))], axis=-1)
    losses = [gidd_loss] if name != "masked" else [gidd_loss, mdlm_loss]
    for loss in losses:
        options = {"weighting": "clip"} if loss is gidd_loss else {}

        def terms_of(values, loss=loss, options=options, **more):
            return loss(process, values, x, z_t, t, **options, **more)

        want, want_grad = value_and_grad(terms_of, logits)
        got, grad = value_and_grad(terms_of, padded)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 100)
        np.testing.assert_allclose(grad[..., :23], want_grad, rtol=rtol, atol=rtol / 100)
        np.testing.assert_array_equal(grad[..., 23:], 0.0)
        np.testing.assert_array_equal(grad[..., process.mask_id], 0.0)
        kept = terms_of(jnp.asarray(padded), keep_padding_columns=True)
        on_mask = z_t == process.mask_id
        assert (np.asarray(kept.kl)[on_mask] > np.asarray(want.kl)[on_mask]).all()
    columns = np.isneginf(masked_logits(process, jnp.asarray(padded)))
    assert (columns == oracle.excluded_columns(process, 128)).all()


# Extreme logits.


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("scale", [30.0, 3000.0])
def test_gradients_of_extreme_logits_are_finite_and_right(name, scale):
    process = PROCESSES[name]
    logits, x, z_t, t = random_case(process, seed=5, scale=scale)
    logits = np.asarray(jnp.asarray(logits, jnp.bfloat16)).astype(np.float64)

    def loss(values):
        return gidd_loss(process, values, x, z_t, t, weighting="clip")

    terms, grad = value_and_grad(loss, jnp.asarray(logits, jnp.bfloat16))
    assert terms.loss.dtype == jnp.float32
    exact = oracle.softmax(logits, oracle.excluded_columns(process, 23))
    assert (oracle.at(exact, x) < 1e-38).any()  # the case is extreme
    _, grad32 = value_and_grad(loss, logits)
    with jax.enable_x64(True):
        want, want_grad = value_and_grad(loss, logits)
    assert np.isfinite(want_grad).all()
    for a, b in ((terms.loss, want.loss), (terms.elbo, want.elbo), (terms.kl, want.kl)):
        np.testing.assert_allclose(a, b, rtol=5e-5, atol=1e-5)
    floor = max(np.abs(want_grad).max(), 1e-30)
    np.testing.assert_allclose(grad32, want_grad, rtol=1e-3, atol=1e-5 * floor)
    np.testing.assert_allclose(grad.astype(np.float64), want_grad, rtol=1e-2, atol=1e-2 * floor)


@pytest.mark.parametrize("gap", [3.0, 8.0, 14.0])
def test_small_divergences_keep_their_accuracy(gap):
    process = PROCESSES["hybrid"]
    _, x, z_t, t = random_case(process, seed=6)
    logits = gap * np.eye(23)[x]
    terms = gidd_loss(process, jnp.asarray(logits), x, z_t, t, weighting="elbo")
    with jax.enable_x64(True):
        want = gidd_loss(process, jnp.asarray(logits), x, z_t, t, weighting="elbo")
    np.testing.assert_allclose(terms.is_div, want.is_div, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(terms.kl, want.kl, rtol=1e-3, atol=2e-7)


def test_itakura_saito_is_accurate(rtol):
    d = np.array([1e-6, 1e-4, 0.01, 0.2, 0.2499, 0.2501, 0.5, 2.0, 20.0, 60.0])
    d = oracle.float32_values(np.concatenate([-d, d, [0.0]])).reshape(3, 7)
    series, term = np.zeros_like(d), d.copy()
    for k in range(2, 30):
        term = term * d / k
        series += term
    want = np.where(np.abs(d) < 1, series, np.exp(d) - d - 1)
    np.testing.assert_allclose(itakura_saito(jnp.asarray(d)), want, rtol=rtol / 10)
    assert jax.grad(itakura_saito)(0.0) == 0


# Properties.


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["hybrid", "hybrid-skewed", "masked", "log-snr-uniform"]),
    logits=arrays(np.float32, (3, 7, 23), elements=st.floats(-60, 60, width=32)),
    seed=st.integers(0, 2**16),
    time=st.floats(2e-4, 1 - 2e-4),
)
def test_divergences_are_not_negative_and_vanish_for_the_truth(name, logits, seed, time):
    process = PROCESSES[name]
    _, x, z_t, t = random_case(process, seed=seed, middle=time)
    terms = gidd_loss(process, jnp.asarray(logits), x, z_t, t, weighting="elbo")
    assert (np.asarray(terms.kl) >= -1e-6).all()
    assert (np.asarray(terms.is_div) >= 0).all()
    assert np.isfinite(terms.elbo).all()
    truth = np.where(np.eye(23)[x] == 1, 0.0, -np.inf).astype(np.float32)
    terms = gidd_loss(process, jnp.asarray(truth), x, z_t, t, weighting="elbo")
    np.testing.assert_allclose(terms.kl, 0.0, atol=1e-6)
    np.testing.assert_array_equal(terms.is_div, 0.0)


# The baseline, and reductions.


def test_autoregressive_loss_is_the_cross_entropy_of_the_next_token(rtol):
    rng = np.random.default_rng(0)
    logits, ids = 3 * rng.standard_normal((2, 5, 11)), rng.integers(0, 11, (2, 5))
    logits = oracle.float32_values(logits)
    probs = oracle.softmax(logits, np.zeros(11, bool))
    want = np.stack([-np.log(oracle.at(probs[:, i], ids[:, i + 1])) for i in range(4)], axis=1)
    got = autoregressive_loss(jnp.asarray(logits), jnp.asarray(ids))
    np.testing.assert_allclose(got, want, rtol=rtol)
    assert (
        autoregressive_loss(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(ids)).dtype
        == jnp.float32
    )


def test_token_mean_counts_the_positions_of_the_mask():
    values = jnp.array([[1.0, 2.0, 4.0], [8.0, jnp.inf, 32.0]])
    mask = jnp.array([[True, False, True], [True, False, False]])
    assert token_mean(values[:, :1]) == 4.5
    np.testing.assert_allclose(token_mean(values, mask), 13 / 3, rtol=1e-6)
    assert token_mean(values, jnp.zeros((2, 3), bool)) == 0


def test_unknown_weighting_is_refused():
    process, _ = ORACLES["hybrid"]
    logits, x, z_t, t = random_case(process, seed=7)
    with pytest.raises(InputError, match="'none': choose one of elbo, clip"):
        gidd_loss(process, jnp.asarray(logits), x, z_t, t, weighting="none")
