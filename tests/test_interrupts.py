"""Ctrl-C: long commands end in one line and exit code 130, and leave no half-written file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_checkpoint import write_checkpoint
from tiny_run import environment, tiny_config

# Runs commands in forks of a process that has imported everything: each gets Ctrl-C when it calls
# the function that is named beside it, MODULE:FUNCTION or MODULE:CLASS.METHOD.
MANY = """
import importlib, json, operator, os, runpy, signal, sys
import gidd_jax.inference.gidd, gidd_jax.training.loop
for number, (name, target, argv) in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        for stream, suffix in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{suffix}", os.O_WRONLY | os.O_CREAT), stream)
        module, _, path = target.partition(":")
        owner, _, attribute = path.rpartition(".")
        imported = importlib.import_module(module)
        owner = operator.attrgetter(owner)(imported) if owner else imported
        def interrupted(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
        setattr(owner, attribute, interrupted)
        sys.argv = [name, *argv]
        runpy.run_module(f"gidd_jax.{name}", run_name="__main__", alter_sys=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
LOADING = "gidd_jax.checkpoints.checkpoint:Checkpoint.tokenizer"
TRAINING = "gidd_jax.training.loop:train"
CASES = {  # command: (function, arguments)
    "train": (TRAINING, ["--config={folder}/config.py", "--workdir={folder}/run"]),
    "quickstart": (TRAINING, ["--workdir={folder}/run"]),
    "sweep": (TRAINING, ["--config=ablation", "--workdir={folder}/run"]),
    "sample": (
        "numpy:savez",
        ["--checkpoint={folder}/model", "--num_samples=2", "--num_steps=2", "--out={folder}/o.npz"],
    ),
    "self_correct": (
        LOADING,
        ["--checkpoint={folder}/model", "--samples={folder}/corpus.txt", "--out={folder}/o.npz"],
    ),
    "evaluate": (LOADING, ["--checkpoint={folder}/model", "--out={folder}/o.json"]),
    "generative_ppl": (
        "gidd_jax.evaluation.scorers:load_scorer",
        ["--scorer=gpt2", "--samples={folder}/corpus.txt", "--out={folder}/o.json"],
    ),
    "highlight": (
        LOADING,
        ["--checkpoint={folder}/model", "--text={folder}/corpus.txt", "--out={folder}/o.html"],
    ),
    "check": ("gidd_jax.evaluation.certify:toy_checks", []),
    "plots": (
        "gidd_jax.views.pictures:run_pictures",
        ["--workdir={folder}/model", "--out={folder}/o"],
    ),
    "replay": (
        "gidd_jax.sampling.trace:load_trace",
        ["--trace={folder}/t.npz", "--out={folder}/o.html"],
    ),
    "convert": (LOADING, ["--checkpoint={folder}/model", "--out={folder}/o"]),
}
RESUMED = {"train", "quickstart", "sweep"}


class Result(NamedTuple):
    code: int
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Corpus, tokenizer, config.py, and a checkpoint."""
    folder = tmp_path_factory.mktemp("interrupts")
    values = tiny_config(folder).to_json()
    (folder / "config.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({values!r}))\n"
    )
    write_checkpoint(folder / "model", folder, **{"model.num_layers": 1})
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, Result]:
    """How each command of CASES ended."""
    commands = [
        (name, target, [argument.format(folder=folder) for argument in arguments])
        for name, (target, arguments) in CASES.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(commands),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=True,
    )
    codes = map(int, done.stdout.split())
    errors = [(folder / f"{number}.err").read_text() for number in range(len(CASES))]
    return dict(zip(CASES, map(Result, codes, errors), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_code_130(results, folder, name):
    code, err = results[name]
    assert code == 130, err
    again = "continues from what is done" if name in RESUMED else "starts again"
    assert err.splitlines()[-1] == (
        f"error: interrupted; no file is half-written: the same command {again}"
    )
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err
    assert not list(folder.glob("o.*")) or {file.suffix for file in folder.glob("o.*")} == {".part"}
    assert not (folder / "o").exists()
