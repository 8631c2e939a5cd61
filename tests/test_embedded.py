"""The model that comes with the package: its size, its card, and the figures in it."""

import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from fresh_command import fresh_command

from gidd_jax import Gidd
from gidd_jax.cli import load_config
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.interchange.start import from_start
from gidd_jax.settings import Settings

FOLDER = Path(str(resources.files("gidd_jax") / "assets/model"))
CARD = (FOLDER / "README.md").read_text("utf-8")


def test_it_is_small_and_says_what_it_is():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8e6
    front = CARD.split("---")[1]
    assert 'license: "apache-2.0"' in front
    for row in ("corpus", "tokens", "hours of steps", "validation: bits per byte"):
        assert re.search(rf"\| {row} \| \S+ \|", CARD), row
    assert "auto_map" not in (FOLDER / "config.json").read_text("utf-8")  # it would name no file
    assert "trust_remote_code" not in CARD


def test_its_tokens_are_those_of_the_package():
    model = Gidd.from_pretrained("embedded")
    assert model.tokenizer.gives_ids_of(load_tokenizer("embedded"))
    drawn = model.generate(prompts=["It is a truth"], num_steps=8, new_tokens=12)
    assert drawn.texts[0].startswith("It is a truth")
    row = model.log_likelihood(["It is a truth universally acknowledged."], num_samples_t=8)
    other = model.log_likelihood(["A acknowledged is it truth. universally"], num_samples_t=8)
    assert row.log_probs[0] > other.log_probs[0] + 5


def test_a_run_starts_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded" / "tokenizer").mkdir(parents=True)
    (tmp_path / "embedded" / "tokenizer" / "tokenizer.json").write_text("{}")  # is not it
    config = load_config("quickstart")
    config.model.start, config.data.tokenizer = "embedded", "start"
    settings, begin = from_start(Settings.from_config(config))
    assert settings.data.tokenizer == "embedded"
    assert begin is not None
    assert begin(None)["vocab_embed"]["embedding"].shape == (4096, 128)


COMMANDS = {
    "sample": ("--num_samples=1", "--num_steps=4"),
    "highlight": ("--text=text.txt",),
    "evaluate": ("--max_documents=1", "--num_samples_t=1"),
    "self_correct": ("--planted=0.05", "--t=0.1", "--num_steps=4", "--max_documents=1"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_take_it(command, capsys, tmp_path, monkeypatch):
    """Without data of one's own they take the documents that it was not trained on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged.")
    (tmp_path / "embedded" / "checkpoints").mkdir(parents=True)  # a folder of that name is not it
    fresh_command(command, "--checkpoint=embedded", *COMMANDS[command]).main([])
    said = capsys.readouterr().out
    assert {"sample": "--- sample 0 ---", "evaluate": "bits/byte"}.get(command, "") in said


@pytest.mark.slow
def test_the_figure_of_the_card_is_measured_again(tmp_path):
    """On the documents that it was not trained on, in bfloat16 and with many draws of noise, which
    leave a standard error of 0.02; the run's own validation had one draw a row."""
    row = re.search(r"bits per byte \| ([\d.]+) \|", CARD)
    assert row is not None
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "gidd_jax.evaluate", "--checkpoint=embedded", f"--out={out}"]
    subprocess.run([*command, "--num_samples_t=32"], check=True)
    (figures,) = json.loads(out.read_text())["corpora"]
    assert figures["split"] == "validation"
    assert abs(figures["bits_per_byte"] - float(row[1])) < 0.03
