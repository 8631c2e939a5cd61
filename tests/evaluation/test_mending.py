"""Planted errors mended: by correctors whose rates are known, in words, and by the command."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fresh_command import fresh_command
from tiny_checkpoint import tiny_model, write_checkpoint

from gidd_jax import Gidd
from gidd_jax.errors import InputError
from gidd_jax.evaluation.corpora import CorpusRows
from gidd_jax.evaluation.mending import (
    Mended,
    best_of,
    check_ways,
    comparison,
    mend,
    table_line,
    verdict,
)
from gidd_jax.evaluation.planting import classes_of, judged_rows, ordinary_ids, planted
from gidd_jax.sampling.options import CorrectionOptions, correction_grid

SETTINGS = {"batch_size": 4, "num_resamples": 50, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def model(folder) -> Gidd:
    return tiny_model(folder)


def corpus_of(model: Gidd, count: int = 60) -> CorpusRows:
    """Rows of letters, digits and signs, two of each document."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEF0123456789.,;!"
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(letters), 15)) for _ in range(count)]
    return CorpusRows(model.tokenizer.encode(texts), np.arange(count) // 2, np.zeros(count), 30)


def test_rates_of_a_corrector_that_is_known(model, monkeypatch):
    """It sees the truth: restores 6 of 10 random errors, spoils others, damages 1 in 20."""
    corpus, ordinary = corpus_of(model), ordinary_ids(model)
    clean = judged_rows(corpus, ordinary, model.tokenizer.pad_id)
    noisy = planted(clean, ordinary, 0.3, 3, classes_of(model.tokenizer, ordinary))
    u = np.random.default_rng(1).random(clean.ids.shape)
    third = next(i for i in ordinary if i not in np.concatenate([clean.ids, noisy.rows.ids]))
    restored = np.where((noisy.kinds == 1) & (u < 0.6), clean.ids, noisy.rows.ids)
    spoilt = (noisy.kinds == 2) | ((noisy.kinds == 0) & (u < 0.05))
    ids = np.where(spoilt & clean.free, third, restored)

    def correct(rows, *, batch_size, seed, ends, options):
        np.testing.assert_array_equal(rows.ids, noisy.rows.ids)
        assert (batch_size, seed, ends) == (4, 3, False)  # rows of a corpus hold their ends
        return SimpleNamespace(ids=ids, network_calls=7)

    monkeypatch.setattr(Gidd, "correct", staticmethod(correct))
    (got,) = mend(model, corpus, 0.3, [CorrectionOptions(t=0.2)], **SETTINGS)
    figures = got.figures
    json.dumps(figures, allow_nan=False)
    assert (figures["score"], figures["t"], figures["network_calls"]) == ("proposal", 0.2, 7)
    random, confusable = figures["random"], figures["confusable"]
    assert random["wrong"] + confusable["wrong"] == figures["wrong"] == (noisy.kinds > 0).sum()
    assert random["right"] == confusable["right"] == figures["right"]
    assert random["touch"] == random["recover"]
    assert abs(random["recover"] - 0.6) < 4 * np.sqrt(0.24 / random["wrong"])
    assert (confusable["touch"], confusable["recover"]) == (1.0, 0.0)
    assert abs(figures["damage"] - 0.05) < 4 * np.sqrt(0.0475 / figures["right"])
    wrong = (clean.free & (ids != clean.ids)).sum()
    np.testing.assert_allclose(figures["wrong_after"], wrong / clean.free.sum())
    assert got.wrong.sum() == wrong
    assert len(got.wrong) == len(got.tokens) == 30
    assert got.tokens.sum() == 900
    line = table_line(figures)
    assert line.startswith("proposal     0.2    0.1  ")
    assert line.endswith(
        f"  {100 * random['touch']:.1f}% / {100 * random['touch']:.1f}% 100.0% / 0.0%"
    )


def test_rows_of_a_model_change_where_they_may(model):
    """The real corrector, both scores: the same errors, and figures that belong to its ids."""
    corpus = corpus_of(model, 6)
    ways = correction_grid(
        ["proposal", "suspicion"], ["0.1"], ["1"], {"num_steps": 2, "threshold": 0.0}
    )
    by_proposal, by_suspicion = mend(model, corpus, 0.3, ways, **SETTINGS)
    assert by_proposal.figures["wrong"] == by_suspicion.figures["wrong"] > 0
    assert by_suspicion.figures["network_calls"] == 2  # one batch on eight devices, two steps
    changed = [by_suspicion.figures[name] for name in ("touched", "damaged")]
    assert 6 <= sum(changed) <= 12  # a token a step and row, perhaps the same one twice
    empty = CorpusRows([np.array([model.tokenizer.eos_id])], np.zeros(1), np.zeros(1), 1)
    with pytest.raises(InputError, match="no token but special ones"):
        list(mend(model, empty, 0.3, ways, **SETTINGS))


def ways_of(wrong: dict[tuple[str, float], list[int]]) -> list[Mended]:
    return [
        Mended(CorrectionOptions(score=score, t=t), {}, np.array(left), np.full(len(left), 100))
        for (score, t), left in wrong.items()
    ]


def test_the_better_corrector_is_named_where_it_is_shown():
    left = np.random.default_rng(0).integers(0, 10, 40)
    mended = ways_of({("proposal", 0.1): left + 4, ("proposal", 0.2): left + 9})
    assert comparison(mended, 100, 0) is None
    mended += ways_of({("suspicion", 0.1): left + 1, ("suspicion", 0.3): left})
    assert best_of(mended, "proposal").options.t == 0.1
    found = comparison(mended, 100, 0)
    np.testing.assert_allclose(found["fewer_wrong"], 0.04)
    np.testing.assert_allclose(found["fewer_wrong_interval"], 0.04)  # paired: no document varies
    assert verdict(found) == (
        "score suspicion is the better corrector: suspicion at t = 0.3 and temperature 0.1 leaves "
        "4.00% (4.00 to 4.00) of all tokens fewer wrong than "
        "proposal at t = 0.1 and temperature 0.1"
    )
    worse = comparison([*mended[:2], *ways_of({("suspicion", 0.1): left + 6})], 100, 0)
    assert verdict(worse).startswith("score proposal is the better corrector: ")
    shuffled = comparison([*mended[:1], *ways_of({("suspicion", 0.1): left[::-1] + 4})], 100, 0)
    assert verdict(shuffled).startswith("neither score is shown to be the better corrector: ")
    one = ways_of({("proposal", 0.1): [3], ("suspicion", 0.1): [1]})
    assert verdict(comparison(one, 100, 0)).startswith("neither score is shown")


def test_a_line_without_errors_has_dashes():
    rates = ("touch", "recover")
    none = {name: None for rate in rates for name in (rate, f"{rate}_interval")}
    figures = {
        **none,
        "damage": 0.0125,
        "damage_interval": (0.0, 0.025),
        "wrong_after": 0.0125,
        **{kind: none for kind in ("random", "confusable")},
    }
    line = table_line(figures | {"score": "suspicion", "t": 0.05, "temperature": 1.0})
    assert line.split("  ")[0] == "suspicion "[:9]
    assert "1.25% (0.00 to 2.50)" in line
    assert line.endswith("- / -         - / -")


def test_grids_of_options():
    got = correction_grid(
        ["proposal", "suspicion"], ["0.1", "0.2"], ["0", "1"], {"num_steps": 9, "threshold": 0.3}
    )
    assert len(got) == len(set(got)) == 8
    assert {way.num_steps for way in got} == {9}
    assert {(way.score, way.threshold) for way in got} == {("proposal", 0.5), ("suspicion", 0.3)}
    for given, message in (
        ((["proposal"], ["0.1"], ["1"], {"threshold": 0.3}), "threshold has no effect with score"),
        ((["loss"], ["0.1"], ["1"], {}), "unknown score 'loss'"),
        (([], ["0.1"], ["1"], {}), "--score is empty: use proposal or suspicion"),
        ((["proposal"], ["soon"], ["1"], {}), "--t=soon: give numbers"),
        ((["proposal"], ["0.1"], [], {}), "--temperature is empty: give numbers"),
    ):
        with pytest.raises(InputError, match=message):
            correction_grid(*given)


def test_models_without_the_score_are_refused(folder):
    with pytest.raises(InputError, match="self-correction needs a diffusion model"):
        check_ways(tiny_model(folder, "ar"), [CorrectionOptions()])
    with pytest.raises(InputError, match="use score 'proposal'"):
        check_ways(tiny_model(folder, "mdlm"), [CorrectionOptions(score="suspicion")])
    check_ways(tiny_model(folder, "mdlm"), [CorrectionOptions()])


# The command.


def test_the_command_measures(folder, tmp_path):
    write_checkpoint(tmp_path / "run", folder)
    out = tmp_path / "mended.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "gidd_jax.self_correct",
            f"--checkpoint={tmp_path / 'run'}",
            "--planted=0.2",
            "--score=proposal,suspicion",
            "--t=0.1",
            "--temperature=0.5",
            "--num_steps=2",
            "--bootstrap=20",
            f"--out={out}",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "HOME": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [one["score"] for one in report["figures"]] == ["proposal", "suspicion"]
    assert (report["planted"], report["documents"], report["split"]) == (0.2, 4, "validation")
    lines = done.stdout.splitlines()
    assert lines[2:4] == [table_line(one) for one in report["figures"]]
    assert lines[4] == verdict(report["comparison"])
    assert lines[5] == f"wrote {out}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say what to do: --samples=FILE corrects it, --planted=SHARE measures"),
        (["--samples=a.txt", "--planted=0.1"], "say what to do"),
        (["--samples=a.txt"], "--out is required with --samples: name a file"),
        (["--samples=a.txt", "--data=b.txt"], "--data has no effect with --samples: it belongs to"),
        (["--planted=0.1", "--trace=t.npz"], "--trace has no effect with --planted: it belongs to"),
        (["--planted=0.1", "--out=a.npz"], "--out must end in .json"),
        (["--planted=0.1", "--threshold=0.2"], "threshold has no effect with score 'proposal'"),
        (["--samples=a.txt", "--t=0.1,0.2"], "take one value each without --planted"),
        (["--samples=a.txt", "--t=soon"], "--t=soon: give numbers"),
    ],
)
def test_the_command_says_what_is_wrong_before_the_model_is_looked_for(flags, message):
    with pytest.raises(InputError, match=message):
        fresh_command("self_correct", "--checkpoint=nowhere", *flags).main([])


def test_one_corpus_is_measured_on(folder, tmp_path):
    write_checkpoint(tmp_path / "run", folder)
    flags = [f"--checkpoint={tmp_path / 'run'}", "--planted=0.1", "--data=a.txt,b.txt"]
    with pytest.raises(InputError, match=r"--data=a\.txt,b\.txt names 2 corpora: give one"):
        fresh_command("self_correct", *flags).main([])
