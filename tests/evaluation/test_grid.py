"""Sweeps: the grid becomes runs, finished ones are not repeated, table and figure hold them all."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from tiny_run import tiny_config

from gidd_jax import sweep
from gidd_jax.checkpoints.workdir import open_workdir
from gidd_jax.cli import config_folder, load_config
from gidd_jax.data.arrays import with_marks
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import DivergenceError, InputError
from gidd_jax.evaluation import grid
from gidd_jax.settings import Settings
from gidd_jax.training import loop
from gidd_jax.views import pictures

SWEEPS = sorted((config_folder() / "sweeps").glob("*.py"))


def tiny_sweep(folder: Path, values: dict, **changes: object) -> ConfigDict:
    changes = {"train.num_steps": 2, "train.eval_batches": 1, **changes}
    return ConfigDict({"base": tiny_config(folder, **changes), "grid": values})


def test_the_grid_is_multiplied_out(tmp_path):
    values = {"process": {"p_uniform": (0.0, 0.2)}, "train": {"weighting": ("elbo", "clip")}}
    config = tiny_sweep(tmp_path, {**values, "seed": (3,)})
    runs = grid.plan_runs(config)
    assert [list(one.values.values()) for one in runs] == [
        [0.0, "elbo", 3],
        [0.0, "clip", 3],
        [0.2, "elbo", 3],
        [0.2, "clip", 3],
    ]
    assert runs[2].name == "process.p_uniform=0.2+train.weighting=elbo+seed=3"
    expected = tiny_config(
        tmp_path,
        **{"train.num_steps": 2, "train.eval_batches": 1, "process.p_uniform": 0.2},
        **{"train.weighting": "elbo", "seed": 3},
    )
    assert runs[2].settings == Settings.from_config(expected)
    assert config.base.process.p_uniform == 0.1  # of the paper: the config itself is left alone


def test_names_are_names_of_folders(tmp_path):
    (one,) = grid.plan_runs(tiny_sweep(tmp_path, {"data": {"path": (f"{tmp_path}/corpus.txt",)}}))
    assert "/" not in one.name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "grid of the sweep is empty"),
        ({"train": {"weightin": ("elbo",)}}, "no key train.weightin: did you mean train.weighting"),
        ({"seed": 3}, "grid.seed = 3: must be a tuple of different values"),
        ({"seed": (1, 1)}, "grid.seed = "),
        ({"seed": ()}, "grid.seed = "),
        ({"seed": (0, -1)}, "run seed=-1: seed = -1: must be >= 0"),
        ({"train": {"weighting": ("elbo", "none")}}, "run train.weighting=none: train.weighting"),
        ({"process": {"p_uniform": ("x",)}}, "run process.p_uniform=x: "),
    ],
)
def test_a_bad_grid_is_refused_before_anything_runs(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        grid.plan_runs(tiny_sweep(tmp_path, values))


def test_a_config_of_one_run_is_no_sweep(tmp_path):
    with pytest.raises(InputError, match="sections base and grid"):
        grid.plan_runs(tiny_config(tmp_path))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_is_legal(path):
    runs = grid.plan_runs(load_config(str(path)))
    assert len(runs) > 1
    assert len({one.name for one in runs}) == len(runs)
    assert f"--config=configs/sweeps/{path.name}" in path.read_text("utf-8")


def test_the_ablation_is_that_of_the_paper():
    runs = grid.plan_runs(load_config(str(config_folder() / "sweeps" / "ablation.py")))
    values = {(one.settings.process.p_uniform, one.settings.train.weighting) for one in runs}
    assert values == {(p, w) for p in (0.0, 0.1, 0.2) for w in ("elbo", "clip", "dynamic")}
    assert {one.settings.data.path for one in runs} == {"embedded"}


class Flag(NamedTuple):
    value: Any


def call(monkeypatch, workdir: Path, config: ConfigDict) -> None:
    """Run the command on a config in a workdir."""
    monkeypatch.setattr(sweep, "CONFIG", Flag(config))
    monkeypatch.setattr(sweep, "WORKDIR", Flag(str(workdir)))
    sweep.main(["sweep"])


@pytest.fixture
def kept_programs(tmp_path) -> Iterator[None]:
    """JAX keeps programs in a folder, as the command lets it (see gidd_jax.cli)."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [jax.config.values[name] for name in names]
    for name, value in zip(names, (str(tmp_path / "compiled"), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks where the cache is only once
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("kept_programs")
def test_a_sweep_trains_compiles_once_and_writes_table_and_figure(tmp_path, monkeypatch, capsys):
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    config = tiny_sweep(tmp_path, {"process": {"p_uniform": (0.1,)}, "seed": (0, 1)})
    config.base.model.num_layers = 1
    folder = tmp_path / "sweep"
    try:
        call(monkeypatch, folder, config)
    finally:
        jax.monitoring.clear_event_listeners()
    # The second run finds the compiled initialisation, step and evaluation of the first.
    assert events.count("/jax/compilation_cache/cache_hits") >= 3

    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert rows[0]["bits_per_byte"] != rows[1]["bits_per_byte"]
    for row in rows:
        workdir = folder / "runs" / f"process.p_uniform=0.1+seed={row['seed']}"
        (last,) = (line for line in pictures.read_metrics(workdir) if "eval/nelbo" in line)
        assert float(row["nelbo"]) == last["eval/nelbo"]
        assert float(row["bits_per_byte"]) == last["eval/bits_per_byte"]
        assert (row["process.p_uniform"], row["step"]) == ("0.1", "2")
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    bits = np.array([float(row["bits_per_byte"]) for row in rows])
    assert f"{bits.mean():.4f}  {bits.std(ddof=1):.4f}" in printed
    settings = grid.plan_runs(config)[0].settings
    measure = grid.measure_of(settings)
    assert measure.figure == "bits_per_byte"
    assert f"unigram model: {measure.value:.4f} bits per byte" in printed


class Training:
    """Stands in for training: notes the seeds, leaves the settings, stops or fails if told to."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.stops_at_seed: int | None = None
        self.error: Exception | None = None

    def __call__(self, settings: Settings, workdir: Path, start: None) -> dict[str, float]:
        if self.error:
            raise self.error
        self.seeds.append(settings.seed)
        made = with_marks(settings)
        open_workdir(workdir, made, load_tokenizer(settings.data.tokenizer))
        is_stopped = settings.seed == self.stops_at_seed
        step = settings.train.num_steps - is_stopped
        (workdir / "checkpoints" / str(step) / "state").mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
        return {"bits_per_byte": 1.0 + settings.seed, "perplexity": 2.0}


@pytest.fixture
def training(monkeypatch) -> Training:
    training = Training()
    monkeypatch.setattr(loop, "train", training)
    return training


def test_what_is_finished_is_not_repeated(tmp_path, monkeypatch, training):
    def seeds(*values: int, **changes: object) -> list[int]:
        training.seeds.clear()
        config = tiny_sweep(tmp_path, {"seed": values}, **changes)
        call(monkeypatch, tmp_path / "sweep", config)
        return training.seeds

    assert seeds(0, 1) == [0, 1]
    assert seeds(0, 1) == []
    assert seeds(0, 1, 2) == [2]
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert [(row["seed"], row["bits_per_byte"]) for row in rows] == [
        ("0", "1.0"),
        ("1", "2.0"),
        ("2", "3.0"),
    ]
    assert seeds(1, **{"train.num_steps": 5}) == [1]  # longer: it goes on
    with pytest.raises(InputError, match=r"runs/seed=0 belongs to a run with another config"):
        seeds(0, **{"optimizer.learning_rate": 1e-3})


def test_a_stop_ends_the_sweep_and_the_next_call_goes_on(tmp_path, monkeypatch, training, capsys):
    config, folder = tiny_sweep(tmp_path, {"seed": (0, 1, 2)}), tmp_path / "sweep"
    training.stops_at_seed = 1
    call(monkeypatch, folder, config)
    assert training.seeds == [0, 1]
    assert len(list(folder.rglob("result.json"))) == 1
    assert len((folder / "sweep.csv").read_text().splitlines()) == 2
    assert "unigram" not in capsys.readouterr().out
    training.stops_at_seed = None
    call(monkeypatch, folder, config)
    assert training.seeds == [0, 1, 1, 2]


def test_a_sweep_over_marked_arrays_goes_on(tmp_path, training):
    """Training notes what the arrays mark in the settings of a run, which are compared then."""
    file = tmp_path / "rows.npz"
    data = {"data.path": str(file), "data.tokenizer": "ids:3", "data.frame": "none"}
    (one,) = grid.plan_runs(tiny_sweep(tmp_path, {"seed": (0,)}, **data))  # before there are rows
    np.savez(file, ids=np.zeros((8, 16), int), given=np.arange(16) < np.full((8, 1), 4))
    training.stops_at_seed = 0
    assert grid.finish(one, tmp_path / "run") is None
    training.stops_at_seed = None
    assert grid.finish(one, tmp_path / "run")["step"] == 2
    assert training.seeds == [0, 0]


def test_a_run_that_fails_is_named(tmp_path, monkeypatch, training):
    training.error = DivergenceError("the loss of step 1 is nan")
    with pytest.raises(DivergenceError, match="run seed=7: the loss of step 1 is nan"):
        call(monkeypatch, tmp_path / "sweep", tiny_sweep(tmp_path, {"seed": (7,)}))


ROWS = [
    {"p": p, "w": w, "seed": seed, "bits_per_byte": p + seed + (w == "b"), "perplexity": 2.0}
    for p in (0.0, 0.5)
    for w in ("a", "b")
    for seed in (0, 1)
]


def test_the_figure_joins_means_over_seeds():
    (axis,) = pictures.sweep_picture(
        ROWS, ["p", "w", "seed"], "bits_per_byte", {"unigram model": 7.0}
    ).axes
    lines = {line.get_label(): line.get_xydata() for line in axis.lines}
    np.testing.assert_array_equal(lines["w = a"], [[0, 0.5], [1, 1.0]])
    np.testing.assert_array_equal(lines["w = b"], [[0, 1.5], [1, 2.0]])
    assert set(lines["unigram model"][:, 1]) == {7.0}
    dots = [collection.get_offsets() for collection in axis.collections]
    np.testing.assert_array_equal(dots[0], [[0, 0.0], [0, 1.0], [1, 0.5], [1, 1.5]])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.0", "0.5"]


def test_the_summary_is_over_seeds():
    lines = [
        line.split()
        for line in grid.summary(ROWS, ["p", "w", "seed"], "bits_per_byte").splitlines()
    ]
    assert lines[0] == ["p", "w", "runs", "bits_per_byte", "+-", "perplexity"]
    assert lines[2] == ["0.0", "b", "2", "1.5000", f"{math.sqrt(0.5):.4f}", "2.00"]
    assert len(lines) == 5
    alone = grid.summary(ROWS[:1], ["seed"], "bits_per_byte").splitlines()[1].split()
    assert alone == ["1", "0.0000", "-", "2.00"]


def test_runs_on_ids_are_judged_in_nats(tmp_path):
    """Symbols drawn evenly: the unigram model is at log 4, up to what its counts say."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 4, (512, 16)))
    changes = {"data.path": f"{tmp_path}/ids.npy", "data.tokenizer": "ids:4", "data.frame": "none"}
    changes |= {"model.max_seq_len": 16, "train.eval_batches": 8}
    (one,) = grid.plan_runs(tiny_sweep(tmp_path, {"seed": (0,)}, **changes))
    measure = grid.measure_of(one.settings)
    assert (measure.figure, measure.unit) == ("nelbo", "nats per token")
    assert measure.value == pytest.approx(math.log(4), abs=0.01)


def test_figures_that_are_missing_are_dashes():
    rows = [
        {"seed": seed, "bits_per_byte": bits, "perplexity": 1e200}
        for seed, bits in enumerate((2.0, float("nan")))
    ]
    assert grid.summary(rows, ["seed"], "bits_per_byte").splitlines()[1].split() == [
        "2",
        "-",
        "-",
        "1e+200",
    ]
