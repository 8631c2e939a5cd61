"""Estimates of log p against the exact network of a Markov chain, whose log p is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_chain import CHAIN, FAMILIES, LENGTH, PROCESSES

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.evaluation import oracle, sampler_laws
from gidd_jax.sampling import estimators
from gidd_jax.sampling.options import EstimatorOptions


def draws(process, count=200, given=(), told="position", **options):
    """log w [K, count] of rows of the chain, and their exact log p given what is given."""
    x = oracle.draw_rows(CHAIN, process, count, LENGTH, seed=4)
    places = oracle.places_of(process, x)
    free = ~np.isin(np.arange(LENGTH), given) & np.ones(x.shape, bool)
    network = sampler_laws.exact_network(process, CHAIN, told)
    settings = EstimatorOptions(**options)
    run = jax.jit(lambda k: estimators.estimate(process, network, settings, k, x, free))
    found = np.asarray(run(row_keys(jax.random.key(5), jnp.arange(count))), np.float64)
    assert np.all(found[:, ~free] == 0)
    exact = oracle.log_prob(CHAIN, places)
    if given:
        rows, law = oracle.all_rows(CHAIN, LENGTH), oracle.law(CHAIN, LENGTH)
        known = list(given)
        same = (rows[None, :, known] == places[:, None, known]).all(-1)
        exact = exact - np.log((same * law).sum(-1))
    return found.sum(-1), exact


CHAINS = [{"chain_order": "left_to_right", "num_orders": 1}, {"num_orders": 3}]


# own: a tenth of the prior is tokens
@pytest.mark.parametrize("name", ["masks", "hybrid", "own", "log_snr"])
@pytest.mark.parametrize("options", CHAINS, ids=["left to right", "random"])
def test_every_order_of_the_chain_gives_the_exact_log_p(name, options):
    for given in ((), (1, 4)):
        found, exact = draws(FAMILIES[name], given=given, estimator="chain", **options)
        np.testing.assert_allclose(found, np.broadcast_to(exact, found.shape), atol=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_importance_falls_to_the_surprise_from_above(name):
    """More paths of the same row are tighter; many come to the entropy, within their error."""
    found, exact = draws(
        FAMILIES[name], estimator="importance", num_paths=64, path_steps=24, count=400
    )
    loose = [-estimators.log_mean_exp(found[:k]).mean() for k in (1, 4, 16, 64)]
    surprise = -exact.mean()
    error = (estimators.log_mean_exp(found) - exact).std() / np.sqrt(len(exact))
    assert loose == sorted(loose, reverse=True)
    # 24 steps of the sampler are not the model itself, but their law lacks less than the error.
    assert abs(loose[-1] - surprise) < 4 * error < 0.03
    assert loose[0] > loose[-1] + 0.02


@pytest.mark.parametrize("name", ["masks", "own"])
def test_the_weights_of_one_step_average_to_the_law_of_one_step(name):
    """One step draws every token from its marginal: the product is known."""
    process = PROCESSES[name]
    found, _ = draws(process, estimator="importance", num_paths=400, path_steps=1, count=60)
    x = oracle.places_of(process, oracle.draw_rows(CHAIN, process, 60, LENGTH, seed=4))
    marginals, law = [], CHAIN.start
    for _ in range(LENGTH):
        marginals.append(law)
        law = law @ CHAIN.moves
    want = np.log([[m[v] for m, v in zip(marginals, row, strict=True)] for row in x]).sum(-1)
    got = estimators.log_mean_exp(found)
    np.testing.assert_allclose(got, want, atol=0.15)
    assert abs((got - want).mean()) < 0.02


def test_given_tokens_condition_the_paths():
    found, exact = draws(
        PROCESSES["uniform"],
        given=(0, 3),
        estimator="importance",
        num_paths=64,
        path_steps=24,
        count=300,
    )
    difference = estimators.log_mean_exp(found) - exact
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(300) < 0.03


@pytest.mark.parametrize("given", [(), (0, 3)])
def test_the_bound_is_that_of_the_likelihood(given):
    found, exact = draws(
        PROCESSES["hybrid"], given=given, estimator="bound", num_samples_t=512, count=400
    )
    assert found.shape == (1, 400)
    difference = found[0] - exact
    # Few times carry most of the bound, so a row's estimate has a long tail.
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(400) < 0.3


def test_a_row_is_estimated_as_it_is_alone():
    process, x = PROCESSES["hybrid"], oracle.draw_rows(CHAIN, PROCESSES["hybrid"], 4, LENGTH, 1)
    free = jnp.asarray([[True] * 5, [False] * 4 + [True], [True] * 3 + [False] * 2, [True] * 5])
    network = oracle.leave_one_out(process, CHAIN)
    keys = row_keys(jax.random.key(5), jnp.arange(4))
    for name in ("chain", "importance"):
        options = EstimatorOptions(estimator=name)
        whole = estimators.estimate(process, network, options, keys, x, free)
        one = np.s_[1:2]
        alone = estimators.estimate(process, network, options, keys[one], x[one], free[one])
        np.testing.assert_allclose(whole[:, one], alone, rtol=1e-6)


def test_figures_say_what_they_bound():
    for options, count in ((EstimatorOptions(), 1), (EstimatorOptions(estimator="chain"), 2)):
        assert len(estimators.quantities(options)) == count
    exact = EstimatorOptions(estimator="chain", chain_order="left_to_right", num_orders=1)
    assert "exact" in estimators.quantities(exact)[0].says
    assert estimators.calls_per_row(exact, 7) == 7
    assert estimators.calls_per_row(EstimatorOptions(num_samples_t=4), 7) == 5
    paths = EstimatorOptions(estimator="importance", num_paths=3, path_steps=10)
    assert estimators.calls_per_row(paths, 7) == 33
    says = estimators.quantities(paths)[0].says
    assert says.endswith("with 10 steps, on the cosine grid and with a last draw of every token")
    assert estimators.log_mean_exp(np.log([[1.0, 0.0], [3.0, 0.0]])).tolist() == [
        pytest.approx(np.log(2)),
        -np.inf,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "pseudo"}, "unknown estimator 'pseudo': use one of bound, chain, import"),
        ({"estimator": "chain", "num_orders": 0}, "num_orders must be at least 1"),
        ({"num_paths": 3}, "num_paths has no effect with estimator 'bound'"),
        (
            {"estimator": "chain", "chain_order": "left_to_right"},
            "is one order: set num_orders to 1",
        ),
    ],
)
def test_options_that_are_none_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        EstimatorOptions(**options)


def test_estimators_that_a_process_does_not_have_are_refused():
    with pytest.raises(InputError, match="'chain' needs a process with masks"):
        estimators.check_estimator(PROCESSES["uniform"], EstimatorOptions(estimator="chain"))
    with pytest.raises(InputError, match="this model is autoregressive: its log p is exact"):
        estimators.check_estimator(None, EstimatorOptions(estimator="importance"))
