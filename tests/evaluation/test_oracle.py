"""The exact network of a Markov chain, by enumeration; and every sampler measured against it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_chain import CHAIN, FAMILIES, LENGTH, PROCESSES
from scipy import stats

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.evaluation import oracle, sampler_laws
from gidd_jax.process import MaskedProcess
from gidd_jax.sampling import methods
from gidd_jax.sampling.loop import Prompt, sample_diffusion, weights_of
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.sampling.schedule import make_schedule
from gidd_jax.sampling.thinning import network_at

pytestmark = pytest.mark.usefixtures("compile_well")  # they run for long
ROWS = 20_000
FLOOR = oracle.noise_floor(oracle.law(CHAIN, LENGTH), ROWS)
BORDER = (CHAIN.start @ CHAIN.moves)[:, None] * CHAIN.moves  # the law of the tokens 1 and 2


def drawn(process, options, prompt=None, told="position", rows=ROWS, seed=0):
    """Rows of chain numbers [rows, LENGTH] that a method draws with the exact network."""
    network = sampler_laws.exact_network(process, CHAIN, told)
    run = jax.jit(lambda k, p: sample_diffusion(process, network, options, k, LENGTH, p).ids)
    ids = run(row_keys(jax.random.key(seed), jnp.arange(rows)), prompt)
    return oracle.places_of(process, np.asarray(ids))


def distance(process, told="position", **options):
    rows = drawn(process, SamplerOptions(**options), told=told)
    return oracle.total_variation(oracle.frequencies(CHAIN, rows), oracle.law(CHAIN, LENGTH))


# The oracle itself.


@pytest.mark.parametrize("name", PROCESSES)
def test_the_network_is_the_leave_one_out_prior(name):
    """Every noisy row of three tokens, by Bayes over all clean rows; one position at time 0."""
    process, times = PROCESSES[name], np.array([0.3, 0.0, 0.7])
    ids = oracle.chain_ids(process)
    rows = oracle.all_rows(CHAIN, 3)
    prior = np.exp(oracle.log_prob(CHAIN, rows))
    z = np.array(list(itertools.product(range(4), ids, range(4))))
    network = oracle.leave_one_out(process, CHAIN)
    got = np.exp(network(jnp.asarray(z), jnp.broadcast_to(jnp.float32(times), z.shape)))
    assert np.all(got[..., process.mask_id] == 0)
    alpha, mass = (np.array(a) for a in (process.alpha(times), process.noise_probs(times)))
    alpha[1], mass[1] = 1.0, 0.0
    for row, found in zip(z, got, strict=True):
        evidence = alpha * (ids[rows] == row) + mass[np.arange(3), row]
        for i in range(3):
            weights = prior * np.delete(evidence, i, axis=1).prod(axis=1)
            want = np.bincount(rows[:, i], weights, minlength=3) / weights.sum()
            np.testing.assert_allclose(found[i][ids], want, atol=2e-6)


def test_figures_of_the_chain_are_those_of_its_rows():
    rows, law = oracle.all_rows(CHAIN, 4), oracle.law(CHAIN, 4)
    assert law.sum() == pytest.approx(1)
    assert oracle.entropy(CHAIN, 4) == pytest.approx(-np.sum(law * np.log(law)))
    pairs = sum(
        np.bincount(3 * rows[:, i] + rows[:, i + 1], law, minlength=9) for i in range(3)
    ).reshape(3, 3)
    np.testing.assert_allclose(oracle.bigram_law(CHAIN, 4), pairs / 3)
    process = PROCESSES["hybrid"]
    ids = oracle.draw_rows(CHAIN, process, 50_000, 4, seed=3)
    places = oracle.places_of(process, ids)
    found = oracle.frequencies(CHAIN, places)
    floor = oracle.noise_floor(law, 50_000)
    assert 0.8 * floor < oracle.total_variation(found, law) < 1.2 * floor
    assert oracle.total_variation(oracle.bigrams(CHAIN, places), pairs / 3) < 0.005
    given = np.array([-1, 2, -1, -1])
    conditional = np.where(rows[:, 1] == 2, law, 0)
    np.testing.assert_allclose(oracle.law(CHAIN, 4, given), conditional / conditional.sum())


def test_what_is_no_chain_is_refused():
    with pytest.raises(InputError, match="probabilities that sum to 1"):
        oracle.leave_one_out(PROCESSES["masks"], oracle.Chain(np.ones(3), np.ones((3, 3))))
    with pytest.raises(InputError, match="the chain has 3 tokens and the process 6"):
        oracle.leave_one_out(MaskedProcess(7, 6), CHAIN)


# Samplers.


@pytest.mark.parametrize("name", FAMILIES)
def test_the_error_of_ancestral_steps_falls_as_one_over_their_number(name):
    """A quarter for four times the steps, beyond what exact draws have."""
    few, many = (distance(FAMILIES[name], num_steps=n) for n in (6, 24))
    beyond = [np.sqrt(max(d**2 - FLOOR**2, 0)) for d in (few, many)]
    assert few > 3 * FLOOR
    assert 0.12 < beyond[1] / beyond[0] < 0.42


ONE_A_CALL = [
    ("masks", {"method": "first_hitting"}),
    *((name, {"method": "confidence", "num_steps": LENGTH}) for name in ("masks", "hybrid")),
    *(
        (name, {"method": "entropy_bound", "epsilon": 0.0, "num_steps": LENGTH})
        for name in PROCESSES
    ),
    *((name, {"method": "adaptive", "num_steps": n}) for name in PROCESSES for n in (5, 15)),
]


@pytest.mark.parametrize(("name", "options"), ONE_A_CALL, ids=str)
def test_one_token_a_call_has_no_error(name, options):
    assert distance(PROCESSES[name], **options) < 1.15 * FLOOR


def test_keeping_what_is_probable_has_a_floor_and_the_papers_rule_seeks_the_mode():
    masks, hybrid = PROCESSES["masks"], PROCESSES["hybrid"]
    assert distance(masks, method="confidence", order="drawn", num_steps=5) > 0.5
    few, many = (distance(hybrid, method="mode_seeking", num_steps=n) for n in (5, 40))
    assert few + 0.2 < many
    assert distance(masks, method="mode_seeking", num_steps=5) < 1.15 * FLOOR


def test_a_network_that_knows_one_time_a_row_takes_clean_tokens_for_noise():
    """Under masks alone it makes no difference; under hybrid noise it is a floor."""
    options = {"method": "confidence", "num_steps": LENGTH}
    assert distance(PROCESSES["masks"], told="row", **options) < 1.15 * FLOOR
    assert distance(PROCESSES["hybrid"], told="row", **options) > 3 * FLOOR
    # Rounds at falling times take it away: they once went on to the mode.
    assert distance(PROCESSES["hybrid"], told="row", method="adaptive", num_steps=80) < 1.2 * FLOOR


GIVEN = np.array([-1, 2, -1, -1, 0])  # numbers of the chain's tokens


def beside_given(name, told, **options):
    """Total variation to the conditional law beside GIVEN, and that of exact draws."""
    process = PROCESSES[name]
    ids = np.where(GIVEN < 0, 0, oracle.chain_ids(process)[GIVEN])
    shape = (ROWS, LENGTH)
    free = jnp.broadcast_to(jnp.asarray(GIVEN < 0), shape)
    prompt = Prompt(jnp.broadcast_to(jnp.asarray(ids, jnp.int32), shape), free)
    rows = drawn(process, SamplerOptions(**options), prompt, told)
    law = oracle.law(CHAIN, LENGTH, GIVEN)
    found = oracle.total_variation(oracle.frequencies(CHAIN, rows), law)
    return found, oracle.noise_floor(law, ROWS)


STEPS = 60  # those leave an error of 1/N, twice the floor at most; one token a call leaves none
EXACT = ("first_hitting", "confidence", "entropy_bound:epsilon=0", "adaptive")


def samplers(name):
    """Every method that samples the process, with its options."""
    legal = sampler_laws.parse_methods(sampler_laws.legal_methods(PROCESSES[name]))
    for item, options in legal.items():
        samples = sampler_laws.claims_to_sample(PROCESSES[name], "position", options)
        if samples or item in ("psi", "gibbs"):
            yield item, options


CONDITIONAL = [
    pytest.param(name, item, options, id=f"{name}-{item}")
    for name in PROCESSES
    for item, options in samplers(name)
]


def with_steps(item, options):
    steps = {"first_hitting": {}, "adaptive": {"num_steps": 15}}
    more = steps.get(item, {"num_steps": LENGTH if item in EXACT else STEPS})
    return dataclasses.replace(options, **more)


@pytest.mark.parametrize(("name", "item", "options"), CONDITIONAL)
def test_with_a_random_half_given_the_rows_keep_their_law(name, item, options):
    """Rows of the chain, of which each keeps two or three tokens that lie anywhere."""
    process, rng = PROCESSES[name], np.random.default_rng(5)
    ids = jnp.asarray(oracle.draw_rows(CHAIN, process, ROWS, LENGTH, seed=5), jnp.int32)
    order = rng.permuted(np.tile(np.arange(LENGTH), (ROWS, 1)), axis=1)
    free = jnp.asarray(order < rng.integers(2, 4, (ROWS, 1)))
    prompt = Prompt(jnp.where(free, 0, ids), free)
    rows = drawn(process, with_steps(item, options), prompt, rows=ROWS)
    kept = oracle.places_of(process, np.asarray(ids))
    assert np.array_equal(np.where(free, 0, rows), np.where(free, 0, kept))
    found = oracle.total_variation(oracle.frequencies(CHAIN, rows), oracle.law(CHAIN, LENGTH))
    assert found < (1.15 if item in EXACT else 1.4) * FLOOR


ALONE = [
    *(("masks", item) for item in ("first_hitting", "ancestral", "remdm_cap")),
    *(("hybrid", item) for item in ("ancestral", "psi", "gibbs", *EXACT[1:])),
    *(("uniform", item) for item in ("ancestral", "entropy_bound:epsilon=0")),
    *(("own", item) for item in ("ancestral", "adaptive")),
]


@pytest.mark.parametrize(("name", "item"), ALONE)
def test_with_tokens_given_their_conditional_law_is_met(name, item):
    """One pattern of them, so that errors of several cannot make up for each other."""
    options = with_steps(item, dict(samplers(name))[item])
    found, floor = beside_given(name, "position", **dataclasses.asdict(options))
    assert found < (1.6 if item in EXACT else 2.5) * floor


@pytest.mark.parametrize(
    ("name", "method", "steps", "figure"),
    [
        ("hybrid", "ancestral", 20, 0.078),
        ("hybrid", "ancestral", 80, 0.070),
        ("hybrid", "psi", 80, 0.048),
        ("hybrid", "gibbs", 80, 0.055),
        ("uniform", "ancestral", 80, 0.095),
    ],
)
def test_told_one_time_a_row_the_conditional_law_has_a_floor(name, method, steps, figure):
    """The figures of docs/sampling.md: with four times the steps an error of 1/N would be gone."""
    found, floor = beside_given(name, "row", method=method, num_steps=steps)
    assert abs(found - figure) < floor
    assert found > 3 * floor


def gibbs_sweep(process, network):
    """The real call of method "gibbs" at which time stands still: its time, and (keys, ids, active)
    -> ids, which redraws a share of 0.7 of the active positions."""
    options = SamplerOptions(method="gibbs", num_steps=12, rho=0.7)
    now = jax.tree.map(lambda a: jnp.asarray(a[7]), make_schedule(process, options, LENGTH))
    assert now.t == now.s

    def sweep(keys, ids, active):
        call = methods.Call(process, options, keys, ids, active, now)
        times, memory = methods.times(call, None)
        weights = functools.partial(weights_of, options)
        asked = network_at(process, network, lambda logits: logits, weights, ids, times)
        return methods.step(call, asked, times[:, 0], memory)[0].ids

    return now.t, jax.jit(sweep)


@pytest.mark.parametrize("name", PROCESSES)
def test_gibbs_redraws_leave_the_law_of_noisy_rows_as_it_is(name):
    """The sampler's own step at one position of three, from every noisy row: it draws from the
    exact kernel, which leaves the enumerated p_t as it is."""
    process, network, often = PROCESSES[name], oracle.leave_one_out(PROCESSES[name], CHAIN), 1000
    t, sweep = gibbs_sweep(process, network)
    z = np.array(list(itertools.product(range(4), repeat=3)), np.int32)
    rows, ids = oracle.all_rows(CHAIN, 3), oracle.chain_ids(process)
    alpha, noise = float(process.alpha(t)), np.asarray(process.noise_probs(t), np.float64)
    q = alpha * (ids[rows][None] == z[:, None]) + noise[z][:, None]  # [z, x, position]
    p_t = q.prod(axis=-1) @ np.exp(oracle.log_prob(CHAIN, rows))
    assert p_t.sum() == pytest.approx(1)
    z, p_t = z[p_t > 0], p_t[p_t > 0]
    x_hat = np.exp(np.asarray(network(jnp.asarray(z), jnp.full(len(z), t)), np.float64))
    many = jnp.repeat(jnp.asarray(z), often, axis=0)
    for i in range(3):
        is_z, others = z[:, i, None] == np.arange(4), np.delete(z, i, axis=1) @ [4, 1]
        kernel = 0.3 * is_z + 0.7 * (alpha * x_hat[:, i] + noise)
        same = others[:, None] == others  # rows that differ at position i alone
        before, after = (same @ (p_t[:, None] * law) for law in (is_z, kernel))
        np.testing.assert_allclose(after, before, atol=1e-6)
        active = jnp.broadcast_to(jnp.arange(3) == i, many.shape)
        moved = np.asarray(sweep(row_keys(jax.random.key(i), jnp.arange(len(many))), many, active))
        assert np.array_equal(np.delete(moved, i, axis=1), np.delete(many, i, axis=1))
        found = (moved[:, i, None] == np.arange(4)).reshape(len(z), often, 4).sum(axis=1)
        assert not found[kernel == 0].any()
        counted = kernel * often > 5
        chi_square = ((found - kernel * often) ** 2)[counted] / (kernel * often)[counted]
        freedom = np.sum(counted.sum(axis=-1) - 1)
        assert stats.chi2.sf(chi_square.sum(), freedom) > 1e-4


def test_gibbs_redraws_mend_what_few_steps_spoil():
    """More sweeps between the same steps come closer; at equal calls those at the end do."""
    process = PROCESSES["hybrid"]
    plain = distance(process, num_steps=6)
    swept = distance(process, method="gibbs", num_steps=60, sweeps=9, rho=0.1)
    assert swept < 0.6 * plain


def test_gibbs_redraws_after_the_last_step_pay_at_equal_calls():
    process = PROCESSES["hybrid"]
    plain = distance(process, num_steps=16)
    swept = distance(process, method="gibbs", num_steps=16, sweeps=8, sweep_below=0.0)
    beyond = [np.sqrt(max(d**2 - FLOOR**2, 0)) for d in (plain, swept)]
    assert beyond[1] < 0.8 * beyond[0]


@pytest.mark.parametrize("name", ["hybrid", "masks"])
def test_blocks_opened_again_keep_the_law(name):
    """Noise and exact denoising leave it as it is; the error of few steps falls as they grow."""
    few, many = (
        distance(PROCESSES[name], num_steps=n, block_length=1, reopen=1, reopen_at=0.7)
        for n in (2, 32)
    )
    assert few > 2.5 * FLOOR
    assert many < 1.2 * FLOOR


def test_blocks_opened_again_mend_their_borders():
    """A network that does not see finished blocks draws each for itself; opened again they are
    noise like others, and seen."""
    process, rows = PROCESSES["hybrid"], {}
    network = sampler_laws.exact_network(process, CHAIN, "position")

    def forgetful(z, times):
        return network(z, jnp.where(times == 0, process.t_max, times))

    for reopen in (0, 2):
        options = SamplerOptions(num_steps=32, block_length=2, reopen=reopen)
        run = jax.jit(
            functools.partial(sample_diffusion, process, forgetful, options, length=LENGTH)
        )
        rows[reopen] = oracle.places_of(
            process, run(row_keys(jax.random.key(0), jnp.arange(ROWS))).ids
        )
    found = {
        reopen: oracle.total_variation(oracle.bigrams(CHAIN, x[:, 1:3]), BORDER)
        for reopen, x in rows.items()
    }
    assert found[0] > 0.2
    assert found[2] < 0.5 * found[0]


def test_guidance_sharpens_towards_what_is_given():
    """g = 0 forgets the given token, g = 1 is the conditional law, g > 1 goes beyond."""
    process = PROCESSES["masks"]
    given = np.array([2, -1, -1, -1, -1])
    ids = jnp.full((ROWS, LENGTH), 2, jnp.int32)
    prompt = Prompt(ids, jnp.broadcast_to(jnp.asarray(given < 0), ids.shape))
    first = {}
    for guidance in (0.0, 1.0, 2.0):
        options = SamplerOptions(method="first_hitting", guidance=guidance)
        rows = drawn(process, options, prompt)
        first[guidance] = np.bincount(rows[:, 1], minlength=3) / ROWS
    marginal = CHAIN.start @ CHAIN.moves
    np.testing.assert_allclose(first[0.0], marginal, atol=0.015)
    np.testing.assert_allclose(first[1.0], CHAIN.moves[2], atol=0.015)
    best = np.argmax(CHAIN.moves[2] / marginal)
    assert first[2.0][best] > first[1.0][best] + 0.05


# The bound.


@pytest.mark.parametrize("name", FAMILIES)
def test_the_full_bound_of_the_exact_network_is_the_entropy(name):
    found = sampler_laws.bounds(FAMILIES[name], length=LENGTH, num_rows=8000, num_times=16)
    assert found["entropy"] == pytest.approx(oracle.entropy(CHAIN, LENGTH))
    assert found["full_standard_error"] < 0.07
    assert abs(found["full"] - found["entropy"]) < 4 * found["full_standard_error"]
    if name in ("hybrid", "uniform"):  # a middle term alone is too good
        assert found["middle"] < found["entropy"] - 3 * found["middle_standard_error"]
