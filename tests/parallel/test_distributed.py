"""Two real processes with two virtual devices each: one run, killed, stopped, read elsewhere."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from golden_llama import GOLDEN
from published_folders import write_words
from tiny_run import (
    TRAIN,
    environment,
    figures_by_step,
    saved_arrays,
    steps_on_disk,
    tiny_config,
    tiny_settings,
)

from gidd_jax.checkpoints.checkpoint import Checkpointer
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.inference.gidd import Gidd
from gidd_jax.interchange.start import from_start
from gidd_jax.parallel.sharding import activate, make_mesh
from gidd_jax.training.build import build_objective
from gidd_jax.training.loop import train
from gidd_jax.training.optimizer import make_optimizer
from gidd_jax.training.programs import state_maker

CHANGES = {
    "train.num_steps": 10,
    "train.eval_every": 5,
    "train.eval_batches": 1,
    "model.num_layers": 1,
    "optimizer.ema_decay": 0.9,
}

# Forks of a process that has imported everything and touched no device: the seconds of importing
# are spent once for both. The last is waited for first: where it was killed the other is ended as a
# launcher would, since JAX takes the 100 s of its heartbeat to notice.
PAIR = """
import faulthandler, json, os, signal, sys
import gidd_jax.inference.gidd, gidd_jax.training.loop
program, argvs = json.load(sys.stdin)
children, codes = [], [0, 0]
for number, argv in enumerate(argvs):
    children.append(os.fork())
    if children[-1] == 0:
        faulthandler.dump_traceback_later(240, exit=True)  # what hangs does not stay
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(f"{number}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["-c", *argv]
        exec(program, {"__name__": "__main__"})
        sys.exit()
codes[1] = os.waitstatus_to_exitcode(os.waitpid(children[1], 0)[1])
if codes[1] < 0:
    os.kill(children[0], signal.SIGKILL)
codes[0] = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
print(*codes)
"""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Corpus, tokenizer and config.py."""
    folder = tmp_path_factory.mktemp("distributed")
    values = tiny_config(folder, **CHANGES).to_json()
    (folder / "config.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({values!r}))\n"
    )
    return folder


def run_two(
    folder: Path, workdir: Path, number: int = 0, at: int = 0, more: tuple[str, ...] = ()
) -> list[Ended]:
    """Train on two processes, the second of which sends itself a signal before a batch."""
    signals = [["0", "0"], [str(number), str(at)]]
    flags = [f"--config={folder / 'config.py'}", f"--workdir={workdir}", *more]
    return two_processes(folder, TRAIN, [[*own, *flags] for own in signals])


def two_processes(folder: Path, program: str, arguments: list[list[str]]) -> list[Ended]:
    """Run a program with `arguments` of its own in two processes that know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = ["--distributed", f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    argvs = [[*own, *cluster, f"--process_id={i}"] for i, own in enumerate(arguments)]
    done = subprocess.run(
        [sys.executable, "-c", PAIR],
        input=json.dumps([program, argvs]),
        cwd=folder,
        env=environment(folder, JAX_NUM_CPU_DEVICES="2"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    codes = map(int, done.stdout.split())
    return [Ended(code, (folder / f"{i}.err").read_text()) for i, code in enumerate(codes)]


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """The workdir of ten steps by two processes in one go."""
    ended = run_two(folder, folder / "finished")
    assert [end.code for end in ended] == [0, 0], ended[0].err + ended[1].err
    assert "Process 1 of 2 with 2 of 4 devices" in ended[1].err
    assert "step 10/10" in ended[0].err
    assert "step 10/10" not in ended[1].err  # process 0 alone writes
    return folder / "finished"


def figures(workdir: Path) -> dict[tuple[int, str], float]:
    return {
        (step, name): value
        for step, values in figures_by_step(workdir).items()
        for name, value in values.items()
    }


def test_two_processes_train_as_one(folder, finished, tmp_path):
    """Same batches, noise and updates: losses, validation and parameters of four local devices."""
    with jax.default_device(None):
        settings = tiny_settings(folder, **CHANGES, **{"mesh.data": 8})
        train(settings, tmp_path / "run")
    ours, alone = figures(finished), figures(tmp_path / "run")
    assert ours.keys() == alone.keys()
    assert {name for _, name in ours} >= {"train/loss", "eval/nelbo", "eval/bits_per_byte"}
    for key, value in ours.items():
        np.testing.assert_allclose(value, alone[key], rtol=1e-5, atol=1e-6, err_msg=str(key))


@pytest.mark.parametrize("kind", ["run", "exported", "llama"])
def test_two_processes_begin_with_the_same_start(folder, finished, tmp_path, kind):
    """Weights read onto the devices of both: the first losses are those of eight local ones."""
    start = finished
    changes = {"train.num_steps": 2, "train.eval_every": 0}
    if kind == "exported":
        start = tmp_path / "exported"
        Gidd.from_pretrained(finished).save_pretrained(start)
    if kind == "llama":  # new tokens, and adapters
        start = shutil.copytree(GOLDEN / "smollm", tmp_path / "llama")
        write_words(start, 67, special=())
        changes |= {"data.tokenizer": "start", "adapt.lora_rank": 2}
        changes |= {"model.name": "llama", "model.cond_dim": 0}
    changes["model.start"] = str(start)
    flags = tuple(f"--config.{key}={value}" for key, value in changes.items())
    ended = run_two(folder, tmp_path / "two", more=(*flags, "--config.mesh.fsdp=2"))
    assert [end.code for end in ended] == [0, 0], ended[0].err + ended[1].err
    settings, begin = from_start(tiny_settings(folder, **CHANGES | changes, **{"mesh.data": 8}))
    with jax.default_device(None):
        train(settings, tmp_path / "run", start=begin)
    ours, alone = figures(tmp_path / "two"), figures(tmp_path / "run")
    if kind != "llama":  # it did begin there
        assert ours[1, "train/loss"] < 0.9 * figures(finished)[1, "train/loss"]
    for step in (1, 2):
        np.testing.assert_allclose(
            ours[step, "train/loss"], alone[step, "train/loss"], rtol=1e-5, atol=1e-6
        )


def restored(folder: Path, workdir: Path, mesh: jax.sharding.Mesh) -> Any:
    """The newest state of a run, read by this process alone onto another mesh."""
    settings = tiny_settings(folder, **CHANGES)
    tokenizer = load_tokenizer(settings.data.tokenizer)
    objective = build_objective(settings, tokenizer.vocab_size, tokenizer.mask_id)
    optimizer = make_optimizer(settings.optimizer, settings.model, settings.train.num_steps)
    with (
        activate(mesh),
        Checkpointer(
            workdir, every=4, max_to_keep=1, config=settings.to_dict(), tokenizer=tokenizer
        ) as checkpointer,
    ):
        return checkpointer.restore(state_maker(settings, objective, optimizer, mesh)[1])[0]


def test_a_killed_pair_goes_on_and_is_read_on_other_devices(folder, finished):
    """One process dies, the launcher ends the other, and the restarted pair repeats its numbers.

    Its checkpoint is then read by one process, on one device and on eight as another mesh.

    To 1e-6: the order in which Gloo adds the processes' gradients is not promised. Most runs were
    bitwise equal, one on a busy machine was 3e-8 off. Runs of one process are held to every bit.
    """
    workdir = folder / "killed"
    ended = run_two(folder, workdir, signal.SIGKILL, 7)
    assert ended[1].code == -signal.SIGKILL
    assert ended[0].code != 0
    assert steps_on_disk(workdir) == [4]
    again = run_two(folder, workdir)
    assert [end.code for end in again] == [0, 0], again[0].err
    assert "Continuing from step 4" in again[0].err
    found, wanted = saved_arrays(workdir), saved_arrays(finished)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    assert figures(workdir).keys() == figures(finished).keys()
    for mesh in (make_mesh(1, 1, 1, devices=jax.devices()[:1]), make_mesh(2, 2, 2)):
        state = restored(folder, workdir, mesh)
        assert int(state.step) == 10
        for tree, name in ((state.params, "params"), (state.ema, "ema")):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                assert leaf.sharding.device_set == set(mesh.devices.flat)
                key = f"['{name}']{jax.tree_util.keystr(path)}"
                np.testing.assert_array_equal(leaf, found[key], err_msg=key)


def test_sigterm_to_one_stops_all_after_one_step(folder, finished):
    """A preemption notice reaches one host; the checkpoint is that of all."""
    workdir = folder / "stopped"
    ended = run_two(folder, workdir, signal.SIGTERM, 4)
    assert [end.code for end in ended] == [0, 0], ended[0].err
    last = steps_on_disk(workdir)[-1]
    assert 4 <= last < 10
    assert f"Stopped after step {last}: the same command continues from there" in ended[0].err
    # Elsewhere: one process with eight devices, and another mesh.
    settings = tiny_settings(folder, **CHANGES, **{"mesh.data": 2, "mesh.fsdp": 4})
    train(settings, workdir)
    ours, theirs = figures(workdir), figures(finished)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6, err_msg=str(key))


def test_hosts_with_other_code_or_settings_are_refused(folder):
    """Where the file is may differ; both end at once, and nothing is written."""
    text = (Path(__file__).parents[2] / "examples" / "cosine.py").read_text()
    flags = [f"--config={folder / 'config.py'}", f"--workdir={folder / 'refused'}"]
    names = []
    for number, own in enumerate((text, text + "# changed\n")):
        (folder / f"cosine_{number}.py").write_text(own)
        names.append(f"--config.process.name=cosine_{number}.py:CosineProcess")
    arguments = [["0", "0", *flags, name, f"--config.seed={i}"] for i, name in enumerate(names)]
    ended = two_processes(folder, TRAIN, arguments)
    for number, end in enumerate(ended):
        assert end.code == 2, end.err
        (line,) = (line for line in end.err.splitlines() if line.startswith("error: "))
        assert "the processes of this run were started differently (" in line
        assert f"seed is {number} on this process; process.name is CosineProcess of " in line
    arguments[1][-2] = "--config.process.name=missing.py:CosineProcess"
    ended = two_processes(folder, TRAIN, arguments)
    assert [end.code for end in ended] == [2, 2], ended[0].err + ended[1].err
    words = "missing.py:CosineProcess: no such file: missing.py"
    assert f"error: process 1: {words}\n" in ended[0].err
    assert f"error: {words}\n" in ended[1].err
    assert not (folder / "refused").exists()


@pytest.mark.slow
def test_two_processes_sample_and_score_as_one(folder, finished, tmp_path):
    """Five rows in batches of two: the processes share them, and process 0 writes all."""
    tasks = {
        "sample": ["--num_samples=5", "--num_steps=4", "--batch_size=2"],
        "evaluate": ["--num_samples_t=2", "--batch_size=2", "--bootstrap=10"],
    }
    for name, arguments in tasks.items():
        suffix = "npz" if name == "sample" else "json"
        arguments += [f"--checkpoint={finished}"]
        files = [tmp_path / f"{who}.{suffix}" for who in ("two", "one")]
        program = f"import runpy; runpy.run_module('gidd_jax.{name}', None, '__main__', True)"
        ended = two_processes(folder, program, [[*arguments, f"--out={files[0]}"]] * 2)
        assert [end.code for end in ended] == [0, 0], ended[0].err + ended[1].err
        alone = [sys.executable, "-m", f"gidd_jax.{name}", *arguments, f"--out={files[1]}"]
        subprocess.run(alone, env=environment(folder), check=True, stdout=subprocess.DEVNULL)
        if name == "sample":
            found, wanted = (dict(np.load(file, allow_pickle=False)) for file in files)
            np.testing.assert_array_equal(found["ids"], wanted["ids"])
            assert found["texts"].tobytes() == wanted["texts"].tobytes() != b""
        else:
            found, wanted = (json.loads(f.read_text())["corpora"][0] for f in files)
            assert found["tokens"] == wanted["tokens"] > 0
            assert found["nelbo"] == pytest.approx(wanted["nelbo"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_processes=2"], "--num_processes needs --distributed"),
        (["--distributed", "--process_id=0"], "--process_id needs --coordinator_address, --num_"),
        (
            [
                "--distributed",
                "--coordinator_address=127.0.0.1:1",
                "--num_processes=2",
                "--process_id=2",
            ],
            "--process_id=2: must be less than --num_processes=2",
        ),
        (["--distributed", "--workdir="], "on a cluster that JAX does not know give"),
    ],
)
def test_wrong_flags_are_one_line(folder, tmp_path, arguments, words):
    given = [f"--config={folder / 'config.py'}", f"--workdir={tmp_path / 'run'}", *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "gidd_jax.train", *given],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
    assert not (tmp_path / "run").exists()
