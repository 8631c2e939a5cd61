"""Noise in training by position: times, prompts, ids; what the scaling paper's code draws."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import PROCESSES
from tiny_checkpoint import random_params
from tiny_run import tiny_settings

from gidd_jax.errors import InputError
from gidd_jax.models.dit import DiT
from gidd_jax.models.gidd import TimeFreeTransformer, prompts, sees_prompt
from gidd_jax.parallel.sharding import unbox
from gidd_jax.process import HybridProcess, LogSnrProcess, NoiseDraws
from gidd_jax.sampling.times import told
from gidd_jax.training.build import build_objective
from gidd_jax.training.givens import KINDS, beginning, draw_givens, middling
from gidd_jax.training.loop import train
from gidd_jax.training.noising import Noised, Noising, position_times
from gidd_jax.training.objective import Objective
from gidd_jax.training.step import evaluation_step, loss_and_grads

VOCAB, MASK = 97, 3
ROWS, LENGTH = 5, 13  # of the reference's draws
MODES = {  # shares of rows with times by position, and with ascending ones
    "shared": (0.0, 0.0),
    "independent0.2": (0.2, 0.0),
    "independent0.5_linear0.3": (0.25, 0.3),
    "all_independent": (1.0, 0.0),
}


# The reference, with its draws put in.


@pytest.fixture
def draws(golden_scaling):
    return golden_scaling("s05_noising.npz")


@pytest.mark.parametrize("mode", MODES)
def test_times_of_positions_are_the_references(draws, mode):
    with jax.enable_x64(True):
        process = LogSnrProcess(VOCAB, MASK)
        u, choice = (jnp.asarray(draws[k], jnp.float64) for k in ("u_t", "u_mode"))
        rows = process.t_min + (process.t_max - process.t_min) * u[:, 0]
        t = position_times(process, rows, u, choice, *MODES[mode])
        found = process.log_snr(t)
    want = draws[f"log_snr/{mode}/f64"]
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-10)
    low = position_times(process, jnp.float32(rows), draws["u_t"], draws["u_mode"], *MODES[mode])
    middle = np.abs(want) < 5  # nearer to the ends float32 cannot tell 1 - t
    np.testing.assert_allclose(process.log_snr(low)[middle], want[middle], rtol=1e-5, atol=1e-5)


def reference_prompt(draws, probability, largest=1.0):
    """Which positions are a prompt, of the functions of `givens` and the reference's draws."""
    share = middling(draws["u_prompt_frac"])[:, None] * largest
    chosen = draws["u_has_prompt"][:, None] < probability
    return np.asarray(beginning(jnp.arange(LENGTH)[None], LENGTH, share)) & chosen


def reference_infilling(draws, probability):
    share = np.asarray(middling(draws["u_infill_frac"]))[:, None]
    return (draws["u_infill"] < share) & (draws["u_has_infill"][:, None] < probability)


def test_prompts_and_infilling_are_the_references(draws):
    given = {
        "prompt": reference_prompt(draws, 0.2),
        "prompt_all_half": reference_prompt(draws, 1.0, 0.5),
        "prompt_causal": reference_prompt(draws, 0.2),
        "infill": reference_infilling(draws, 1.0),
        "prompt_infill": reference_prompt(draws, 0.5) | reference_infilling(draws, 0.5),
    }
    for name, found in given.items():
        np.testing.assert_array_equal(~found, draws[f"noise_mask/{name}"], err_msg=name)
    # Attention: of prompts alone. A causal one inside prompts is not offered: no run had it.
    for name, is_prompt in (
        ("prompt", given["prompt"]),
        ("prompt_all_half", given["prompt_all_half"]),
        ("infill", np.zeros_like(given["infill"])),
        ("prompt_infill", reference_prompt(draws, 0.5)),
    ):
        found = sees_prompt(jnp.asarray(is_prompt))
        np.testing.assert_array_equal(found, draws[f"attention_mask/{name}"], err_msg=name)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("shift", [-1000, -2, 0, 2, 1000])
def test_corrupted_tokens_are_the_references(draws, shift, x64):
    with jax.enable_x64(x64):
        process = LogSnrProcess(VOCAB, MASK, shift=float(shift))
        t = jax.nn.sigmoid(-jnp.asarray(draws[f"log_snr/all_independent/f{64 if x64 else 32}"]))
        # Its uniforms say the same from the other end.
        made_of = NoiseDraws(1 - draws["u_keep"], 1 - draws["u_uniform"], draws["uniform_ids"])
        found = process.corrupt(draws["labels"], t, made_of)
    np.testing.assert_array_equal(found, draws[f"z/shift{shift}"])


def test_a_prepared_batch_is_the_references(draws):
    process = LogSnrProcess(VOCAB, MASK, shift=2.0)
    rows = process.t_min + (process.t_max - process.t_min) * draws["u_t"][:, 0]
    t = position_times(process, rows, draws["u_t"], draws["u_mode"], 0.2)
    made_of = NoiseDraws(1 - draws["u_keep"], 1 - draws["u_uniform"], draws["uniform_ids"])
    given = jnp.asarray(reference_prompt(draws, 0.2))
    x = draws["labels"]
    noised = Noised(jnp.where(given, x, process.corrupt(x, t, made_of)), t, given)
    np.testing.assert_array_equal(noised.z_t, draws["prepare_batch/input_ids"])
    np.testing.assert_array_equal(x, draws["prepare_batch/labels"])
    noisy = draws["prepare_batch/noise_mask"]
    np.testing.assert_array_equal(~given, noisy)
    # What it calls log-SNR 10 is time 0 here: the prompt, and so the mask of attention.
    np.testing.assert_array_equal(noised.times == 0, ~noisy)
    mask = sees_prompt(prompts(noised.times))
    np.testing.assert_array_equal(mask, draws["prepare_batch/attention_mask"])
    want = draws["prepare_batch/log_snr/f64"]
    middle = noisy & (np.abs(want) < 5)
    np.testing.assert_allclose(process.log_snr(noised.t)[middle], want[middle], rtol=1e-4)


# Laws.


def test_shares_of_the_rows_have_times_of_their_own_and_ascending_ones():
    process = HybridProcess(67, 66, 0.1)
    how = Noising(by_position=0.2, ascending=0.3)
    rows = process.sample_t(jax.random.key(0), 4000)
    t = np.asarray(how.times(process, jax.random.key(1), rows, 8))
    assert t.shape == (4000, 8)
    assert t.min() >= process.t_min
    assert t.max() <= process.t_max
    one = (t == t[:, :1]).all(-1)
    rising = (np.diff(t, axis=-1) > 0).all(-1)
    np.testing.assert_array_equal(t[one][:, 0], np.asarray(rows)[one])
    np.testing.assert_allclose(t[rising], np.tile(np.arange(1, 9) / 9, (rising.sum(), 1)), 1e-6)
    for share, wanted in ((one, 0.5), (rising, 0.3), (~one & ~rising, 0.2)):
        assert abs(share.mean() - wanted) < 0.03
    own = t[~one & ~rising]
    np.testing.assert_allclose(np.histogram(own, 4, (0, 1))[0] / own.size, 0.25, atol=0.03)
    assert abs(np.corrcoef(own[:, 0], own[:, 1])[0, 1]) < 0.12
    assert Noising().times(process, jax.random.key(1), rows, 8) is rows


def test_shares_that_are_given_are_of_the_references_law():
    """P(share < f) = (1 - cos pi f) / 2; at full rows of 41, by counts of the given."""
    mask = jnp.ones((6000, 41), bool)
    given = np.asarray(draw_givens(jax.random.key(0), mask, 0.5, kind="prompt"))
    some = given.any(-1)
    assert abs(some.mean() - 0.5) < 0.02
    assert (np.diff(given.astype(int), axis=-1) <= 0).all()  # beginnings
    counts = given[some].sum(-1)
    assert counts.min() >= 1
    assert counts.max() <= 40
    for count in (5, 10, 20, 30, 36):  # count - 1 <= 40 f < count
        wanted = (1 - np.cos(np.pi * count / 40)) / 2
        assert abs((counts <= count).mean() - wanted) < 0.03
    given = np.asarray(draw_givens(jax.random.key(1), mask, 1.0, kind="infilling"))
    assert (np.abs(np.diff(given.astype(int), axis=-1)).sum(-1) > 3).mean() > 0.7  # scattered
    shares = given.mean(-1)
    assert abs(shares.mean() - 0.5) < 0.02
    # Of the share 1/4 - 2/pi^2, and of 41 throws at it.
    variance = 1 / 4 - 2 / np.pi**2 + 2 / np.pi**2 / 41
    np.testing.assert_allclose(shares.var(), variance, rtol=0.05)
    assert abs(given.mean(0) - 0.5).max() < 0.05  # no place is likelier


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_leaves_a_token_free_and_keeps_padding_of_prompts(kind):
    mask = jnp.arange(12)[None] < jnp.tile(jnp.array([[12], [7], [1], [0]]), (500, 1))
    given = np.asarray(draw_givens(jax.random.key(0), mask, 1.0, kind=kind))
    real = np.asarray(mask)
    assert not (given & real)[real.any(-1)].all(-1).any()
    assert ((given & real).sum(-1)[real.any(-1)] < real.sum(-1)[real.any(-1)]).all()
    assert (given & ~real).any() == (kind != "prompt")


def test_uniform_ids_are_of_the_whole_vocabulary_only_if_they_are_told_to():
    process = LogSnrProcess(5, 3, shift=1000.0)  # no mask but as a uniform id
    x, t = jnp.zeros((100, 200), jnp.int32), jnp.full(100, 0.5)
    key = jax.random.key(0)
    plain = np.asarray(Noising().noisy(process, key, x, t))
    whole = np.asarray(Noising(whole_vocabulary=True).noisy(process, key, x, t))
    np.testing.assert_array_equal(plain, process.sample(key, x, t))
    counts = np.bincount(plain.ravel(), minlength=5) / x.size
    np.testing.assert_allclose(counts, [0.625, 0.125, 0.125, 0.0, 0.125], atol=0.01)
    counts = np.bincount(whole.ravel(), minlength=5) / x.size
    np.testing.assert_allclose(counts, [0.6, 0.1, 0.1, 0.1, 0.1], atol=0.01)
    # A mask that comes so has no weight in the loss, as in the reference.
    weights = process.loss_weights(x, jnp.asarray(whole), t)
    assert not np.asarray(weights)[whole == 3].any()


# The objective.

OPTIONS = Noising(
    by_position=0.5, ascending=0.2, givens=0.5, givens_kind="prompt", whole_vocabulary=True
)


def objective(noising: Noising, network: str = "dit", process=None, **changes) -> Objective:
    size = {"vocab_size": 7, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 12}
    model = DiT(cond_dim=8, **size) if network == "dit" else TimeFreeTransformer(**size)
    values = {
        "model": model.clone(position_times=True),
        "process": process or HybridProcess(7, 6, 0.2),
        "weighting": "elbo",
        "min_weight": 0.0,
        "max_weight": 2.0,
        "stratified": True,
        "mask_padding": True,
        "align_mask_to_input": False,
        "keep_padding_columns": False,
        "noising": noising,
    }
    return Objective(**{**values, **changes})


def toy_batch():
    """Random ids, each row with another number of padded positions."""
    tokens = np.random.default_rng(0).integers(0, 5, (8, 12)).astype(np.int32)
    mask = np.arange(12) < np.arange(5, 13)[:, None]
    return {"tokens": jnp.asarray(np.where(mask, tokens, 5)), "mask": jnp.asarray(mask)}


def params_of(what):
    ids, t = jnp.zeros((8, 12), jnp.int32), jnp.zeros(8)
    return random_params(nn.unbox(what.model.init(jax.random.key(0), ids, t))["params"])


def test_without_options_training_draws_what_it_drew_before():
    """One time a row from the first key, noise from the second: nothing moved."""
    what, batch = objective(Noising()), toy_batch()
    noised = what.noise(jax.random.key(3), batch["tokens"], batch["mask"])
    t_key, z_key = jax.random.split(jax.random.key(3))
    t = what.process.sample_t(t_key, 8)
    np.testing.assert_array_equal(noised.t, t)
    np.testing.assert_array_equal(noised.z_t, what.process.sample(z_key, batch["tokens"], t))
    assert noised.given is None
    # Options do not change the rows that have them not.
    some = objective(Noising(by_position=0.5)).noise(
        jax.random.key(3), batch["tokens"], batch["mask"]
    )
    one = np.asarray((some.t == some.t[:, :1]).all(-1))
    assert 0 < one.sum() < 8
    np.testing.assert_array_equal(some.t[one][:, 0], noised.t[one])
    np.testing.assert_array_equal(some.z_t[one], noised.z_t[one])


@pytest.mark.parametrize(
    ("network", "name"), [("dit", "hybrid"), ("gidd", "log-snr"), ("dit", "masked")]
)
def test_clean_positions_have_no_loss_and_the_rest_their_own_time(name, network):
    process = PROCESSES[name]
    what, batch = objective(OPTIONS, network, process), toy_batch()
    tokens = process.sample_background(jax.random.key(4), (8, 12))
    batch["tokens"] = tokens
    noised = what.noise(jax.random.key(3), tokens, batch["mask"])
    assert noised.t.shape == (8, 12)
    given = np.asarray(noised.given)
    assert given.any()
    np.testing.assert_array_equal(noised.z_t[given], tokens[given])
    np.testing.assert_array_equal(noised.times[given], 0)
    np.testing.assert_array_equal(noised.times[~given], noised.t[~given])
    params = params_of(what)
    counted = np.asarray(batch["mask"]) & ~given

    @jax.jit
    def by_hand(params):
        return jnp.sum(jnp.where(counted, what.losses(params, tokens, noised).loss, 0.0))

    total, wanted = jax.value_and_grad(by_hand)(params)
    for aggregation, count in (("mean", counted.sum()), ("sum", 1)):
        chosen = dataclasses.replace(what, aggregation=aggregation)
        run = jax.jit(
            lambda params, chosen=chosen: loss_and_grads(chosen, params, batch, noised, 1)
        )
        grads, metrics = run(params)
        np.testing.assert_allclose(metrics["loss"], total / counted.sum(), rtol=1e-4)
        for a, b in zip(*map(jax.tree.leaves, (grads, wanted)), strict=True):
            close = {"rtol": 1e-3, "atol": 1e-3 * np.abs(b).max() / count + 1e-6}
            np.testing.assert_allclose(a, b / count, **close)


@pytest.mark.parametrize("network", ["dit", "gidd"])
def test_the_bound_does_not_depend_on_what_training_draws(network):
    """All three terms, with and without marks, to the last bit."""
    batch = toy_batch()
    params = params_of(objective(Noising(), network))
    for marked in (None, jnp.asarray(np.random.default_rng(1).random((8, 12)) < 0.4)):
        found = {}
        if marked is not None:
            batch["given"] = marked
        for noising, aggregation in ((Noising(), "mean"), (OPTIONS, "sum")):
            what = objective(noising, network, aggregation=aggregation)
            run = jax.jit(lambda p, b, what=what: evaluation_step(what, p, b, jax.random.key(5)))
            found[aggregation] = jax.tree.map(float, run(params, batch))
        assert found["mean"] == found["sum"]
        assert float(found["sum"]["prior"]) > 0
        assert float(found["sum"]["reconstruction"]) > 0


def test_networks_are_told_what_training_needs(tmp_path):
    """dit: times of positions; gidd, which has no times: prompts."""
    told = {}
    for name in ("dit", "gidd"):
        for changes in ({}, {"process.by_position": 0.2}, {"data.givens": 0.2}):
            settings = tiny_settings(tmp_path, **{"model.name": name}, **changes)
            what = build_objective(settings, 20, 19)
            told[(name, *changes)] = what.model.position_times
    assert [key for key, value in told.items() if value] == [
        ("dit", "process.by_position"),
        ("dit", "data.givens"),
        ("gidd", "data.givens"),
    ]
    settings = tiny_settings(
        tmp_path,
        **{
            "process.by_position": 0.5,
            "process.ascending": 0.2,
            "process.uniform_ids": "all",
            "data.givens": 0.5,
            "data.givens_kind": "prompt",
            "train.aggregation": "sum",
        },
    )
    what = build_objective(settings, 20, 19)
    assert (what.noising, what.aggregation) == (OPTIONS, "sum")


def test_a_run_with_all_options_learns_and_reports_its_bound(tmp_path):
    changes = {
        "model.name": "gidd",
        "process.by_position": 0.5,
        "process.uniform_ids": "all",
        "data.givens": 0.2,
        "data.givens_kind": "prompt",
        "data.empty_tokens": 0.2,
        "train.aggregation": "sum",
        "train.num_steps": 30,
        "optimizer.learning_rate": 1e-2,
    }
    figures = train(tiny_settings(tmp_path, **changes), tmp_path / "run")
    assert figures["nelbo"] < 0.9 * np.log(258)


# Rows that end early.


def test_short_rows_end_after_any_number_of_tokens_alike():
    how = Noising(short_rows=0.25)
    found = np.asarray(how.lengths(jax.random.key(0), (40_000, 8)))
    counts = np.bincount(found, minlength=9) / len(found)
    np.testing.assert_allclose(counts, [0, *[0.25 / 8] * 7, 0.75 + 0.25 / 8], atol=0.005)
    assert Noising().lengths(jax.random.key(0), (4, 8)) is None


@pytest.mark.parametrize("name", ["dit", "gidd", "llama"])
def test_a_short_row_is_the_row_that_ends_there(tmp_path, name):
    """Loss, figures and gradients are those of arrays that hold no more than its tokens."""
    changes = {"model.name": name, "data.mode": "packed", "data.short_rows": 0.5}
    changes |= {"model.cond_dim": 0} if name == "llama" else {}
    objective = build_objective(tiny_settings(tmp_path, **changes), 20, 19)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 19, (3, 12)), jnp.int32)
    batch = {"tokens": x, "mask": jnp.ones(x.shape, bool)}
    noised = objective.noise(jax.random.key(1), x, batch["mask"])
    assert noised.lengths is not None
    noised = noised._replace(lengths=jnp.full(3, 7))
    inputs = (noised.z_t, noised.t)
    params = random_params(
        jax.eval_shape(lambda: unbox(objective.model.init(jax.random.key(0), *inputs)["params"]))
    )
    whole = loss_and_grads(objective, params, batch, noised, 1)
    cut = Noised(noised.z_t[:, :7], noised.t)
    part = {name: leaf[:, :7] for name, leaf in batch.items()}
    alone = loss_and_grads(objective, params, part, cut, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), whole, alone)
    # What lies beyond is neither seen nor counted.
    beyond = jnp.arange(12)[None] >= 7
    other = noised._replace(z_t=jnp.where(beyond, 3, noised.z_t))
    changed = batch | {"tokens": jnp.where(beyond, 5, x)}
    again = loss_and_grads(objective, params, changed, other, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, again)


def test_the_time_told_of_a_short_row_is_that_of_its_own_tokens(tmp_path):
    """With given tokens, too: the share of noise is that of what the network sees."""
    process = HybridProcess(20, 19, 0.2)
    given = jnp.arange(8)[None] < 3
    noised = Noised(jnp.zeros((1, 8), jnp.int32), jnp.full(1, 0.6), given, jnp.full(1, 4))
    time = told(DiT(20, 8, 1, 1, 8), process, noised.times, noised.within)
    np.testing.assert_allclose(1 - process.alpha(time), (1 - process.alpha(0.6)) / 4, rtol=1e-3)


def test_a_run_with_short_rows_learns_and_its_bound_is_that_of_whole_rows(tmp_path):
    changes = {"data.mode": "packed", "data.short_rows": 0.5, "train.num_steps": 30}
    figures = train(
        tiny_settings(tmp_path, **changes, **{"optimizer.learning_rate": 1e-2}), tmp_path / "run"
    )
    assert figures["nelbo"] < 0.9 * np.log(258)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.mode": "padded"}, "are for diffusion models of packed rows"),
        ({"process.name": "autoregressive", "model.name": "llama"}, "are for diffusion models"),
        ({"model.name": "gidd", "train.block_length": 4}, "set one of them to 0"),
    ],
)
def test_short_rows_where_there_are_none_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        tiny_settings(tmp_path, **{"data.mode": "packed", "data.short_rows": 0.5} | changes)
