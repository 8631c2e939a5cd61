"""gidd_jax.evaluate: two corpora in one call, as a table and as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint
from tiny_run import tiny_settings


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder of the tiny run's corpus and tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    tiny_settings(folder)
    return folder


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gidd_jax.evaluate", *flags],
        capture_output=True,
        text=True,
        check=False,
        env={"JAX_PLATFORMS": "cpu", "HOME": "/nonexistent"},
    )


def test_command(data, tmp_path):
    """Two corpora in one call: a table of two lines, and the same figures as JSON."""
    write_checkpoint(tmp_path / "run", data)
    (tmp_path / "other.jsonl").write_text('{"story": "A short one."}\n{"story": "Another."}\n')
    (tmp_path / "more,longer.jsonl").write_text(
        '{"story": "Once upon a time, and so on and on."}\n'
    )
    out = tmp_path / "new" / "metrics.json"
    done = command(
        f"--checkpoint={tmp_path}/run",
        f"--data={tmp_path}/other.jsonl,{tmp_path}/more,longer.jsonl",
        "--text_key=story",
        "--num_samples_t=2",
        f"--out={out}",
    )
    assert done.returncode == 0, done.stderr
    header, first, second, says, note, written = done.stdout.splitlines()
    assert says == "bound: lower bound of log p of the sampler with many steps"
    assert note.startswith(f"{tmp_path}/more,longer.jsonl: documents: one alone is scored: ")
    assert header.split()[:5] == ["data", "quantity", "documents", "tokens", "nats/token"]
    report = json.loads(out.read_text())
    assert report["num_samples_t"] == 2
    assert report["process"].startswith("HybridProcess(vocab_size=259, mask_id=258")
    for line, corpus, documents in zip((first, second), report["corpora"], (2, 1), strict=True):
        assert line.split()[0] == corpus["data"]
        assert line.split()[1] == corpus["quantity"] == "bound"
        assert line.split()[2] == str(corpus["documents"]) == str(documents)
        assert float(line.split()[4]) == pytest.approx(corpus["nelbo"], abs=1e-4)
        calls = (2 + 2) * corpus["rows"] / corpus["tokens"]
        assert corpus["calls_per_token"] == pytest.approx(calls)
    assert second.split()[5] == "-"
    assert report["corpora"][1]["nelbo_standard_error"] is None
    assert written == f"wrote {out}"
    assert not list(out.parent.glob("*.part"))

    before = out.read_text()
    refused = command(f"--checkpoint={tmp_path}/run", f"--data={tmp_path}/no.txt", f"--out={out}")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: data path ")
    assert len(refused.stderr.splitlines()) == 1
    assert out.read_text() == before


def test_a_split_and_weights_that_nothing_heeds_are_refused(data, tmp_path):
    """They would stand in the report beside figures that they had no part in."""
    write_checkpoint(tmp_path / "run", data)
    run = f"--checkpoint={tmp_path}/run"
    for flags, words in (
        ([f"--data={data}/corpus.txt", "--split=train"], "--split=train: files are read whole"),
        ([f"--data=0.7:{data}/corpus.txt,0.3:embedded"], "weights say how often a corpus is"),
    ):
        refused = command(run, *flags)
        assert refused.returncode == 2
        assert words in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_estimators_and_a_second_model(data, tmp_path):
    """Quantities that say what they bound; a model against itself, and against another."""
    run, other = tmp_path / "run", tmp_path / "other"
    write_checkpoint(run, data)
    write_checkpoint(other, data, **{"model.num_layers": 1})
    out = tmp_path / "metrics.json"
    flags = (f"--checkpoint={run}", f"--out={out}")
    importance = ("--estimator=importance", "--num_paths=3", "--path_steps=4", "--max_documents=3")
    done = command(*flags, *importance, f"--against={other}")
    assert done.returncode == 0, done.stderr
    assert "mean of log w: lower bound of log p of the ancestral sampler with 4" in done.stdout
    report = json.loads(out.read_text())
    assert (report["estimator"], report["num_samples_t"]) == ("importance", 0)
    loose, tight = report["corpora"][0]["quantities"]
    assert loose["nats_per_token"] > tight["nats_per_token"]
    tokens, rows = report["corpora"][0]["tokens"], report["corpora"][0]["rows"]
    assert loose["calls_per_token"] == pytest.approx(3 * 5 * rows / tokens)
    assert report["corpora"][0]["against"]["difference"] != 0
    assert 0 <= report["corpora"][0]["against"]["share_better"] <= 1

    done = command(*flags, "--num_samples_t=2", "--max_documents=3", f"--against={run}")
    assert done.returncode == 0, done.stderr
    against = json.loads(out.read_text())["corpora"][0]["against"]
    assert against["difference"] == 0
    assert against["difference_interval"] == [0, 0]

    one = ("--estimator=chain", "--chain_order=left_to_right", "--num_orders=1")
    done = command(*flags, *one, "--max_documents=2")
    assert done.returncode == 0, done.stderr
    (exact,) = json.loads(out.read_text())["corpora"][0]["quantities"]
    assert exact["says"].startswith("exact log p of one token a call")
    assert exact["calls_per_token"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--estimator=chain", "--num_samples_t=4"), "num_samples_t has no effect with estimator"),
        (("--num_paths=3",), "num_paths has no effect with estimator 'bound'"),
        (("--estimator=chain", "--num_orders=0"), "num_orders must be at least 1"),
    ],
)
def test_estimators_that_are_none_are_one_line(data, tmp_path, flags, message):
    write_checkpoint(tmp_path / "run", data)
    done = command(f"--checkpoint={tmp_path}/run", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_autoregressive_model_has_no_estimator_and_is_no_rival_of_diffusion(data, tmp_path):
    write_checkpoint(tmp_path / "run", data)
    write_checkpoint(tmp_path / "ar", data, "ar")
    done = command(f"--checkpoint={tmp_path}/ar", "--estimator=importance")
    assert done.returncode == 2
    assert "this model is autoregressive: its log p is exact" in done.stderr
    done = command(f"--checkpoint={tmp_path}/run", f"--against={tmp_path}/ar")
    assert done.returncode == 2
    assert "the first token of a row counts for one of them only" in done.stderr
