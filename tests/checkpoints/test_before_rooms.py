"""A run written before the modules moved into rooms is read, and goes on as it did then."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import figures_by_step

from gidd_jax import Gidd
from gidd_jax.cli import load_config
from gidd_jax.process import HybridProcess
from gidd_jax.settings import Settings
from gidd_jax.training.loop import train

WRITTEN = Path(__file__).parents[1] / "data" / "run_before_rooms"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    shutil.copytree(WRITTEN, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


def continued(folder: Path, num_steps: int) -> dict[str, float]:
    config = load_config("gidd")
    config.update(json.loads((folder / "run" / "config.json").read_text()))
    config.train.num_steps = num_steps
    return train(Settings.from_config(config), folder / "run")


def test_it_is_read(folder):
    """The last line is the validation at step 6, to the same parameters, times and noise."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    found = {f"eval/{name}": value for name, value in continued(folder, num_steps=6).items()}
    assert {"step": 6} | found == pytest.approx(json.loads(lines[-1]), rel=2e-5, abs=0)
    model = Gidd.from_pretrained(folder / "run")
    assert isinstance(model.process, HybridProcess)
    assert model.process.p_uniform == 0.1
    samples = model.generate(num_samples=2, num_steps=4, length=16)
    assert samples.ids.shape == (2, 16)
    assert model.tokenizer.mask_id not in samples.ids


def test_it_goes_on_with_the_figures_of_then(folder):
    """Steps, batches, noise, optimizer and validation: the lines that the old code wrote.

    Here the rows lie on eight devices and there on one, and sums in another order differ by a few
    units in the last place of float32.
    """
    continued(folder, num_steps=9)
    found = figures_by_step(folder / "run")
    (folder / "old").mkdir()
    shutil.copy(folder / "continued.jsonl", folder / "old" / "metrics.jsonl")
    then = figures_by_step(folder / "old")
    assert list(then) == [7, 8, 9]
    for step, figures in then.items():
        assert found[step] == pytest.approx(figures, rel=2e-5, abs=0), step
