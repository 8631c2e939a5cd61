"""prepare_data as a command: resumption after a kill, verification, refusals, help."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gidd_jax.cli import load_config
from gidd_jax.data import shards
from gidd_jax.data.corpus import DATASETS
from gidd_jax.data.preparation import prepare
from gidd_jax.errors import InputError
from gidd_jax.prepare_data import EXAMPLES
from gidd_jax.settings import Settings


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gidd_jax.prepare_data", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    texts = [f"Document {i}. " + f"Some words, number {i}. " * 200 for i in range(600)]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return file


def options(corpus: Path, **changes: object) -> dict[str, Any]:
    values = {
        "path": str(corpus),
        "validation": "last:20",
        "seq_len": 64,
        "mode": "packed",
        "text_key": "text",
        "txt_documents": "file",
        "shard_size": 10,
        "num_workers": 1,
    }
    return {**values, **changes}


def arguments(corpus: Path, out: Path) -> list[str]:
    values = {**options(corpus), "tokenizer": "embedded", "out": out}
    return [f"--{k}={v}" for k, v in values.items()]


def make(corpus: Path, out: Path, **changes: object) -> shards.Manifest:
    return prepare(tokenizer_name="embedded", out=out, **options(corpus, **changes))


def children(pid: int) -> list[int]:
    """Running child processes, on Linux."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def hashes(out: Path) -> dict[str, str]:
    return {f.name: shards.sha256(f) for f in sorted(out.glob("*.array_record"))}


def test_killed_run_continues_to_the_same_shards(corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    manifest = make(corpus, whole, num_workers=2)
    assert manifest.totals("train")["documents"] == 580
    assert len(hashes(whole)) == 60

    process = subprocess.Popen(command(*arguments(corpus, killed)), start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("done/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = children(process.pid)
    assert workers
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{p}").exists() for p in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [p for p in workers if Path(f"/proc/{p}").exists()]
    finished = {f.name for f in killed.glob("done/*.json")}
    assert 3 <= len(finished) < 60
    assert not (killed / shards.MANIFEST).exists()
    times = {f: (killed / f.removesuffix(".json")).stat().st_mtime_ns for f in finished}
    (killed / "train-00000.array_record.part").write_text("left by the kill")

    again = run(*arguments(corpus, killed))
    assert again.returncode == 0, again.stderr
    assert "train: 580 documents" in again.stdout
    assert hashes(killed) == hashes(whole)
    # What was finished has not been made again.
    assert times == {f: (killed / f.removesuffix(".json")).stat().st_mtime_ns for f in finished}
    assert not list(killed.rglob("*.part"))
    assert shards.Manifest.read(killed) == shards.Manifest.read(whole)


@pytest.mark.parametrize("moment", ["while the workers import", "while they work"])
def test_interrupted_run_is_one_line_and_goes_on(corpus, tmp_path, moment):
    """Ctrl-C reaches the workers too, which say nothing; the next start makes what is missing."""
    out = tmp_path / "shards"
    values = {**options(corpus), "num_workers": 2, "tokenizer": "embedded", "out": out}
    process = subprocess.Popen(
        command(*(f"--{name}={value}" for name, value in values.items())),
        start_new_session=True,  # a group of its own, as a shell makes it
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if moment == "while they work" and len(list(out.glob("done/*.json"))) >= 3:
            break
        if moment == "while the workers import" and len(children(process.pid)) >= 3:
            break
        time.sleep(0.005)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert (process.returncode, err) == (
        130,
        "error: interrupted; no file is half-written: "
        "the same command continues from what is done\n",
    )
    assert workers
    while any(Path(f"/proc/{p}").exists() for p in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [p for p in workers if Path(f"/proc/{p}").exists()]
    assert not (out / shards.MANIFEST).exists()
    assert make(corpus, out, num_workers=2) == shards.verify(out)
    assert not list(out.rglob("*.part"))


def test_deleted_shard_is_made_again_and_changed_one_is_found(corpus, tmp_path):
    made = make(corpus, tmp_path, shard_size=300)
    before = hashes(tmp_path)
    file = tmp_path / "train-00001.array_record"
    file.unlink()
    with pytest.raises(InputError, match="is missing"):
        shards.verify(tmp_path)
    assert make(corpus, tmp_path, shard_size=300) == made
    assert hashes(tmp_path) == before
    with pytest.raises(InputError, match=r"made with other settings \(seq_len\)"):
        make(corpus, tmp_path, shard_size=300, seq_len=32)
    data = file.read_bytes()
    file.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    verified = run(f"--out={tmp_path}", "--verify")
    assert verified.returncode == 2
    assert verified.stderr.startswith("error: shard")
    assert "train-00001.array_record is damaged" in verified.stderr


def test_bad_input(corpus, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not empty"):
        make(corpus, tmp_path / "full")
    with pytest.raises(InputError, match="is a file"):
        make(corpus, corpus)
    with pytest.raises(InputError, match="data mode 'cropped'"):
        make(corpus, tmp_path / "out", mode="cropped")
    done = run("--path=x", "--out=y")
    assert (done.returncode, done.stderr) == (2, "error: --tokenizer is required: see --help\n")


def test_bad_document_in_a_worker_is_one_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"body": "b"}\n{"text": "c"}\n')
    done = run(*arguments(file, tmp_path / "out"), "--validation=last:1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "JSON document 2 has no 'text'; it has: body" in done.stderr


def test_help_is_quick_and_shows_examples():
    start = time.monotonic()
    done = run("--help")
    assert time.monotonic() - start < 3
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert "--shard_size" in done.stdout


def documented_corpora() -> list[dict[str, str]]:
    """The settings in the table of large corpora in docs/scaling.md."""
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text("utf-8")
    lines = page.partition("## Large corpora")[2].partition("\n## ")[0].splitlines()
    names, _, *rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_documented_corpora_have_legal_settings():
    corpora = documented_corpora()
    assert [one.pop("corpus").split(",")[0] for one in corpora] == [
        "OpenWebText",
        "LM1B",
        "FineWeb",
    ]
    for one in corpora:
        config = load_config("gidd")
        changes: dict[str, Any] = {f"data.{k}": v for k, v in one.items() if k != "seq_len"}
        config.update_from_flattened_dict({**changes, "model.max_seq_len": int(one["seq_len"])})
        settings = Settings.from_config(config)
        kind, _, name = settings.data.path.partition(":")
        assert kind in DATASETS, name
        assert settings.data.validation.split(":")[0] in ("last", "hash", "split")
        # The examples of --help say the same, apart from what is the default there.
        (example,) = [e for e in EXAMPLES.splitlines() if f"--path={one['path']} " in e]
        rest = EXAMPLES.partition(example)[2].splitlines()[1]
        flags = dict(word[2:].split("=") for word in f"{example} {rest}".split() if "=" in word)
        defaults = {"mode": "packed"}
        assert {**defaults, **flags}.items() >= one.items()
