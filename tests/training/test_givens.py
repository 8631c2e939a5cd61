"""Training with given tokens: which, at what times, and what counts."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import random_params, tiny_model, write_checkpoint
from tiny_run import tiny_settings

from gidd_jax.errors import InputError
from gidd_jax.evaluation.corpora import CorpusRows, open_corpora
from gidd_jax.evaluation.likelihoods import estimate_rows, score_corpus
from gidd_jax.evaluation.scoring import score_rows
from gidd_jax.inference.gidd import Gidd
from gidd_jax.likelihood import nelbo
from gidd_jax.models.dit import DiT
from gidd_jax.process import HybridProcess
from gidd_jax.sampling.options import EstimatorOptions
from gidd_jax.sampling.times import row_times
from gidd_jax.training.givens import draw_givens
from gidd_jax.training.loop import train
from gidd_jax.training.noising import Noising
from gidd_jax.training.objective import Objective
from gidd_jax.training.step import evaluation_step, loss_and_grads


def test_prefixes_spans_and_scattered_tokens_are_given_in_a_share_of_the_rows():
    mask = jnp.arange(12)[None] < jnp.tile(jnp.array([[12], [7], [1]]), (1000, 1))
    given = np.asarray(draw_givens(jax.random.key(0), mask, 0.6)) & np.asarray(mask)
    count = np.asarray(mask).sum(-1)
    assert (given.sum(-1) < count).all()  # some token is always free
    assert not given[count == 1].any()
    rows = given[count == 12]
    some = rows.any(-1)
    assert abs(some.mean() - 0.6) < 0.05
    edges = np.abs(np.diff(np.pad(rows[some].astype(int), [(0, 0), (1, 1)]), axis=-1)).sum(-1)
    begins = rows[some][:, 0] & (edges == 2)  # one run from the start on
    assert 0.25 < begins.mean() < 0.6
    assert (edges > 4).mean() > 0.15  # scattered
    sizes = rows[some].sum(-1)
    assert sizes.min() == 1
    assert sizes.max() == 11
    assert not np.asarray(draw_givens(jax.random.key(0), mask, 0.0)).any()


def test_padding_is_given_beside_gaps_and_not_after_a_beginning():
    """All of it or none, as in a row with a gap and in one that is continued up to the context."""
    mask = jnp.broadcast_to(jnp.arange(12)[None] < 8, (4000, 12))
    given = np.asarray(draw_givens(jax.random.key(0), mask, 0.6))
    text, padding = given[:, :8], given[:, 8:]
    with_padding = padding.any(-1)
    np.testing.assert_array_equal(padding.all(-1), with_padding)
    assert abs(with_padding.mean() - 0.4) < 0.03  # two kinds of three
    without = text[~with_padding & text.any(-1)]
    assert abs(len(without) / len(given) - 0.2) < 0.03
    assert (np.diff(without.astype(int)) <= 0).all()  # a beginning
    assert not text[with_padding].all(-1).any()  # some token is always free


@pytest.mark.parametrize("first", [True, False])
def test_as_many_are_drawn_beside_marks_wherever_they_stand(first):
    """What is drawn among the eight that are not marked is drawn among eight that stand alone."""
    marked = jnp.broadcast_to((jnp.arange(16) < 8) == first, (4000, 16))
    mask = jnp.ones_like(marked)
    given = np.asarray(draw_givens(jax.random.key(0), mask, 1.0, marked))
    assert given[np.asarray(marked)].all()
    drawn = given[:, 8:] if first else given[:, :8]
    alone = np.asarray(draw_givens(jax.random.key(1), mask[:, :8], 1.0))
    for count in (drawn.any(-1), drawn.mean(-1)):
        of_alone = alone.any(-1) if count.dtype == bool else alone.mean(-1)
        assert abs(count.mean() - of_alone.mean()) < 0.025
    assert drawn.any(-1).mean() > 0.85
    assert not drawn.all(-1).any()
    half = np.asarray(draw_givens(jax.random.key(0), mask, 0.5, marked))
    drawn = half[:, 8:] if first else half[:, :8]
    assert abs(drawn.any(-1).mean() - alone.any(-1).mean() / 2) < 0.04


def dit_objective(givens, position_times=None):
    told = givens > 0 if position_times is None else position_times
    return Objective(
        model=DiT(67, 16, 2, 2, cond_dim=8, max_seq_len=12, position_times=told),
        process=HybridProcess(67, 66, 0.1),
        weighting="dynamic",
        min_weight=0.0,
        max_weight=2.0,
        stratified=True,
        mask_padding=True,
        align_mask_to_input=False,
        keep_padding_columns=False,
        noising=Noising(givens=givens),
    )


def toy_batch():
    """Random ids, each row with another number of padded positions."""
    tokens = np.random.default_rng(0).integers(0, 65, (8, 12)).astype(np.int32)
    mask = np.arange(12) < np.arange(5, 13)[:, None]
    return {"tokens": jnp.asarray(np.where(mask, tokens, 65)), "mask": jnp.asarray(mask)}


def test_given_tokens_stay_clean_at_time_0_and_have_no_loss():
    what, batch = dit_objective(1.0), toy_batch()
    noised = what.noise(jax.random.key(3), batch["tokens"], batch["mask"])
    given = np.asarray(noised.given)
    assert (given & np.asarray(batch["mask"])).any()
    assert (given & ~np.asarray(batch["mask"])).any()
    np.testing.assert_array_equal(noised.z_t[given], batch["tokens"][given])
    np.testing.assert_array_equal(noised.times[given], 0)
    times = np.broadcast_to(np.asarray(noised.t)[:, None], given.shape)
    np.testing.assert_array_equal(noised.times[~given], times[~given])
    params = what.model.init(jax.random.key(0), batch["tokens"], noised.times)["params"]
    params = jax.tree.map(lambda a: a + 0.1, nn.unbox(params))
    grads, metrics = jax.jit(lambda p: loss_and_grads(what, p, batch, noised, 1))(params)
    counted = np.asarray(batch["mask"]) & ~given
    plain = np.asarray(what.losses(params, batch["tokens"], noised).loss)
    np.testing.assert_allclose(metrics["loss"], plain[counted].mean(), rtol=1e-4)
    halves, again = jax.jit(lambda p: loss_and_grads(what, p, batch, noised, 2))(params)
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, halves)


def test_marked_tokens_are_given_in_every_row_and_draws_are_among_the_others():
    batch = toy_batch()
    marked = np.random.default_rng(1).random((8, 12)) < 0.4
    marked[:, 4] = False
    what = dit_objective(0.0)
    noised = what.noise(jax.random.key(3), batch["tokens"], batch["mask"], jnp.asarray(marked))
    np.testing.assert_array_equal(noised.given, marked)
    np.testing.assert_array_equal(noised.z_t[marked], batch["tokens"][marked])
    np.testing.assert_array_equal(noised.times[marked], 0)
    # The rest is what it is without marks.
    plain = what.noise(jax.random.key(3), batch["tokens"], batch["mask"])
    np.testing.assert_array_equal(noised.z_t[~marked], plain.z_t[~marked])
    both = dit_objective(1.0).noise(
        jax.random.key(3), batch["tokens"], batch["mask"], jnp.asarray(marked)
    )
    given = np.asarray(both.given)
    assert given[marked].all()
    assert (given & ~marked & np.asarray(batch["mask"])).any()
    assert not given[np.asarray(batch["mask"])].all()


@pytest.mark.parametrize("position_times", [True, False])
def test_marked_tokens_have_no_loss_in_training_and_no_bound_in_validation(position_times):
    """The same sums by hand, over what is neither padding nor marked."""
    what, batch = dit_objective(0.0, position_times), toy_batch()
    marked = np.random.default_rng(1).random((8, 12)) < 0.4
    marked[:, 4] = False
    batch["given"] = jnp.asarray(marked)
    counted = np.asarray(batch["mask"]) & ~marked
    x = batch["tokens"]
    params = nn.unbox(what.model.init(jax.random.key(0), x, jnp.zeros(8)))["params"]
    params = random_params(params)  # what the network says depends on the time
    noised = what.noise(jax.random.key(3), x, batch["mask"], batch["given"])
    _, metrics = loss_and_grads(what, params, batch, noised, 1)
    by_token = np.asarray(what.losses(params, x, noised).loss)
    np.testing.assert_allclose(metrics["loss"], by_token[counted].mean(), rtol=1e-4)

    sums = evaluation_step(what, params, batch, jax.random.key(5))
    loss_key, bound_key = jax.random.split(jax.random.key(5))
    bound = nelbo(
        what.process,
        # A network that takes one time a row is told the one that fits its share of noise.
        lambda z, t: what.apply(params, z, t if position_times else row_times(what.process, t)),
        bound_key,
        x,
        given=batch["given"],
    )
    np.testing.assert_array_equal(np.asarray(bound.total)[marked], 0)
    again = what.losses(params, x, what.noise(loss_key, x, marked=batch["given"])).loss
    assert int(sums["tokens"]) == counted.sum()
    np.testing.assert_allclose(sums["nelbo"], np.asarray(bound.total)[counted].sum(), rtol=1e-4)
    np.testing.assert_allclose(sums["loss"], np.asarray(again)[counted].sum(), rtol=1e-4)


def test_a_run_on_marked_arrays_goes_on_and_fills_in(tmp_path, caplog):
    """Rows whose second half repeats the first, which is given: a few steps learn to copy."""
    ids = np.random.default_rng(0).integers(0, 3, (64, 4))
    given = np.broadcast_to(np.arange(8) < 4, (64, 8))
    np.savez(tmp_path / "rows.npz", ids=np.concatenate([ids, ids], axis=1), given=given)
    changes = {
        "data.path": str(tmp_path / "rows.npz"),
        "data.tokenizer": "ids:3",
        "data.frame": "none",
        "data.validation": "last:16",
        "model.max_seq_len": 8,
        "train.num_steps": 60,
        "train.batch_size": 16,
        "checkpoint.every": 40,
        "optimizer.learning_rate": 1e-2,
    }
    half = tiny_settings(tmp_path, **{**changes, "train.num_steps": 40})
    train(half, tmp_path / "run")
    with caplog.at_level("INFO", logger="absl"):
        figures = train(tiny_settings(tmp_path, **changes), tmp_path / "run")
    assert "0 % of the training rows is padding" in caplog.text
    assert "no eval/bits_per_byte" not in caplog.text  # of arrays nobody looks for them
    assert "NaN" not in caplog.text
    assert figures["nelbo"] < np.log(3)
    model = Gidd.from_pretrained(tmp_path / "run")
    assert (model.row_mode, model.network.position_times) == ("none", True)
    puzzles = np.concatenate([ids[:8], np.full((8, 4), -1)], axis=1)
    filled = model.infill(puzzles, num_steps=8).ids
    np.testing.assert_array_equal(filled[:, :4], ids[:8])
    (name, split, corpus), *_ = open_corpora(
        model, str(tmp_path / "run"), None, None, max_documents=None, text_key=None,
        txt_documents=None,
    )  # fmt: skip
    assert (name, split) == (str(tmp_path / "rows.npz"), "validation")
    options = EstimatorOptions(num_samples_t=2)
    common = {"batch_size": 8, "seed": 0, "num_resamples": 10, "label": ""}
    scored, nats, tokens = score_corpus(model, corpus, options, **common)
    assert scored["tokens"] == tokens.sum() == 16 * 4
    chain = EstimatorOptions(estimator="chain", num_orders=1)
    assert score_corpus(model, corpus, chain, **common)[0]["tokens"] == 16 * 4
    # The bound of the given half beside the free one would be there, too.
    whole = corpus._replace(given=None)
    assert score_corpus(model, whole, options, **common)[0]["tokens"] == 16 * 8
    assert np.isfinite(nats).all()


class Noting:
    """A network that notes the shape of the times that it is told."""

    def __init__(self, network, position_times):
        self.network, self.position_times, self.told = network, position_times, []
        self.max_seq_len, self.vocab_size = network.max_seq_len, network.vocab_size

    def apply(self, params, z, t, *lengths):
        self.told.append(t.shape)
        return self.network.clone(position_times=self.position_times).apply(params, z, t, *lengths)


@pytest.mark.parametrize("position_times", [True, False])
def test_both_ways_to_the_bound_tell_a_network_of_marked_rows_what_it_knows(
    tmp_path, position_times
):
    ids = np.random.default_rng(0).integers(0, 3, (8, 8)).astype(np.int32)
    given = np.broadcast_to(np.arange(8) < 6, ids.shape)
    corpus = CorpusRows(ids, np.arange(8), np.zeros(8, np.int64), 8, given)
    changes = {"data.tokenizer": "ids:3", "data.frame": "none", "model.max_seq_len": 8}
    trained = tiny_model(tmp_path, **changes)
    common = {"batch_size": 8, "seed": 0}
    plain, estimator = (Noting(trained.network, position_times) for _ in range(2))
    model = dataclasses.replace(trained, network=plain)
    score_rows(model, corpus, num_samples_t=1, label="", **common)
    model = dataclasses.replace(trained, network=estimator)
    estimate_rows(model, corpus, EstimatorOptions(num_samples_t=1), **common)
    assert set(plain.told) == {(8, 8) if position_times else (8,)}
    assert {shape[1:] for shape in estimator.told} == {shape[1:] for shape in plain.told}


def test_without_givens_training_draws_what_it_drew_before():
    what, batch = dit_objective(0.0), toy_batch()
    with_mask = what.noise(jax.random.key(3), batch["tokens"], batch["mask"])
    without = what.noise(jax.random.key(3), batch["tokens"])
    assert with_mask.given is None
    np.testing.assert_array_equal(with_mask.z_t, without.z_t)
    assert with_mask.times.shape == without.t.shape


def test_one_time_everywhere_is_one_time_a_row():
    model = DiT(67, 16, 2, 2, cond_dim=8, max_seq_len=8)
    z = jax.random.randint(jax.random.key(0), (3, 8), 0, 67)
    t = jnp.array([0.1, 0.5, 0.9])
    params = nn.unbox(model.init(jax.random.key(1), z, t))["params"]
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape), params)
    by_row = model.apply({"params": params}, z, t)
    by_position = model.apply({"params": params}, z, jnp.broadcast_to(t[:, None], z.shape))
    np.testing.assert_allclose(by_row, by_position, rtol=1e-5, atol=1e-5)
    changed = jnp.broadcast_to(t[:, None], z.shape).at[:, 2].set(0.0)
    other = model.apply({"params": params}, z, changed)
    assert np.abs(np.asarray(other - by_row)[:, 2]).max() > 1e-3


def test_a_run_with_givens_is_told_times_of_positions_also_when_exported(tmp_path):
    tiny_settings(tmp_path)
    write_checkpoint(tmp_path / "run", tmp_path, **{"data.givens": 0.5})
    model = Gidd.from_pretrained(tmp_path / "run")
    assert model.network.position_times
    assert not tiny_model(tmp_path).network.position_times
    model.save_pretrained(tmp_path / "exported")
    exported = Gidd.from_pretrained(tmp_path / "exported")
    assert exported.network.position_times
    texts = [model.infill([["ab", 3]], num_steps=3).texts for model in (model, exported)]
    assert texts[0] == texts[1]
    plain = dataclasses.replace(model, network=model.network.clone(position_times=False))
    scores = [m.log_likelihood(["men"], prompts=["ab"]).log_probs[0] for m in (model, plain)]
    assert abs(scores[0] - scores[1]) > 1e-3  # the times differ, and so does the network's word


def test_only_diffusion_fills_in_beside_given_tokens(tmp_path):
    with pytest.raises(InputError, match=r"data.givens = 0.5: only diffusion fills in beside"):
        tiny_settings(tmp_path, "ar", **{"data.givens": 0.5})
    with pytest.raises(InputError, match=r"data.givens = 1.5: must be in \[0, 1\]"):
        tiny_settings(tmp_path, **{"data.givens": 1.5})
