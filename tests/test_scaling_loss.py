"""The scaling paper's loss: its code's numbers; times of positions in all processes and losses."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import PROCESSES

from gidd_jax.loss import gidd_loss, mdlm_loss
from gidd_jax.ops.fused_loss import fused_loss
from gidd_jax.process import LogSnrProcess, MaskedProcess
from gidd_jax.training.noising import Noised
from gidd_jax.training.objective import Objective
from gidd_jax.training.step import loss_and_grads

VOCAB, MASK = 97, 3
SHIFTS = (-1000, -2, 0, 2, 1000)
TRAINED = {"weighting": "dynamic", "max_weight": 1e3}  # the paper's training loss


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def rtol(request):
    """Run the test in float32 and under x64; gives the relative tolerance."""
    with jax.enable_x64(request.param):
        yield 1e-9 if request.param else 1e-5


def added_by_reference(process, logits, x, z_t, t):
    """What 1e-12 in the divisor of the reference's IS term adds to it, float64 [B, L]."""
    with jax.enable_x64(True):
        logits = jnp.asarray(logits, jnp.float64).at[..., MASK].set(-jnp.inf)
        t = jnp.asarray(t, jnp.float64)
        x_hat = jax.nn.softmax(logits)
        model, data = (
            jnp.take_along_axis(process.marginal_probs(p, t), z_t[..., None], -1)[..., 0]
            for p in (x_hat, jax.nn.one_hot(x, VOCAB, dtype=jnp.float64))
        )
        return np.where(data > 0, -1e-12 * data / (model * (model + 1e-12)), 0.0)


@pytest.mark.parametrize("shift", SHIFTS)
def test_loss_bound_and_gradients_are_the_references(golden_scaling, shift, rtol):
    """In float32 too the numbers are those in float64: the reference's own are 1e-3 off."""
    data = golden_scaling("s06_loss.npz")
    process = LogSnrProcess(VOCAB, MASK, shift=float(shift))
    x, z_t, noisy = data["labels"], data[f"z/shift{shift}"], data["noise_mask"]
    wide = np.float64 if rtol < 1e-6 else np.float32
    t = jax.nn.sigmoid(-jnp.asarray(data["log_snr"], wide))  # [B, L]

    def total(logits):
        terms = gidd_loss(process, logits, x, z_t, t, **TRAINED)
        return jnp.sum(jnp.where(noisy, terms.loss, 0.0)), terms

    logits = jnp.asarray(data["logits"], wide)
    grad, terms = jax.grad(total, has_aux=True)(logits)
    want = {key: data[f"shift{shift}/{key}/f64"] for key in ("per_token", "elbo_per_token")}
    weights = process.loss_weights(x, z_t, t, **TRAINED)
    added = np.asarray(weights * added_by_reference(process, data["logits"], x, z_t, t))
    # A float32 t near 1 holds alpha = 1 - t to 5e-4: there only float64 can be compared.
    exact = noisy & ((data["log_snr"] > -6) | (wide == np.float64))
    close = {"rtol": rtol, "atol": rtol / 10}
    np.testing.assert_allclose((terms.loss + added)[exact], want["per_token"][exact], **close)
    density = t * (1 - t)  # of the log-SNR
    elbo = terms.elbo + added / density
    np.testing.assert_allclose(elbo[exact], want["elbo_per_token"][exact], **close)
    golden_grad = data[f"shift{shift}/grad/f64"]  # kept as float32
    np.testing.assert_allclose(grad, golden_grad, rtol=1e-5, atol=1e-6 * np.abs(golden_grad).max())

    kl, is_div = (weights * part for part in (terms.kl, terms.is_div))
    is_div = is_div + added
    found = {
        "sum": kl + is_div,
        "sum_beta0.25": kl + 0.25 * is_div,
        "mean": (kl + is_div) / noisy.sum(),
        "metric_elbo": elbo / noisy.sum(),
        "metric_kl_loss": kl / noisy.sum(),
        "metric_is_loss": is_div / noisy.sum(),
    }
    for key, values in found.items():
        value = np.where(noisy, values, 0.0).sum()
        expected = data[f"shift{shift}/{key}/f64"]
        np.testing.assert_allclose(value, expected, rtol=rtol, atol=1e-11, err_msg=key)


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("shift", [-1000, 0, 1000])
def test_a_step_of_the_references_likelihood_is_our_bound_at_its_time(
    golden_scaling, shift, effective
):
    """Also at the effective time of its evaluation: the share of a row's completion that noise left
    as it was. Ours has the time of the noise."""
    data = golden_scaling("s09_jax_sampler_likelihood.npz")
    name = f"lik/shift{shift}"
    x, z_t, completion = data["lik/labels"], data[f"{name}/z"], data["lik/completion_mask"]
    log_snr = np.float64(0.4)
    if effective:
        kept = np.sum((z_t == x) & completion, axis=-1, keepdims=True) / completion.sum(-1)[:, None]
        with np.errstate(divide="ignore"):
            log_snr = np.clip(np.log(kept) - np.log1p(-kept), -9, 9)
    with jax.enable_x64(True):
        t = jnp.broadcast_to(1 / (1 + np.exp(log_snr)), x.shape)
        process = LogSnrProcess(VOCAB, MASK, shift=float(shift))
        logits = jnp.asarray(data["logits"], jnp.float64)
        found = gidd_loss(process, logits, x, z_t, t, weighting="elbo").elbo
        weights = process.loss_weights(x, z_t, t, weighting="elbo")
        found += weights * added_by_reference(process, data["logits"], x, z_t, t)
    want = data[f"{name}/eff{int(effective)}/elbo/f64"]
    assert np.any(want != 0)
    found = np.where(data["noise_mask"], found, 0.0)
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)


class Logits(nn.Module):
    """A network whose parameters are its logits."""

    vocab_size: int = VOCAB
    position_times: bool = True

    @nn.compact
    def features(self, ids, t):
        del t
        return self.param("logits", nn.initializers.zeros_init(), (*ids.shape, VOCAB))

    @nn.nowrap
    def output_weights(self, params):
        return jnp.eye(VOCAB), None


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_step_trains_on_the_references_sum_or_mean(golden_scaling, shift, aggregation):
    """By the fused loss, over noisy positions alone; metrics are means of both."""
    data = golden_scaling("s06_loss.npz")
    what = objective(LogSnrProcess(VOCAB, MASK, shift=float(shift)), Logits(), aggregation)
    batch = {"tokens": jnp.asarray(data["labels"]), "mask": jnp.ones((3, 7), bool)}
    t = jax.nn.sigmoid(-jnp.asarray(data["log_snr"]))
    noised = Noised(jnp.asarray(data[f"z/shift{shift}"]), t, jnp.asarray(~data["noise_mask"]))
    params = {"logits": jnp.asarray(data["logits"])}
    count = int(data[f"shift{shift}/metric_num_tokens"])
    grads, metrics = loss_and_grads(what, params, batch, noised, 1)
    want = data[f"shift{shift}/grad/f64"] / (count if aggregation == "mean" else 1)
    np.testing.assert_allclose(grads["logits"], want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
    np.testing.assert_allclose(metrics["loss"], data[f"shift{shift}/mean/f64"], rtol=1e-5)
    for name, key in (("elbo", "elbo"), ("kl", "kl_loss"), ("is_div", "is_loss")):
        expected = data[f"shift{shift}/metric_{key}/f64"]
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_micro_batches_are_one_batch_at_times_of_positions(golden_scaling, aggregation):
    data = golden_scaling("s06_loss.npz")
    what = objective(LogSnrProcess(VOCAB, MASK), Table(), aggregation)
    x = jnp.asarray(data["labels"][[0, 1, 2, 0]])
    batch = {"tokens": x, "mask": jnp.ones(x.shape, bool)}
    noised = Noised(
        jnp.asarray(data["z/shift0"][[0, 1, 2, 0]]),
        jax.nn.sigmoid(-jnp.asarray(data["log_snr"][[0, 1, 2, 0]])),
        jnp.asarray(~data["noise_mask"][[0, 1, 2, 0]]),
    )
    params = Table().init(jax.random.key(0), x, noised.t, method="features")["params"]
    whole, parts = (loss_and_grads(what, params, batch, noised, n) for n in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


class Table(Logits):
    """Logits by token, and by the time of the position."""

    @nn.compact
    def features(self, ids, t):
        table = self.param("table", nn.initializers.normal(1.0), (VOCAB, VOCAB))
        return table[ids] * (1 + t[..., None])


def objective(process, model: Any, aggregation: str) -> Objective:
    return Objective(
        model=model,
        process=process,
        weighting="dynamic",
        min_weight=0.0,
        max_weight=1e3,
        stratified=True,
        mask_padding=True,
        align_mask_to_input=False,
        keep_padding_columns=False,
        aggregation=aggregation,
    )


# Times of positions [B, L]: what a position has is what it has in a row at its time.


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


def case(process):
    """Tokens, noisy ones and times [3, 5], where each position has its own, and logits."""
    keys = jax.random.split(jax.random.key(8), 4)
    x = process.sample_background(keys[0], (3, 5))
    t = jax.random.uniform(keys[1], (3, 5), minval=0.05, maxval=0.95)
    return x, process.sample(keys[2], x, t), t, jax.random.normal(keys[3], (3, 5, 7))


def by_rows(function, t, *arrays):
    """The function of arrays [1, 1, ...] and a time [1], at each position, put together."""
    pieces = [
        [
            function(jnp.array([t[b, i]]), *(a[b : b + 1, i : i + 1] for a in arrays))
            for i in range(5)
        ]
        for b in range(3)
    ]
    return jax.tree.map(
        lambda *values: jnp.concatenate(values),
        *[jax.tree.map(lambda *values: jnp.concatenate(values, axis=1), *row) for row in pieces],
    )


def assert_close(found, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, want)


def test_losses_and_weights_at_times_of_positions_are_those_of_rows(process):
    x, z_t, t, logits = case(process)
    by_version = ("dynamic_v1_1",) if hasattr(process, "p_uniform") else ()
    for weighting in ("elbo", "clip", "dynamic", *by_version):

        def loss(t, logits, x, z_t, weighting=weighting):
            return gidd_loss(process, logits, x, z_t, t, weighting=weighting)

        assert_close(loss(t, logits, x, z_t), by_rows(loss, t, logits, x, z_t))
    if isinstance(process, MaskedProcess):

        def masked_loss(t, logits, x, z_t):
            return mdlm_loss(process, logits, x, z_t, t)

        found = masked_loss(t, logits, x, z_t)
        assert_close(found, by_rows(masked_loss, t, logits, x, z_t))
        assert np.any(np.asarray(found.loss) > 0)


def test_the_fused_loss_at_times_of_positions_is_the_plain_one(process):
    x, z_t, t, h = case(process)
    kernel = jax.random.normal(jax.random.key(9), (7, 7))
    coefficient = process.elbo_weights(x, z_t, t)

    def fused(h, kernel):
        found = fused_loss(
            process, h, kernel, None, x, z_t, t, coefficient, cross_entropy=False, vocab_size=7
        )
        return found[0]

    def plain(h, kernel):
        return jnp.sum(gidd_loss(process, h @ kernel, x, z_t, t, weighting="elbo").loss)

    found, want = (jax.value_and_grad(f, argnums=(0, 1))(h, kernel) for f in (fused, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), found, want)


def test_posteriors_and_transitions_at_times_of_positions_are_those_of_rows(process):
    _, z_t, t, logits = case(process)
    x_hat = jax.nn.softmax(logits.at[..., process.mask_id].set(-jnp.inf))

    def posterior(t, x_hat, z_t):
        return process.posterior_probs(x_hat, z_t, t, 0.6 * t)

    found = posterior(t, x_hat, z_t)
    assert_close(found, by_rows(posterior, t, x_hat, z_t))
    np.testing.assert_allclose(jnp.sum(found, axis=-1), 1, rtol=1e-5)

    def marginal(t, x_hat):
        return process.marginal_probs(x_hat, t)

    assert_close(marginal(t, x_hat), by_rows(marginal, t, x_hat))
    alpha, mass = process.transition(t, 0.6 * t)
    total = alpha + mass.mask + process.num_noise_tokens * mass.uniform
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_noise_at_times_of_positions_has_their_marginals(process):
    """40,000 draws of the same three positions, each at its own time."""
    x = jnp.broadcast_to(process.sample_background(jax.random.key(1), (1, 3)), (40_000, 3))
    t = jnp.broadcast_to(jnp.array([[0.1, 0.5, 0.9]]), x.shape)
    z_t = np.asarray(process.sample(jax.random.key(2), x, t))
    want = process.marginal_probs(jax.nn.one_hot(x[:1], 7), t[:1])[0]
    for i in range(3):
        frequencies = np.bincount(z_t[:, i], minlength=7) / len(z_t)
        np.testing.assert_allclose(frequencies, want[i], atol=0.0125)
