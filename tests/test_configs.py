"""Every shipped config loads, and carries the values of the paper."""

import ast

import pytest

from gidd_jax.cli import config_folder, load_config
from gidd_jax.errors import InputError
from gidd_jax.evaluation.grid import Run, plan_runs
from gidd_jax.models import dit
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_process

NAMES = sorted(path.stem for path in config_folder().glob("*.py"))
SIZED = ["gidd", "mdlm", "ar"]


def settings_of(name: str) -> Settings:
    return Settings.from_config(load_config(name))


def test_the_configs_of_the_documentation_are_there():
    assert set(NAMES) >= {
        "adapt",
        "ar",
        "base",
        "gidd",
        "gidd_scaling",
        "mdlm",
        "quickstart",
        "sudoku",
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_legal_and_runs_without_a_download(name):
    data = settings_of(name).data
    if name == "sudoku":  # its script makes the data
        assert (data.path, data.tokenizer) == ("outputs/sudoku/6/train.npz", "ids:6")
    else:
        # The start is where the user says, and so is its tokenizer.
        wanted = "start" if name in ("adapt", "sft") else "embedded"
        assert (data.path, data.tokenizer) == ("embedded", wanted)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "base"])
def test_every_docstring_says_command_hardware_and_results(name):
    text = ast.get_docstring(ast.parse((config_folder() / f"{name}.py").read_text())) or ""
    assert f"--config=configs/{name}.py" in text
    assert "Hardware: " in text
    assert "Expected results: " in text


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("size", dit.SIZES)
def test_sizes_are_those_of_the_models(name, size):
    model = settings_of(f"{name}:{size}").model
    assert {key: getattr(model, key) for key in dit.SIZES[size]} == dit.SIZES[size]
    assert (model.cond_dim, model.max_seq_len, model.dtype) == (128, 512, "bfloat16")


@pytest.mark.parametrize("name", SIZED)
def test_values_of_the_paper(name):
    settings = settings_of(name)
    assert settings.model.num_layers == 12  # small
    optimizer, train = settings.optimizer, settings.train
    assert optimizer.name == "adamw"
    assert (optimizer.learning_rate, optimizer.weight_decay) == (5e-4, 0.02)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.99, 1e-9)
    assert (optimizer.clip_norm, optimizer.warmup_steps) == (1.0, 10_000)
    assert (optimizer.schedule, optimizer.final_lr_ratio, optimizer.ema_decay) == ("cosine", 0.1, 0)
    assert (train.batch_size, train.num_steps) == (512, 500_000)
    assert (settings.process.gamma, settings.process.t_eps) == (1.0, 1e-4)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_rows_of_sudoku_are_whole_grids(size):
    settings = settings_of(f"sudoku:{size}")
    assert settings.model.max_seq_len == size**2
    assert (settings.data.tokenizer, settings.data.frame) == (f"ids:{size}", "none")
    assert settings.data.path == f"outputs/sudoku/{size}/train.npz"
    with pytest.raises(InputError, match="use one of 4, 6, 9"):
        load_config("sudoku:5")


def test_the_study_of_sudoku_is_five_processes_with_three_seeds_trained_alike():
    runs = [run for part in ("hybrid", "uniform", "mdlm") for run in plan_study(part)]
    made = [build_process(run.settings.process, 7, 6) for run in runs]
    assert len(runs) == 15
    assert len({repr(process) for process in made}) == 5
    trained = {(run.settings.model, run.settings.optimizer) for run in runs}
    assert len(trained) == 1
    assert {(r.settings.train.num_steps, r.settings.train.batch_size) for r in runs} == {(2000, 64)}
    assert sorted(run.settings.seed for run in runs) == sorted([0, 1, 2] * 5)


def plan_study(part: str) -> list[Run]:
    return plan_runs(load_config(f"sweeps/sudoku_study:{part}"))


def test_objectives():
    gidd, mdlm, ar = (settings_of(name) for name in SIZED)
    assert (gidd.process.name, gidd.train.weighting) == ("hybrid", "dynamic")
    assert (gidd.train.min_weight, gidd.train.max_weight) == (0.0, 2.0)
    assert (mdlm.process.name, mdlm.train.weighting) == ("masked", "elbo")
    assert (ar.process.name, ar.model.name) == ("autoregressive", "llama")


def test_every_key_of_the_base_config_has_a_comment():
    lines = (config_folder() / "base.py").read_text().splitlines()
    keys = [line for line in lines if line.startswith("    ") and " = " in line.split("#")[0]]
    keys = [line for line in keys if "ConfigDict()" not in line]
    assert len(keys) > 40
    assert [line for line in keys if "#" not in line] == []
