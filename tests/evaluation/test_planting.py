"""Planted errors: how many, of which kind, and drawn from what."""

import numpy as np
import pytest
from scipy import stats
from tiny_checkpoint import tiny_model

from gidd_jax import Gidd
from gidd_jax.errors import InputError
from gidd_jax.evaluation import planting
from gidd_jax.evaluation.corpora import CorpusRows
from gidd_jax.evaluation.planting import classes_of, confused, judged_rows, ordinary_ids, planted
from gidd_jax.inference.prompts import Rows


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Gidd:
    return tiny_model(tmp_path_factory.mktemp("data"))


def test_random_errors_replace_the_share_by_other_ordinary_tokens():
    ordinary = np.arange(3, 13)
    rows = Rows(np.full((200, 50), 5), np.ones((200, 50), bool), np.full(200, 50))
    rows.free[:, :5] = False
    few, many = (planted(rows, ordinary, share, seed=1) for share in (0.1, 0.3))
    assert np.all(few.rows.ids[:, :5] == 5)
    np.testing.assert_array_equal(many.kinds == 1, many.rows.ids != 5)  # never the same token
    assert np.all(many.kinds <= 1)
    changed = many.rows.ids[rows.free] != 5
    np.testing.assert_allclose(changed.mean(), 0.3, atol=4 * np.sqrt(0.21 / 9000))
    counts = np.bincount(many.rows.ids[many.rows.ids != 5], minlength=13)
    assert stats.chisquare(np.delete(counts, 5)[3:]).pvalue > 1e-3
    assert counts[:3].sum() == 0
    few, many = few.rows.ids, many.rows.ids
    assert np.all((few == many)[few != 5])
    assert np.mean(few != many) > 0.1
    np.testing.assert_array_equal(rows.ids, 5)


def test_half_of_the_errors_are_confusable():
    """Ten tokens of two classes: a confusable error stays in its class, a random one need not."""
    ordinary, classes = np.arange(3, 13), np.repeat([0, 1], 5)
    rng = np.random.default_rng(0)
    clean = Rows(rng.choice(ordinary, (200, 50)), np.ones((200, 50), bool), np.full(200, 50))
    got = planted(clean, ordinary, 0.2, 1, classes)
    again = planted(clean, ordinary, 0.2, 1, classes)
    np.testing.assert_array_equal(got.rows.ids, again.rows.ids)
    same = planted(clean, ordinary, 0.2, 1)
    np.testing.assert_array_equal(got.kinds > 0, same.kinds > 0)  # the same places
    is_random, is_confusable = got.kinds == 1, got.kinds == 2
    np.testing.assert_array_equal(got.rows.ids[is_random], same.rows.ids[is_random])
    np.testing.assert_array_equal(got.rows.ids != clean.ids, got.kinds > 0)
    share = is_confusable.sum() / (got.kinds > 0).sum()
    np.testing.assert_allclose(share, 0.5, atol=4 * 0.5 / np.sqrt(2000))
    before, after = (classes[ids - 3] for ids in (clean.ids, got.rows.ids))
    assert np.all((before == after)[is_confusable])
    left = np.mean((before != after)[is_random])
    np.testing.assert_allclose(left, 5 / 9, atol=4 * 0.5 / np.sqrt(is_random.sum()))


def test_confusable_tokens_are_the_nearest_in_frequency(monkeypatch):
    monkeypatch.setattr(planting, "NEAREST", 4)
    classes = np.array([0, 1, 1, 1, 1, 1, 1, 1])
    counts = np.array([99, 10, 70, 20, 60, 30, 50, 40])  # of class 1 by count: 2 4 6 7 5 3 1
    u = (np.arange(4000) + 0.5) / 4000
    for token, near in ((7, [3, 4, 5, 6]), (2, [4, 5, 6, 7]), (1, [3, 5, 6, 7]), (4, [2, 5, 6, 7])):
        found, count = np.unique(
            confused(np.full(4000, token), u, classes, counts), return_counts=True
        )
        np.testing.assert_array_equal(found, near)
        np.testing.assert_array_equal(count, 1000)
    assert confused(np.array([0]), np.array([0.9]), classes, counts).tolist() == [0]  # alone
    monkeypatch.setattr(planting, "NEAREST", 20)  # more than there are
    found = np.unique(confused(np.full(4000, 7), u, classes, counts))
    np.testing.assert_array_equal(found, [1, 2, 3, 4, 5, 6])


def test_what_is_alone_in_its_class_gets_random_errors():
    ordinary = np.arange(3, 8)
    rows = Rows(np.full((20, 50), 5), np.ones((20, 50), bool), np.full(20, 50))
    got = planted(rows, ordinary, 0.5, 0, np.arange(5))
    assert set(np.unique(got.kinds)) == {0, 1}
    np.testing.assert_array_equal(got.rows.ids != 5, got.kinds == 1)
    with pytest.raises(InputError, match="errors need two tokens that are not special"):
        planted(rows, np.array([5]), 0.5, 0)


def test_ordinary_tokens_are_those_that_write_text(model):
    tokenizer = model.tokenizer
    special = [tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
    assert sorted({*range(tokenizer.vocab_size)} - {*ordinary_ids(model)}) == sorted(special)


def test_classes_are_of_what_tokens_write(model, monkeypatch):
    words = [" a", " b", "a", "A", " Z", "7", " 8", ".", ", ", " ", "", "\udcff", "\u4e2d"]
    monkeypatch.setattr(planting, "written_by", lambda tokenizer, ids: [words[i] for i in ids])
    got = classes_of(model.tokenizer, np.arange(len(words))).tolist()
    alike = [{words[i] for i in np.flatnonzero(np.array(got) == c)} for c in sorted(set(got))]
    assert {frozenset(words) for words in alike} == {
        frozenset(words)
        for words in (
            {" a", " b"},
            {"a", "\u4e2d"},
            {"A"},
            {" Z"},
            {"7"},
            {" 8"},
            {".", ", ", "\udcff"},
            {" "},
            {""},
        )
    }


def test_letters_of_a_tokenizer_are_told_from_digits(model):
    ids = [int(ids[0]) for ids in model.tokenizer.encode(["a", "b", "B", "7", "."])]
    a, b, capital, digit, sign = classes_of(model.tokenizer, np.array(ids))
    assert a == b
    assert len({a, capital, digit, sign}) == 4


def test_texts_without_ordinary_tokens_are_refused(model):
    ids = [np.full(3, model.tokenizer.eos_id)]
    corpus = CorpusRows(ids, np.zeros(1), np.zeros(1), 1)
    with pytest.raises(InputError, match="no token but special ones"):
        judged_rows(corpus, ordinary_ids(model), model.tokenizer.pad_id)
