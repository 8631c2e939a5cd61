"""Workdirs: what differs from their run is said, and people can read what they hold."""

import json

import pytest

from gidd_jax.checkpoints.workdir import check_workdir, open_workdir
from gidd_jax.cli import load_config
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.settings import Settings


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def settings_with(**changes):
    values = load_config("quickstart").to_dict()
    for key, value in changes.items():
        section, leaf = key.split("__")
        values[section][leaf] = value
    return Settings.from_config(values)


def test_a_workdir_says_what_differs_from_its_run(tmp_path, tokenizer):
    settings = settings_with()
    check_workdir(tmp_path / "new", settings)
    assert not (tmp_path / "new").exists()
    open_workdir(tmp_path, settings, tokenizer)
    check_workdir(tmp_path, settings)
    check_workdir(tmp_path, settings_with(train__num_steps=7, logging__every=1, mesh__fsdp=2))
    other = settings_with(model__num_layers=5, optimizer__b1=0.5, checkpoint__every=7)
    with pytest.raises(InputError) as caught:
        check_workdir(tmp_path, other)
    changed = f"(model.num_layers: 4 -> 5; optimizer.b1: {settings.optimizer.b1} -> 0.5)"
    assert changed in str(caught.value)
    check_workdir(tmp_path, other, allow_config_change=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        check_workdir(tmp_path, settings)


def test_a_workdir_holds_its_settings_and_tokenizer_for_people_to_read(tmp_path, tokenizer):
    settings = settings_with()
    open_workdir(tmp_path / "a" / "b", settings, tokenizer)
    written = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert Settings.from_config(written) == settings
    assert load_tokenizer(tmp_path / "a" / "b" / "tokenizer").fingerprint == tokenizer.fingerprint
