"""Logits only where a token can change: the same step as with all of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import everywhere
from jax.sharding import NamedSharding, PartitionSpec

from gidd_jax.draws import row_keys
from gidd_jax.loss import masked_logits
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess, expand_time
from gidd_jax.sampling import loop, steps
from gidd_jax.sampling.filters import unnormalised
from gidd_jax.sampling.loop import Prompt, sample_diffusion
from gidd_jax.sampling.options import METHODS, SamplerOptions
from gidd_jax.sampling.thinning import group_size, network_at

V, D, B = 11, 6, 4
PROCESSES = {
    "hybrid": HybridProcess(V, 10, 0.2),
    "mostly uniform": HybridProcess(V, 3, 0.8, gamma=0.5),
    "masked": MaskedProcess(V, 10),
    "log-SNR": LogSnrProcess(V, 10),
}
KERNEL = 2 * jax.random.normal(jax.random.key(5), (D, V + 2))  # two columns pad the vocabulary
TABLE = jax.random.normal(jax.random.key(3), (V, D))
KEYS = row_keys(jax.random.key(1), jnp.arange(B))
TIMES = [(0.999, 0.9), (0.7, 0.5), (0.5, 0.1), (0.2, 0.19)]


def features(z, t):
    return TABLE[z] + jnp.sin(jnp.cumsum(TABLE[z], axis=1)) + expand_time(t, z)[..., None]


def project(h):
    return 3 + h @ KERNEL


def asked_everywhere(process, denoise, project, weights, z_t, t):
    logits = masked_logits(process, project(denoise(z_t, t)))
    return everywhere(logits, weights(logits))


def noisy(process, t, length):
    key = jax.random.fold_in(jax.random.key(2), int(1000 * t))
    x = jax.random.randint(key, (B, length), 0, V - 1)
    x = jnp.where(x == process.mask_id, V - 1, x)
    active = jax.random.bernoulli(key, 0.8, (B, length))
    return process.sample(key, x, jnp.full(B, t)), active


ONE = jnp.ones(B, jnp.int32)
STEPS = {
    "ancestral": lambda *place, t, s: steps.ancestral_step(*place, t, s),
    "psi": lambda *place, t, s: steps.ancestral_step(*place, t, s, 0.7),
    "min-p": lambda *place, t, s: steps.filtered_ancestral_step(*place, t, s, 0.7, 0.1),
    "mode_seeking": lambda *place, t, s: steps.mode_seeking_step(*place, t, 3 * ONE),
    "confidence": lambda *place, t, s: steps.confidence_step(*place, 3 * ONE.at[1].set(0)),
    "remask": lambda *place, t, s: steps.remask_step(*place, t, s, 0.05),
    "first hitting": lambda *place, t, s: steps.first_hitting_step(*place),
    "fill": lambda *place, t, s: steps.fill_step(*place),
}
MASKS_ALONE = ("remask", "first hitting")
CASES = [(step, name) for step in ("ancestral", "psi") for name in PROCESSES]
CASES += [(step, "masked" if step in MASKS_ALONE else "hybrid") for step in list(STEPS)[2:]]


@pytest.mark.parametrize(("step", "name"), CASES, ids=str)
def test_steps_that_ask_in_groups_are_those_that_ask_everywhere(step, name):
    """Token for token, at every time, for rows of one group and of several."""
    process = PROCESSES[name]

    @jax.jit
    def both(z_t, t, s, active):
        return [
            STEPS[step](
                process,
                KEYS,
                network(process, features, project, unnormalised, z_t, jnp.full(B, t)),
                z_t,
                active,
                t=t,
                s=s,
            )
            for network in (asked_everywhere, network_at)
        ]

    changes = 0
    for length in (5, 70):
        assert (length > group_size(length)) == (length == 70)
        for t, s in TIMES:
            z_t, active = noisy(process, t, length)
            dense, thinned = both(z_t, t, s, active)
            np.testing.assert_array_equal(thinned.ids, dense.ids)
            np.testing.assert_array_equal(thinned.asked, dense.asked)
            np.testing.assert_allclose(thinned.log_probs, dense.log_probs, rtol=2e-5)
            changed = np.asarray(thinned.ids != z_t)
            assert not (changed & ~np.asarray(active)).any()
            # The network is asked wherever a token was drawn from it.
            assert (np.asarray(thinned.asked) | (thinned.ids == process.mask_id))[changed].all()
            changes += changed.sum()
    assert changes > (20 if step in ("first hitting", "confidence") else 60)


@pytest.mark.parametrize("name", PROCESSES)
def test_where_the_network_is_not_asked_nothing_could_change(name):
    """An ancestral step finished everywhere leaves those positions as they are."""
    process = PROCESSES[name]

    @jax.jit
    def finished(z_t, t, s):
        draws = steps.ancestral_draws(process, KEYS, z_t, t, s, 0.9, num_columns=V + 2)
        logits = masked_logits(process, project(features(z_t, jnp.full(B, t))))
        asked = steps.needs_x_hat(process, draws, z_t)
        return steps.finish_ancestral_step(draws, unnormalised(logits), z_t), asked

    left = 0
    for t, s in TIMES:
        z_t, _ = noisy(process, t, 70)
        z_s, asked = finished(z_t, t, s)
        np.testing.assert_array_equal(z_s[~asked], z_t[~asked])
        left += np.sum(~asked)
    assert left > 100


def test_no_more_positions_are_projected_than_a_group_has():
    process, widths = PROCESSES["masked"], []
    z_t, _ = noisy(process, 0.7, 70)

    def counting(h):
        jax.debug.callback(lambda: widths.append(h.shape[1]))
        return project(h)

    network = network_at(process, features, counting, unnormalised, z_t, jnp.full(B, 0.7))
    place = (process, KEYS, network, z_t, z_t >= 0)
    for take, width, groups in ((steps.fill_step, 16, 4), (steps.first_hitting_step, 1, 1)):
        jax.block_until_ready(take(*place))
        jax.effects_barrier()
        assert set(widths) == {width}
        assert 1 <= len(widths) <= groups
        widths.clear()


@pytest.mark.parametrize("step", ["ancestral", "confidence", "mode_seeking", "first hitting"])
def test_devices_exchange_nothing_but_whether_they_go_on(step):
    """Each keeps its rows: between 4 devices there is one bit per group, and one per call."""
    mesh = jax.make_mesh((B,), ("data",), devices=jax.devices()[:B])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    process = PROCESSES["masked"]

    def take(keys, z_t, active):
        network = network_at(process, features, project, unnormalised, z_t, jnp.full(B, 0.5))
        return STEPS[step](process, keys, network, z_t, active, t=0.5, s=0.4)

    arguments = (KEYS, *noisy(process, 0.5, 70))
    program = jax.jit(take, in_shardings=rows, out_shardings=rows).lower(*arguments).compile()
    exchanged = re.findall(
        r"= (\S+) (?:all-gather|all-reduce|all-to-all|collective-permute)", program.as_text()
    )
    assert exchanged
    assert all(kind.startswith("pred[]") for kind in exchanged), exchanged


@pytest.mark.parametrize("method", ["first_hitting", "ancestral"])
def test_the_network_is_given_the_time_of_the_ids(method):
    """First hitting: when the next mask is lifted; the fill of what is left: the last time."""
    process, times = PROCESSES["masked"], []

    def noting(z, t):
        jax.debug.callback(lambda z, t: times.append((np.asarray(z), np.asarray(t))), z, t)
        return features(z, t)

    steps_of = {} if method == "first_hitting" else {"num_steps": 2, "grid": "reference"}
    options = SamplerOptions(method=method, **steps_of)
    run = jax.jit(lambda k: sample_diffusion(process, noting, options, k, 300, project=project))
    jax.block_until_ready(run(KEYS))
    jax.effects_barrier()
    if method == "first_hitting":
        shares = np.array([np.mean(z == process.mask_id) for z, _ in times])
        means = np.array([np.mean(t) for _, t in times])
        assert len(times) == 300
        np.testing.assert_allclose(means, shares, atol=0.1)
    else:
        (_, first), *_, (z, last) = times
        assert first.max() < 0.6  # the reference grid leaves out the noisiest time
        np.testing.assert_allclose(last, process.t_min, rtol=1e-6)
        assert (z == process.mask_id).any()


def test_with_masks_alone_the_network_is_asked_exactly_where_a_mask_is_lifted():
    process = PROCESSES["masked"]
    z_t = jnp.full((B, 200), process.mask_id).at[:, ::3].set(1)
    network = network_at(process, features, project, unnormalised, z_t, jnp.full(B, 0.5))
    taken = steps.ancestral_step(process, KEYS, network, z_t, z_t >= 0, 0.5, 0.4)
    np.testing.assert_array_equal(taken.asked, taken.ids != z_t)
    # A share of 1 - 0.4 / 0.5 of the 532 masks, give or take.
    assert 70 < taken.asked.sum() < 145


@pytest.mark.parametrize("method", METHODS)
def test_calls_that_could_change_nothing_are_not_made(method, monkeypatch):
    """And change nothing: the run is the one that asks everywhere, in every call."""
    process = PROCESSES["masked" if method not in ("psi", "mode_seeking") else "hybrid"]
    calls = []

    def counted(z, t):
        jax.debug.callback(lambda: calls.append(1))
        return features(z, t)

    steps_of = {"first_hitting": {}, "psi": {"num_steps": 60, "kappa": 0.999}}
    options = SamplerOptions(method=method, **steps_of.get(method, {"num_steps": 60}))
    free = jnp.arange(8)[None] >= jnp.array([[2], [0], [5], [6]])
    prompt = Prompt(jnp.ones((B, 8), jnp.int32), free)

    def run(denoise):
        sample = jax.jit(
            lambda keys: sample_diffusion(
                process, denoise, options, keys, 8, prompt, 8, project=project
            )
        )
        drawn = jax.block_until_ready(sample(KEYS))
        jax.effects_barrier()
        return drawn

    drawn = run(counted)
    assert int(drawn.network_calls) == len(calls)
    monkeypatch.setattr(loop, "network_at", asked_everywhere)
    whole = run(features)
    for name in ("ids", "drawn_at", "num_calls", "network_calls"):
        np.testing.assert_array_equal(getattr(drawn, name), getattr(whole, name))
    np.testing.assert_allclose(drawn.log_probs, whole.log_probs, rtol=2e-5)
    # 19 tokens are drawn, some in the same call; those that are masked again once more.
    most = {"ancestral": 20, "first_hitting": 8, "confidence": 19, "mode_seeking": 61}
    most = most.get(method, 61)
    assert (60 if method == "mode_seeking" else 6) <= len(calls) <= most


@pytest.mark.parametrize("method", ["ancestral", "psi"])
def test_whole_runs_from_features_are_those_from_logits(method):
    """Prompts, filters, blocks and the fill of leftover masks included."""
    process, length = PROCESSES["hybrid"], 40
    options = SamplerOptions(
        method=method, num_steps=6, temperature=0.8, top_p=0.95, block_length=16
    )
    free = np.arange(length)[None] >= np.array([0, 3, 10, 30])[:, None]
    prompt = Prompt(jnp.ones((B, length), jnp.int32), jnp.asarray(free))
    runs = []
    for denoise, head in (
        (features, project),
        (lambda z, t: project(features(z, t)), lambda h: h),
    ):
        run = jax.jit(
            lambda keys, denoise=denoise, head=head: sample_diffusion(
                process, denoise, options, keys, length, prompt, num_free=length, project=head
            )
        )
        runs.append(run(KEYS))
    np.testing.assert_array_equal(runs[0].ids, runs[1].ids)
    np.testing.assert_array_equal(runs[0].drawn_at, runs[1].drawn_at)
    np.testing.assert_allclose(runs[0].log_probs, runs[1].log_probs, rtol=1e-4, atol=1e-5)
    assert (np.asarray(runs[0].ids)[~free] == 1).all()
