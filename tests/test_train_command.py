"""The train command as people run it: killed, stopped, misused; exit codes and one-line errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tiny_run import (
    TRAIN,
    assert_same_arrays,
    contents,
    environment,
    figures_by_step,
    saved_arrays,
    steps_on_disk,
    tiny_config,
)

# Runs the command once per line of arguments, each time in a fork of a process that has imported
# everything and touched no device: the seconds of importing are spent once.
MANY = """
import json, os, runpy, sys
import gidd_jax.training.loop
for number, argv in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["train", *argv]
        runpy.run_module("gidd_jax.train", run_name="__main__", alter_sys=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Corpus, tokenizer and config.py of a run that keeps an average and crops documents."""
    folder = tmp_path_factory.mktemp("command")
    changes = {
        "data.mode": "crop",
        "model.num_layers": 1,
        "optimizer.ema_decay": 0.9,
        "train.eval_batches": 1,
        "checkpoint.max_to_keep": 10,
    }
    values = tiny_config(folder, **changes).to_json()
    (folder / "config.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({values!r}))\n"
    )
    (folder / "empty.txt").write_text("")
    return folder


def run_train(folder: Path, workdir: Path, number: int = 0, at: int = 0) -> Result:
    """Train; the command sends itself a signal before its `at`-th batch."""
    arguments = [str(number), str(at), f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """The workdir of 20 steps in one go."""
    result = run_train(folder, folder / "finished")
    assert result.code == 0, result.err
    assert "validation: loss " in result.out
    assert f"workdir: {folder / 'finished'}" in result.out
    return folder / "finished"


def test_kill_9_and_sigterm_leave_a_run_that_goes_on_bitwise(folder, finished):
    workdir = folder / "killed"
    killed = run_train(folder, workdir, signal.SIGKILL, 15)
    assert killed.code == -signal.SIGKILL
    saved = steps_on_disk(workdir)
    assert saved in ([4, 8], [4, 8, 12])  # the third may have been on its way

    stopped = run_train(folder, workdir, signal.SIGTERM, 3)
    assert stopped.code == 0, stopped.err
    last = saved[-1] + 3  # it finished its third step
    assert f"Continuing from step {saved[-1]}" in stopped.err
    assert f"Stopped after step {last}: the same command continues from there" in stopped.err
    assert steps_on_disk(workdir)[-1] == last
    assert f"validation: none since this start\nworkdir: {workdir}" in stopped.out
    assert list(figures_by_step(workdir)) == list(range(1, last + 1))

    assert run_train(folder, workdir).code == 0
    assert_same_arrays(saved_arrays(workdir), saved_arrays(finished))
    assert list(figures_by_step(workdir)) == list(range(1, 21))
    assert figures_by_step(workdir) == figures_by_step(finished)


def truncated(finished: Path, to: Path) -> Path:
    """A copy of a workdir whose largest arrays lost their second halves."""
    shutil.copytree(finished, to)
    for file in (to / "checkpoints" / "20" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            os.truncate(file, file.stat().st_size // 2)
    return to


CASES = {  # name: (arguments, words of the error)
    "missing corpus": (["--config.data.path={folder}/nowhere.txt"], "nowhere.txt"),
    "empty corpus": (["--config.data.path={folder}/empty.txt"], "empty.txt"),
    "missing tokenizer": (["--config.data.tokenizer={folder}/nowhere"], "no tokenizer folder"),
    "unknown key": (["--config.train.batchsize=8"], "did you mean train.batch_size?"),
    "illegal value": (["--config.train.weighting=none"], "train.weighting = 'none': must be"),
    "odd batch": (["--config.train.batch_size=12"], "use a multiple of 8"),
    "wrong mesh": (["--config.mesh.fsdp=3"], "do not multiply to the number of devices, 8"),
    "another config": (["--workdir={folder}/finished", "--config.model.num_layers=2"], "1 -> 2"),
    "truncated checkpoint": (["--workdir={folder}/truncated"], "checkpoints/20 is damaged"),
    "no wandb": (["--config.logging.wandb=True"], "pip install 'gidd-jax[wandb]'"),
    "workdir is a file": (["--workdir={folder}/empty.txt"], "is a file, name a folder"),
    "negative scale": (["--config.process.scale=-1"], "process.scale = -1.0: must be >= 0"),
    "bucket": (["--workdir=s3://bucket/run"], "gs://BUCKET/FOLDER; mount another store"),
    "no config": (["--config=nowhere"], "the shipped configs are"),
}


@pytest.fixture(scope="module")
def results(folder, finished) -> dict[str, tuple[Result, bool]]:
    """What each case of CASES gave, and whether it left its workdir as it was."""
    truncated(finished, folder / "truncated")
    commands, workdirs, before = [], [], []
    for number, (arguments, _) in enumerate(CASES.values()):
        workdir = f"--workdir={folder}/new{number}"
        argv = [f"--config={folder}/config.py", workdir]
        argv += [argument.format(folder=folder) for argument in arguments]
        commands.append(argv)
        last = [word for word in argv if word.startswith("--workdir=")][-1]
        workdirs.append(Path(last.removeprefix("--workdir=")))
        before.append(contents(workdirs[-1]))
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(commands),
        cwd=folder,
        env=environment(folder, JAX_NUM_CPU_DEVICES="8"),
        capture_output=True,
        text=True,
        check=True,
    )
    codes = [int(line) for line in done.stdout.split()]
    found = {}
    for number, (name, code) in enumerate(zip(CASES, codes, strict=True)):
        out, err = ((folder / f"{number}.{suffix}").read_text() for suffix in ("out", "err"))
        untouched = contents(workdirs[number]) == before[number]
        found[name] = (Result(code, out, err), untouched)
    return found


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_touches_nothing(results, case):
    result, untouched = results[case]
    assert result.code == 2, result.err
    assert result.out == ""
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert CASES[case][1] in lines[0]
    assert untouched


def test_a_tokenizer_without_pad_and_mask_is_completed(folder, finished):
    """The run's tokenizer folder names neither; the checkpoint's has both, after the 257 ids."""
    given = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    kept = json.loads((finished / "tokenizer" / "tokenizer.json").read_text())
    added = [{token["content"]: token["id"] for token in t["added_tokens"]} for t in (given, kept)]
    assert "[PAD]" not in added[0]
    assert added[1].items() >= {"[PAD]": 257, "[MASK]": 258}.items()
    table = saved_arrays(finished)["['params']['vocab_embed']['embedding']"]
    assert table.shape == (384, 32)  # 259 tokens, filled up to a multiple of 128
    assert np.all(np.isfinite(table))


def test_divergence_is_exit_code_1(folder, tmp_path):
    """A learning rate that no float survives."""
    config = folder / "diverging.py"
    text = (folder / "config.py").read_text()
    config.write_text(text.replace('"learning_rate": 0.003', '"learning_rate": 1e+38'))
    assert config.read_text() != text
    done = subprocess.run(
        [sys.executable, "-m", "gidd_jax.train", f"--config={config}", f"--workdir={tmp_path}/run"],
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the ")
    assert "the run stopped" in last
    assert "Traceback" not in done.stderr
    for step in steps_on_disk(tmp_path / "run"):
        arrays = saved_arrays(tmp_path / "run", step)
        assert all(np.all(np.isfinite(array)) for array in arrays.values())
