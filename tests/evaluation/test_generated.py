"""Figures of generated texts at their edges: what does not determine one is null, with a note."""

import json
import sys
import types

import numpy as np
import pytest
from published_folders import llama_folder

from gidd_jax import Gidd
from gidd_jax.data.texts import read_texts
from gidd_jax.evaluation import generated, scorers
from gidd_jax.evaluation.reports import finite
from gidd_jax.inference.samples import Samples, save_samples

ALONE = "one sample alone determines the figure: it has no error"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden):
    weights = golden("c06_llama_state_dict.safetensors")
    return llama_folder(tmp_path_factory.mktemp("scorer") / "llama", weights)


@pytest.fixture(scope="module")
def judge(folder) -> scorers.Scorer:
    return scorers.load_scorer(str(folder))


def figures(judge, texts, references=None):
    found = generated.figures(
        judge, texts, references, max_length=32, batch_size=8, num_resamples=50, seed=0
    )
    json.dumps(found, allow_nan=False)
    assert finite(found) == json.loads(json.dumps(found))
    return found


def nulls(found: dict) -> set[str]:
    return {name for name, value in found.items() if value is None and name != "mauve"}


@pytest.mark.filterwarnings("error")
def test_one_sample_has_figures_without_errors(judge):
    found = figures(judge, ["w1 w2 w1 w2"])
    assert found["token_entropy"] == pytest.approx(np.log(2))
    assert (found["distinct_1"], found["distinct_2"], found["distinct_3"]) == (0.5, 2 / 3, 1.0)
    per_sample = [f"distinct_{n}_per_sample_interval" for n in (1, 2, 3)]
    errors = ["gen_ppl_interval", "nll_standard_error", "token_entropy_interval", *per_sample]
    assert nulls(found) == set(errors)
    assert found["notes"] == dict.fromkeys(errors, ALONE)


@pytest.mark.filterwarnings("error")
def test_texts_of_one_token_have_no_longer_n_grams(judge):
    """One of two tokens is scored; none of three is there."""
    found = figures(judge, ["w1", "w2", "w1 w2", ""])
    assert (found["tokens"], found["distinct_1"], found["distinct_2"]) == (1, 0.5, 1.0)
    assert found["token_entropy"] == pytest.approx(np.log(2) / 3)
    assert found["nll"] == pytest.approx(figures(judge, ["w1 w2", ""])["nll"], rel=1e-6)
    absent = ["distinct_3", "distinct_3_per_sample"]
    assert nulls(found) == {*absent, "distinct_3_per_sample_interval"} | {
        "distinct_2_per_sample_interval"
    }
    assert found["notes"] == dict.fromkeys(absent, "no sample has 3 tokens") | {
        "distinct_2_per_sample_interval": ALONE
    }


@pytest.mark.filterwarnings("error")
def test_samples_that_are_all_the_same_have_no_spread(judge):
    found = figures(judge, ["w3 w4 w5 w3"] * 6)
    assert found["nll_standard_error"] == pytest.approx(0.0, abs=1e-9)
    low, high = found["gen_ppl_interval"]
    assert low == pytest.approx(found["gen_ppl"], rel=1e-9)
    assert high == pytest.approx(found["gen_ppl"], rel=1e-9)
    assert found["distinct_1"] == 3 / 24
    assert found["distinct_1_per_sample_interval"] == (0.75, 0.75)
    assert not nulls(found)
    assert "notes" not in found


def test_a_sample_with_several_ends_is_one_text(judge, folder, tmp_path):
    model = Gidd.from_pretrained(folder)
    end, pad = model.tokenizer.eos_id, model.tokenizer.pad_id
    ids = np.array([[1, 2, end, 3, end, end, 4, pad], [end, 5, 6, end, 7, 8, 9, end]], np.int32)
    none = np.zeros(ids.shape)
    texts = [model.decode(row) for row in ids]
    save_samples(
        tmp_path / "a.npz", Samples(ids, texts, none, none, 1, none[:, 0]), model.tokenizer
    )
    read = read_texts(tmp_path / "a.npz", "--samples").texts
    assert read == ["w1 w2 w3 w4", "w5 w6 w7 w8 w9"]
    found = figures(judge, read)
    assert (found["tokens"], found["distinct_1"]) == (3 + 4, 1.0)


@pytest.fixture
def measured(monkeypatch) -> list[tuple[int, int]]:
    """Stands in for mauve-text, and keeps how many references and samples it was given."""
    calls: list[tuple[int, int]] = []

    def compute_mauve(*, p_features, q_features, seed, verbose):
        assert p_features.shape[1:] == q_features.shape[1:] == (64,)
        calls.append((len(p_features), len(q_features)))
        return types.SimpleNamespace(mauve=0.5)

    stub = types.ModuleType("mauve")
    stub.compute_mauve = compute_mauve  # type: ignore[attr-defined]
    stub.__spec__ = types.SimpleNamespace(name="mauve")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "mauve", stub)
    return calls


TEXTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(30)]


@pytest.mark.parametrize(
    ("texts", "references", "words"),
    [
        (TEXTS, TEXTS[:1], "and there are 30 and 1"),
        (TEXTS, TEXTS[:3], "and there are 30 and 3"),
        (TEXTS, [TEXTS[0]] * 30, "and there are 30 and 1"),
        (TEXTS, ["", *TEXTS[:19]], "and there are 30 and 19"),
        (TEXTS[:19], TEXTS, "and there are 19 and 30"),
    ],
)
def test_mauve_of_few_texts_is_null_with_a_note(judge, measured, texts, references, words):
    found = figures(judge, texts, references)
    assert found["mauve"] is None
    assert found["mauve_note"].startswith("not computed: it needs 20 samples and 20 different ref")
    assert found["mauve_note"].endswith(words)
    assert not measured


def test_mauve_of_enough_texts(judge, measured):
    found = figures(judge, [TEXTS[0]] * 25, ["", *TEXTS[:20]])
    assert found["mauve"] == 0.5
    assert found["mauve_note"] == "of hidden states of the scorer, with 20 references"
    assert measured == [(20, 25)]
