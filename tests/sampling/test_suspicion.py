"""Suspicion: exact posteriors of texts that can be enumerated, both methods, models, bad input."""

import dataclasses
import itertools

import exact_chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import tiny_model

from gidd_jax import Gidd
from gidd_jax.errors import InputError
from gidd_jax.evaluation import sampler_laws
from gidd_jax.evaluation.oracle import all_rows, chain_ids
from gidd_jax.process import HybridProcess, InterpolatingProcess, LogSnrProcess, MaskedProcess
from gidd_jax.sampling.options import SuspicionOptions
from gidd_jax.sampling.suspicion import expected_share, judge
from gidd_jax.sampling.times import row_times

V, L, MASK = 5, 3, 2
SKEWED = (0.1, 0.5, 0.0, 0.05, 0.35)
PROCESSES: dict[str, InterpolatingProcess] = {
    "hybrid": HybridProcess(V, MASK, p_uniform=0.3),
    "skewed": HybridProcess(V, MASK, p_uniform=0.3, background=SKEWED),
    "log-snr": LogSnrProcess(V, MASK, shift=0.5),
}
Z = np.array(list(itertools.product(range(V), repeat=L)), np.int32)  # every noisy text


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def joint_and_noise(process: InterpolatingProcess, t: float) -> tuple[np.ndarray, np.ndarray]:
    """p_data [V, V, V], correlated and without masks; q_t(z|x) [x, z] from its definition."""
    clean = [v for v in range(V) if v != MASK]
    p_data = np.zeros((V,) * L)
    p_data[np.ix_(*[clean] * L)] = np.random.default_rng(0).gamma(0.3, size=(V - 1,) * L)
    mass = process.beta_pi(t)
    background = np.where(np.arange(V) == MASK, 0.0, 1 / (V - 1))
    if process.background is not None:
        background = np.asarray(process.background)
    noise = float(mass.uniform) * (V - 1) * background
    noise[MASK] = float(mass.mask)
    return p_data / p_data.sum(), float(process.alpha(t)) * np.eye(V) + noise


def by_bayes(process: InterpolatingProcess, t: float) -> tuple[np.ndarray, np.ndarray]:
    """P(x_i = v | z) and P(x_i = v | z without position i), each [V^L, L, V], by enumeration."""
    p_data, noise = joint_and_noise(process, t)
    likelihoods = np.stack([noise[:, Z[:, i]].T for i in range(L)])  # [L, V^L, V]
    posterior, left_out = np.empty((len(Z), L, V)), np.empty((len(Z), L, V))
    for i in range(L):
        for out, factors in ((posterior, likelihoods.copy()), (left_out, likelihoods.copy())):
            if out is left_out:
                factors[i] = 1.0
            terms = np.einsum("abc,na,nb,nc->nabc", p_data, *factors)
            axes = tuple(1 + k for k in range(L) if k != i)
            out[:, i] = terms.sum(axes) / terms.sum((1, 2, 3))[:, None]
    return posterior, left_out


def network(table: np.ndarray):
    """A denoiser whose x_hat is a table over all texts."""
    log_table = jnp.log(jnp.asarray(table))
    return lambda z, t: log_table[(z[:, 0] * V + z[:, 1]) * V + z[:, 2]]


def assert_exact(got, posterior: np.ndarray) -> None:
    at_z = np.take_along_axis(posterior, Z[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(got.wrong, 1 - at_z, atol=1e-12)
    others = np.where(Z[..., None] == np.arange(V), 0.0, posterior)
    np.testing.assert_allclose(got.proposal_probs, others.max(-1), atol=1e-12)
    proposed = np.take_along_axis(others, np.asarray(got.proposals)[..., None], -1)[..., 0]
    np.testing.assert_allclose(proposed, others.max(-1), atol=1e-12)


@pytest.mark.parametrize("t", [0.01, 0.4])
@pytest.mark.parametrize("name", PROCESSES)
def test_one_pass_is_the_exact_posterior(float64, name, t):
    """With the minimiser of the bound as x_hat, for every noisy text of three tokens."""
    process = PROCESSES[name]
    posterior, left_out = by_bayes(process, t)
    got = judge(process, network(left_out), SuspicionOptions(t=t), jnp.asarray(Z))
    assert_exact(got, posterior)
    assert np.std(got.wrong) > 0.1
    # 1 - x_hat, without the evidence of the token itself, is something else.
    at_z = np.take_along_axis(left_out, Z[..., None], axis=-1)[..., 0]
    assert np.mean(np.abs((1 - at_z) - got.wrong)) > 0.05


@pytest.mark.parametrize("kind", ["posterior", "left out"])
@pytest.mark.parametrize("name", PROCESSES)
def test_leaving_one_out_is_exact_whatever_x_hat_says_about_tokens(float64, name, kind):
    """On a mask, the posterior and the minimiser of the bound are the same."""
    process, t = PROCESSES[name], 0.1
    posterior, left_out = by_bayes(process, t)
    table = posterior if kind == "posterior" else left_out
    options = SuspicionOptions(method="leave_one_out", t=t)
    assert_exact(judge(process, network(table), options, jnp.asarray(Z)), posterior)


@pytest.mark.parametrize("name", ["hybrid", "uniform", "own"])
def test_a_position_that_is_left_out_leaves_the_time_of_the_others_as_it_is(name):
    """The exact network, told one time a row: the mask says nothing, the others are noise of t."""
    process = exact_chain.PROCESSES[name]
    network = sampler_laws.exact_network(process, exact_chain.CHAIN, told="row")
    z = jnp.asarray(chain_ids(process)[all_rows(exact_chain.CHAIN, 4)])
    exact = judge(process, network, SuspicionOptions(t=0.1), z)
    left_out = judge(process, network, SuspicionOptions(method="leave_one_out", t=0.1), z)
    assert np.std(exact.wrong) > 0.01
    for leaf in ("wrong", "proposal_probs"):
        np.testing.assert_allclose(getattr(left_out, leaf), getattr(exact, leaf), atol=1e-5)


@pytest.mark.parametrize("process", [MaskedProcess(V, MASK), HybridProcess(V, MASK, p_uniform=0)])
def test_masks_alone_give_how_unexpected_a_token_is(float64, process):
    posterior, left_out = by_bayes(process, 0.1)
    options = SuspicionOptions(method="leave_one_out", t=0.1)
    assert_exact(judge(process, network(posterior), options, jnp.asarray(Z)), left_out)
    with pytest.raises(InputError, match=r"'one_pass' needs .* use method 'leave_one_out'"):
        judge(process, network(posterior), SuspicionOptions(), jnp.asarray(Z))


def test_certain_tokens_keep_small_probabilities_in_float32():
    """b = 4e-7 and p(z) within 1e-6 of 1: 1 - p(z) would have lost its digits."""
    process = HybridProcess(50_000, 0, p_uniform=0.1)
    logits = jnp.zeros((1, 1, 50_000)).at[0, 0, 7].set(25.0)
    got = judge(process, lambda z, t: logits, SuspicionOptions(), jnp.array([[7]]))
    t, others = 0.01, 49_998 * np.exp(-25.0)
    c = 0.1 / 0.9 * 2 * np.sqrt(t * (1 - t))
    rest, b = others / (1 + others), c / (1 + c) / 49_999
    exact = b * rest / ((1 - t) / (1 + c) * (1 - rest) + b)
    np.testing.assert_allclose(got.wrong[0, 0], exact, rtol=1e-4)


def test_the_prior_share_of_noise():
    process = HybridProcess(V, MASK, p_uniform=0.3, background=SKEWED)
    noise = joint_and_noise(process, 0.2)[1]
    kept = [v for v in range(V) if v != MASK]
    alpha = float(process.alpha(0.2))
    uniform = (noise - alpha * np.eye(V))[0, kept].sum()
    np.testing.assert_allclose(expected_share(process, 0.2), uniform / (uniform + alpha), rtol=1e-5)


# Models.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def model(folder) -> Gidd:
    return tiny_model(folder)


def test_texts_are_judged_as_they_are_alone(model):
    texts = ["It is a truth", "men"]
    got = model.suspicion(texts, batch_size=2)
    assert got.texts == texts
    assert got.network_calls == 1
    np.testing.assert_array_equal(got.judged.sum(-1), [13, 3])
    assert not got.judged[:, 0].any()  # the token that begins a text
    for name in ("wrong", "proposals", "proposal_probs"):
        assert not getattr(got, name)[~got.judged].any()
    assert np.all((got.wrong[got.judged] > 0) & (got.wrong[got.judged] < 1))
    assert np.all(got.proposal_probs <= got.wrong * (1 + 1e-5))
    assert not np.any((got.proposals == got.ids) & got.judged)
    alone = model.suspicion(texts[1:])
    assert alone.ids.shape == (1, 4)
    np.testing.assert_allclose(alone.wrong[0], got.wrong[1, :4], rtol=1e-4)
    np.testing.assert_array_equal(alone.proposals[0], got.proposals[1, :4])


def test_one_program_judges_what_the_network_says(model):
    """Against the network called by hand, in NumPy."""
    model = dataclasses.replace(model, row_mode="packed")  # a row that ends with its text
    got = model.suspicion(["men"], t=0.1)
    ids = jnp.asarray(got.ids)
    t = row_times(model.process, jnp.array([[0.0, 0.1, 0.1, 0.1]]))  # the first token is given
    logits = np.array(model.network.apply({"params": model.params}, ids, t, None), np.float64)
    logits = logits[0, :, : model.process.vocab_size]
    logits[:, model.tokenizer.mask_id] = -np.inf
    x_hat = np.exp(logits - logits.max(-1, keepdims=True))
    x_hat /= x_hat.sum(-1, keepdims=True)
    at_z = x_hat[np.arange(4), got.ids[0]]
    b, alpha = float(model.process.beta_pi(0.1).uniform), float(model.process.alpha(0.1))
    np.testing.assert_allclose(got.wrong[0, 1:], (b * (1 - at_z) / (alpha * at_z + b))[1:], 1e-3)


def test_masked_models_leave_one_out(folder):
    model = tiny_model(folder, "mdlm")
    with pytest.raises(InputError, match="use method 'leave_one_out'"):
        model.suspicion(["men"])
    got = model.suspicion(["men", "a wife"], method="leave_one_out")
    assert got.network_calls == 6  # the first token is given
    ids = got.ids.copy()
    ids[1, 3] = model.tokenizer.mask_id
    row = jnp.asarray(ids[1:])
    logits = model.network.apply({"params": model.params}, row, jnp.array([0.01]), None)
    logits = np.array(logits, np.float64)[0, 3, : model.process.vocab_size]
    logits[model.tokenizer.mask_id] = -np.inf
    x_hat = np.exp(logits - logits.max())
    x_hat /= x_hat.sum()
    np.testing.assert_allclose(got.wrong[1, 3], 1 - x_hat[got.ids[1, 3]], rtol=1e-4)


def test_bad_input_is_refused(model, folder):
    for call, message in (
        (lambda: model.suspicion([]), "texts is empty"),
        (lambda: model.suspicion("text"), "texts must be a list"),
        (lambda: model.suspicion(["a" * 16]), "text 1 has 16 tokens"),
        (lambda: model.suspicion(["a"], method="two_pass"), "unknown method 'two_pass'"),
        (lambda: model.suspicion(["a"], t=1.0), r"t must lie in \(0, 1\)"),
        (lambda: model.suspicion(["a"], time=0.1), "unknown option time"),
        (lambda: tiny_model(folder, "ar").suspicion(["a"]), "this one is autoregressive"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    params = jax.tree.map(lambda a: a * jnp.nan, model.params)
    with pytest.raises(InputError, match="not a number"):
        dataclasses.replace(model, params=params).suspicion(["a"])
