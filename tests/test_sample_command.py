"""The commands sample and self_correct: what they write, and one line for what goes wrong."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from gidd_jax.data.texts import read_texts
from gidd_jax.sampling.trace import load_trace, play
from gidd_jax.views.replay_page import replay_page


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """The workdir of a diffusion model."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, tmp_path_factory.mktemp("data"), "gidd")
    return folder


def command(module: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"gidd_jax.{module}", *flags],
        capture_output=True,
        text=True,
        check=False,
        env={
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "HOME": "/nonexistent",
            **environment,
        },
    )


def test_samples_are_written_and_corrected(run_folder, tmp_path):
    out, corrected = tmp_path / "a" / "samples.npz", tmp_path / "corrected.npz"
    trace_file, page = tmp_path / "a" / "trace.npz", tmp_path / "replay.html"
    first = command(
        "sample",
        f"--checkpoint={run_folder}",
        "--num_samples=3",
        "--num_steps=4",
        f"--out={out}",
        f"--trace={trace_file}",
        f"--replay={page}",
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("--- sample") == 3
    with np.load(out, allow_pickle=False) as file:
        assert file["ids"].shape == (3, 16)
        assert file["ids"].dtype == np.int32
        assert int(file["network_calls"]) in (4, 5)
        ids = file["ids"]
    texts = read_texts(out, "--samples").texts
    trace = load_trace(trace_file)
    for row in range(3):
        np.testing.assert_array_equal(play(trace.changes, row).ids[-1], ids[row])
    assert page.read_text("utf-8") == replay_page(trace, f"Samples of {run_folder}")
    assert f"--- sample 1 ---\n{texts[1]}\n" in first.stdout

    second = command(
        "self_correct",
        f"--checkpoint={run_folder}",
        f"--samples={out}",
        f"--out={corrected}",
        "--num_steps=6",
        "--tokens_per_step=2",
        f"--trace={trace_file}",
        f"--replay={page}",
    )
    assert second.returncode == 0, second.stderr
    assert "initial_accuracy: mean" in second.stdout
    with np.load(corrected, allow_pickle=False) as file, np.load(out) as before:
        changes = np.sum(file["ids"] != before["ids"], axis=-1)
        np.testing.assert_array_equal(file["num_changes"], changes)
        trace = load_trace(trace_file)
        np.testing.assert_array_equal(trace.changes.start, before["ids"])
        np.testing.assert_array_equal(play(trace.changes, 2).ids[-1], file["ids"][2])
    assert page.read_text("utf-8") == replay_page(trace, f"Corrections by {run_folder}")
    with corrected.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["num_changes"]) for row in rows] == changes.tolist()
    assert all(0 <= float(row["final_accuracy"]) <= 1 for row in rows)


def test_prompts_and_texts(run_folder, tmp_path):
    prompted = command(
        "sample",
        f"--checkpoint={run_folder}",
        "--prompt=It is",
        "--prompt=men",
        "--num_steps=2",
        "--method=psi",
        "--kappa=0.9",
    )
    assert prompted.returncode == 0, prompted.stderr
    assert "--- sample 0 ---\nIt is" in prompted.stdout
    texts = tmp_path / "texts.txt"
    texts.write_text("It is a truth\n\nsingle men\n")
    out = tmp_path / "out.npz"
    corrected = command(
        "self_correct",
        f"--checkpoint={run_folder}",
        f"--samples={texts}",
        f"--out={out}",
        "--num_steps=2",
    )
    assert corrected.returncode == 0, corrected.stderr
    assert corrected.stdout.count("--- text") == 2


def test_greedy_samples_from_masks_are_the_same_and_said_to_be(run_folder):
    result = command(
        "sample",
        f"--checkpoint={run_folder}",
        "--num_samples=4",
        "--num_steps=4",
        "--temperature=0",
        "--method=confidence",
        PYTHONIOENCODING="ascii",  # and characters that the terminal lacks are written out
    )
    assert result.returncode == 0, result.stderr
    texts = re.findall(
        r"--- sample \d ---\n(.*?)\n(?=\n---|\n\d+ network)", result.stdout, re.DOTALL
    )
    assert len(texts) == 4
    assert len(set(texts)) == 1
    assert "note: all 4 samples are the same: temperature=0 draws nothing\n" in result.stdout


def test_escape_codes_in_texts_are_written_out(run_folder, tmp_path):
    text, out = "\x1b[2J\u00e9\r", tmp_path / "out.npz"
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}))
    flags = [f"--checkpoint={run_folder}", "--num_steps=1"]
    sampled = command("sample", *flags, f"--prompt={text}", PYTHONIOENCODING="ascii")
    assert sampled.returncode == 0, sampled.stderr
    assert "--- sample 0 ---\n\\x1b[2J\\xe9\\r" in sampled.stdout
    assert "\x1b" not in sampled.stdout
    flags += [f"--samples={tmp_path / 'texts.jsonl'}", "--tokens_per_step=1", f"--out={out}"]
    corrected = command("self_correct", *flags, PYTHONIOENCODING="utf-8")
    assert corrected.returncode == 0, corrected.stderr
    assert "\x1b" not in corrected.stdout
    assert read_texts(out, "--samples").texts[0].count("\x1b") == corrected.stdout.count("\\x1b")


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("sample", ["--checkpoint={empty}"], "holds no checkpoint: give the workdir of a run"),
        ("sample", ["--checkpoint={empty}/missing"], "no such folder"),
        ("sample", ["--checkpoint={run}", "--out=samples.txt"], "--out must end in .npz"),
        ("sample", ["--checkpoint={run}", "--out={file}/samples.npz"], "is not a folder"),
        ("sample", ["--checkpoint={run}", "--trace=t.txt"], "--trace must end in .npz"),
        ("sample", ["--checkpoint={run}", "--replay={empty}/r"], "--replay must end in .html"),
        ("sample", ["--checkpoint={run}", "--watch"], "--watch needs a terminal"),
        ("sample", ["--checkpoint={run}", "--prompt="], "prompt 1 is empty"),
        (
            "sample",
            ["--checkpoint={run}", "--prompt=\udcff"],
            "prompt 1 is no UTF-8 text: byte 0xff",
        ),
        (
            "self_correct",
            ["--checkpoint={run}", "--samples={empty}/no.npz", "--out=o.npz"],
            "no such file",
        ),
        (
            "self_correct",
            ["--checkpoint={run}", "--samples={file}.npz", "--out=o.npz"],
            "is no file of samples",
        ),
        (
            "self_correct",
            ["--checkpoint={run}", "--samples={blank}", "--out=o.npz"],
            "blank.txt holds no text",
        ),
        (
            "self_correct",
            ["--checkpoint={run}", "--samples={none}", "--out=o.npz"],
            "none.npz holds no token",
        ),
        ("highlight", ["--checkpoint={run}", "--text={blank}"], "blank.txt holds no text"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_folder, tmp_path, module, flags, message):
    file = tmp_path / "file"
    file.write_text("text")
    (tmp_path / "file.npz").write_text("text")
    (tmp_path / "empty").mkdir()
    blank, none = tmp_path / "blank.txt", tmp_path / "none.npz"
    blank.touch()
    np.savez(none, ids=np.zeros((0, 16), np.int32))
    files = {"file": file, "blank": blank, "none": none}
    values = files | {"run": run_folder, "empty": tmp_path / "empty"}
    result = command(module, *(flag.format(**values) for flag in flags))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
