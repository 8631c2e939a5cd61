"""Whole runs of seconds: resumption, seeds, stopping, skipped steps, divergence, bad input."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_run import (
    VOCAB_SIZE,
    assert_same_arrays,
    contents,
    figures_by_step,
    saved_arrays,
    steps_on_disk,
    tiny_settings,
)

from gidd_jax.checkpoints.workdir import lock_workdir
from gidd_jax.data.pipeline import TrainBatches
from gidd_jax.errors import DivergenceError, InputError
from gidd_jax.parallel import sharding
from gidd_jax.settings import Settings
from gidd_jax.training import loop
from gidd_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("on_first_device")

# A run with everything that has to survive a restart: crops, parts of a batch, an average.
RUN = {
    "data.mode": "crop",
    "optimizer.ema_decay": 0.9,
    "train.micro_batches": 2,
    "train.eval_every": 10,
    "checkpoint.max_to_keep": 10,
}


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """Runs of this module share compiled steps, as they would share them in one process."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    old = {name: getattr(jax.config, name) for name in wanted}
    for values in (wanted, old):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is wanted:
            yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Corpus and tokenizer."""
    return tmp_path_factory.mktemp("data")


@contextlib.contextmanager
def watched_batches(before: Callable[[int], None] | None = None) -> Iterator[list[np.ndarray]]:
    """Record the tokens of the training batches; `before(n)` is called before the n-th is given."""
    seen: list[np.ndarray] = []
    original = TrainBatches.__next__

    def watched(self):
        if before is not None:
            before(len(seen) + 1)
        batch = original(self)
        seen.append(batch["tokens"].copy())
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainBatches, "__next__", watched)
        yield seen


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run of 20 steps in one go."""

    workdir: Path
    settings: Settings
    figures: dict[str, float]
    batches: list[np.ndarray]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Finished:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    settings = tiny_settings(folder, **RUN)
    with watched_batches() as batches:
        figures = train(settings, workdir)
    return Finished(workdir, settings, figures, batches)


def assert_same_run(workdir: Path, finished: Finished) -> None:
    assert_same_arrays(saved_arrays(workdir), saved_arrays(finished.workdir))
    assert figures_by_step(workdir) == figures_by_step(finished.workdir)


# ---- resumption


def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    """20 steps in one go = 14 steps, of which 12 are saved, and 8."""

    def die(number):
        if number == 15:
            raise OSError("the power is gone")

    workdir = tmp_path / "run"
    with watched_batches(die), pytest.raises(OSError, match="the power is gone"):
        train(finished.settings, workdir)
    assert steps_on_disk(workdir) == [4, 8, 12]
    assert max(figures_by_step(workdir)) >= 13  # written, but to be done again
    with watched_batches() as seen:
        figures = train(finished.settings, workdir)
    assert figures == finished.figures
    assert list(figures_by_step(workdir)) == list(range(1, 21))
    assert_same_run(workdir, finished)
    np.testing.assert_array_equal(seen, finished.batches[12:])


def test_a_finished_run_only_evaluates_again(finished, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    with watched_batches() as seen:
        assert train(finished.settings, workdir) == finished.figures
    assert not seen
    assert_same_run(workdir, finished)


def test_a_shorter_run_than_what_is_there_only_evaluates(finished, folder, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    figures = train(tiny_settings(folder, **RUN, **{"train.num_steps": 16}), workdir)
    assert figures == finished.figures
    assert steps_on_disk(workdir)[-1] == 20


def test_seeds(finished, folder, tmp_path):
    train(finished.settings, tmp_path / "same")
    assert_same_run(tmp_path / "same", finished)
    train(tiny_settings(folder, **RUN, seed=1), tmp_path / "other")
    ours, theirs = saved_arrays(tmp_path / "other", 4), saved_arrays(finished.workdir, 4)
    kernels = [name for name in ours if "params" in name and "kernel" in name]
    assert kernels
    assert all(np.any(ours[name] != theirs[name]) for name in kernels)
    losses = [
        figures_by_step(run)[1]["train/loss"] for run in (tmp_path / "other", finished.workdir)
    ]
    assert losses[0] != losses[1]


def test_another_config_in_the_same_workdir(finished, folder, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    before = contents(workdir)
    changed = {"optimizer.learning_rate": 1e-3, "train.num_steps": 22, "train.eval_every": 0}
    settings = tiny_settings(folder, **{**RUN, **changed})
    with pytest.raises(InputError) as error:
        train(settings, workdir)
    message = str(error.value)
    assert "optimizer.learning_rate: 0.003 -> 0.001" in message
    assert "num_steps" not in message
    assert "eval_every" not in message
    assert "--allow_config_change" in message
    assert "\n" not in message
    assert contents(workdir) == before

    # Asked to, it continues from its last step with the new config, and is that run from then on.
    for step in (16, 20):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    settings = tiny_settings(folder, **{**RUN, "data.mode": "padded"})
    train(settings, workdir, allow_config_change=True)
    ours, theirs = figures_by_step(workdir), figures_by_step(finished.workdir)
    assert list(ours) == list(theirs) == list(range(1, 21))
    assert [step for step in ours if ours[step] != theirs[step]] == list(range(13, 21))
    assert json.loads((workdir / "config.json").read_text())["data"]["mode"] == "padded"
    with pytest.raises(InputError, match=r"data\.mode: padded -> crop"):
        train(finished.settings, workdir)


def test_length_logging_and_cadence_may_change(finished, folder, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    changed = {
        "train.num_steps": 23,
        "checkpoint.every": 5,
        "checkpoint.max_to_keep": 2,
        "logging.every": 2,
    }
    with watched_batches() as seen:
        train(tiny_settings(folder, **{**RUN, **changed}), workdir)
    assert len(seen) == 3
    steps = figures_by_step(workdir)
    assert list(steps) == [*range(1, 21), 22, 23]
    assert "train/loss" not in steps[23]
    assert steps_on_disk(workdir) == [20, 23]


def test_a_run_reports_its_last_validation(finished):
    steps = figures_by_step(finished.workdir)
    assert [step for step, values in steps.items() if "eval/nelbo" in values] == [10, 20]
    for name, value in finished.figures.items():
        assert steps[20][f"eval/{name}"] == value
    assert 0 < finished.figures["nelbo"] < 2 * math.log(VOCAB_SIZE)
    terms = sum(finished.figures[name] for name in ("middle", "reconstruction", "prior"))
    assert terms == pytest.approx(finished.figures["nelbo"], rel=1e-5)
    assert steps[20]["train/learning_rate"] < steps[6]["train/learning_rate"] == pytest.approx(3e-3)


# ---- stopping


def test_sigterm_finishes_the_step_and_saves(finished, tmp_path):
    def terminate(number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    workdir = tmp_path / "run"
    with watched_batches(terminate) as seen:
        assert train(finished.settings, workdir) == {}
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(seen) == 6
    assert steps_on_disk(workdir) == [4, 6]
    assert list(figures_by_step(workdir)) == list(range(1, 7))
    train(finished.settings, workdir)
    assert_same_run(workdir, finished)


def test_a_stop_asked_for_during_validation_is_saved_too(finished, tmp_path, monkeypatch):
    """At step 10, which no checkpoint is due at."""
    evaluate = loop.evaluate

    def slow(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", slow)
    train(finished.settings, tmp_path / "run")
    assert steps_on_disk(tmp_path / "run")[-1] == 10
    monkeypatch.undo()


def test_a_second_signal_acts_at_once():
    def asked_twice():
        with loop.stop_requests(None) as stopping:  # asks no checkpointer: not distributed
            assert not stopping(1)
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping(1)
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        asked_twice()
    assert signal.getsignal(signal.SIGINT) is handler


def test_two_runs_do_not_share_a_workdir(finished, folder, tmp_path):
    workdir = tmp_path / "run"
    with lock_workdir(workdir):
        with pytest.raises(InputError, match=r"another run is at work in .*/run: wait for it"):
            train(finished.settings, workdir)
        assert [file.name for file in workdir.iterdir()] == [".lock"]
    train(tiny_settings(folder, **RUN, **{"train.num_steps": 2}), workdir)
    assert steps_on_disk(workdir) == [2]


def test_profiled_steps_are_there_for_tensorboard(folder, tmp_path):
    train(tiny_settings(folder, **RUN, **{"train.num_steps": 3}), tmp_path, profile=True)
    (profile,) = (tmp_path / "tensorboard").rglob("*.xplane.pb")
    assert profile.stat().st_size > 1000
    assert b"step" in profile.read_bytes()


def test_steps_with_a_large_gradient_are_skipped(folder, tmp_path, caplog):
    """Here all of them: they are counted and named, and nothing but the step changes."""
    # Without the average: it moves by the rounding of its sum.
    changes = {"train.num_steps": 3, "checkpoint.every": 1, "optimizer.ema_decay": 0.0}
    changes["optimizer.skip_above"] = 1e-3
    with caplog.at_level("WARNING"):
        train(tiny_settings(folder, **{**RUN, **changes}), tmp_path / "run")
    lines = figures_by_step(tmp_path / "run")
    assert [line["train/skipped_steps"] for line in lines.values()] == [1, 2, 3]
    for step, line in lines.items():
        assert f"step {step} skipped: gradient norm {line['train/grad_norm']:.4g}" in caplog.text
    first, last = (saved_arrays(tmp_path / "run", step) for step in (1, 3))
    changed = {name for name in last if not np.array_equal(first[name], last[name])}
    assert all(name.endswith(("['step']", ".step")) for name in changed), changed
    moments = [a for name, a in last.items() if "['mu']" in name or "['nu']" in name]
    assert moments
    assert not any(moment.any() for moment in moments)


# ---- divergence


def diverge(patch: pytest.MonkeyPatch, at_step: int, name: str) -> None:
    """Make a figure and all parameters NaN in the step."""
    compile_step = loop.compile_step

    def compile_diverging(*arguments):
        step_fn = compile_step(*arguments)

        def step(state, batch, key):
            state, metrics = step_fn(state, batch, key)
            if int(state.step) == at_step:
                params = jax.tree.map(lambda p: p * jnp.nan, state.params)
                average = getattr(metrics, name)
                broken = average.replace(total=average.total * jnp.nan)
                return state.replace(params=params), metrics.replace(**{name: broken})
            return state, metrics

        return step

    patch.setattr(loop, "compile_step", compile_diverging)


@pytest.mark.parametrize(("name", "words"), [("loss", "loss"), ("grad_norm", "gradient norm")])
def test_a_diverged_run_stops_and_saves_nothing_broken(
    finished, folder, tmp_path, monkeypatch, name, words
):
    diverge(monkeypatch, 6, name)
    workdir = tmp_path / "run"
    settings = tiny_settings(folder, **RUN, **{"checkpoint.every": 2})
    with pytest.raises(DivergenceError) as error:
        train(settings, workdir)
    message = str(error.value)
    assert f"the {words} of step 6 is nan" in message
    assert f"the last good checkpoint is {workdir / 'checkpoints' / '4'}" in message
    assert "\n" not in message
    assert steps_on_disk(workdir) == [2, 4]
    assert all(np.all(np.isfinite(array)) for array in saved_arrays(workdir).values())
    # The command continues from there once the cause is gone.
    monkeypatch.undo()
    train(settings, workdir)
    assert_same_arrays(saved_arrays(workdir, 8), saved_arrays(finished.workdir, 8))


def test_divergence_before_the_first_checkpoint_says_so(folder, tmp_path, monkeypatch):
    diverge(monkeypatch, 3, "loss")
    with pytest.raises(DivergenceError, match=r"step 3 is nan.*there is no checkpoint yet"):
        train(tiny_settings(folder, **RUN), tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") == []


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.path": "{folder}/nowhere.txt"}, "nowhere.txt"),
        ({"data.path": "{folder}/empty.txt"}, "empty.txt"),
        ({"data.tokenizer": "{folder}/nowhere"}, "no tokenizer folder"),
        ({"data.validation": "last:24"}, "24"),
        ({"mesh.data": 2}, "mesh.data=2"),
        ({"train.batch_size": 3, "train.micro_batches": 3, "mesh.data": -1}, "use a multiple of 8"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    folder, tmp_path, monkeypatch, changes, words
):
    (folder / "empty.txt").write_text("")
    changes = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    if changes.get("mesh.data") == -1:  # all eight devices
        monkeypatch.undo()
        make_mesh = sharding.make_mesh
        monkeypatch.setattr(
            "gidd_jax.training.loop.sharding.make_mesh",
            lambda *sizes: make_mesh(*sizes, devices=jax.devices()),
        )
    with pytest.raises(InputError) as error:
        train(tiny_settings(folder, **changes), tmp_path / "run")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
