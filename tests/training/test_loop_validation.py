"""Validation during a run: figures by hand, rows without text, parts, notes on padding."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import (
    VOCAB_SIZE,
    figures_by_step,
    steps_on_disk,
    tiny_settings,
)

from gidd_jax.data.pipeline import ValidationBatches
from gidd_jax.parallel import sharding
from gidd_jax.training import loop, programs
from gidd_jax.training.build import build_objective
from gidd_jax.training.loop import train
from gidd_jax.training.optimizer import make_optimizer
from gidd_jax.training.step import TrainState

pytestmark = pytest.mark.usefixtures("on_first_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Corpus and tokenizer."""
    return tmp_path_factory.mktemp("data")


class Sums:
    """A stand-in for the compiled evaluation that returns given sums."""

    def __init__(self, *parts: dict[str, float]):
        self.parts, self.params = list(parts), []

    def __call__(self, params, base, batch, key):
        self.params.append(params)
        return self.parts.pop(0)


def test_bits_per_byte_by_hand():
    """Three rows of 8, 8 and 4 tokens; an autoregressive model scores all but the first of each."""
    records = [np.arange(n, dtype=np.int32) for n in (8, 8, 4)]
    validation = ValidationBatches(records, [30, 34, 16], 8, 0, 2)
    assert (validation.num_tokens, validation.num_bytes, len(validation)) == (20, 80, 2)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    sums = Sums(
        {"loss": 20.0, "nelbo": 30.0, "tokens": 14.0}, {"loss": 4.0, "nelbo": 4.0, "tokens": 3.0}
    )
    state = TrainState(jnp.int32(1), "parameters", None, None)
    figures = loop.evaluate(sums, state, validation, jax.random.key(0), mesh)
    assert figures["loss"] == pytest.approx(24 / 17)
    assert figures["nelbo"] == pytest.approx(34 / 17)
    assert figures["perplexity"] == pytest.approx(math.exp(2))
    # 17 of the 20 tokens were scored: 68 of the 80 bytes.
    assert figures["bits_per_byte"] == pytest.approx(34 / math.log(2) / 68)
    assert sums.params == ["parameters"] * 2

    averaged = Sums({"nelbo": 1.0, "tokens": 14.0}, {"nelbo": 1.0, "tokens": 3.0})
    loop.evaluate(averaged, state.replace(ema="average"), validation, jax.random.key(0), mesh)
    assert averaged.params == ["average"] * 2


def test_validation_rows_without_a_byte_or_a_token():
    records = [np.zeros(2, np.int32)] * 2
    validation = ValidationBatches(records, [0, 0], 8, 0, 2)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    state = TrainState(jnp.int32(1), "parameters", None, None)
    sums = Sums({"loss": 2.0, "nelbo": 3.0, "tokens": 4.0})
    figures = loop.evaluate(sums, state, validation, jax.random.key(0), mesh)
    assert math.isnan(figures.pop("bits_per_byte"))
    assert figures == {"loss": 0.5, "nelbo": 0.75, "perplexity": math.exp(0.75)}
    nothing = Sums({"loss": 0.0, "nelbo": 0.0, "tokens": 0.0})
    figures = loop.evaluate(nothing, state, validation, jax.random.key(0), mesh)
    assert figures.keys() == {"loss", "nelbo", "perplexity", "bits_per_byte"}
    assert all(math.isnan(value) for value in figures.values())


def test_a_run_whose_validation_has_no_byte_ends_with_a_note(tmp_path, caplog):
    """The four texts of the validation split are empty."""
    changes = {"train.num_steps": 2, "data.mode": "crop", "data.path": str(tmp_path / "a.jsonl")}
    settings = tiny_settings(tmp_path, **changes)
    texts = ["A text that is longer than a row."] * 20 + [""] * 4
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    with caplog.at_level("INFO", logger="absl"):
        figures = train(settings, tmp_path / "run")
    assert math.isnan(figures["bits_per_byte"])
    assert steps_on_disk(tmp_path / "run") == [2]
    last = figures_by_step(tmp_path / "run")[2]
    assert last["eval/bits_per_byte"] is None
    assert last["eval/nelbo"] == figures["nelbo"]
    assert "the validation rows stand for no byte of text" in caplog.text
    assert "0 % of the training rows is padding" in caplog.text  # crops of long texts


def test_mostly_padding_is_said(tmp_path, caplog):
    """Rows of [END] two bytes [END] in a context of 16: three quarters are padding."""
    settings = tiny_settings(tmp_path, **{"train.num_steps": 1, "data.mode": "crop"})
    (tmp_path / "corpus.txt").write_text("ab\n" * 24)
    with caplog.at_level("INFO", logger="absl"):
        train(settings, tmp_path / "run")
    assert "75 % of the training rows is padding: lower model.max_seq_len" in caplog.text


def test_validation_in_parts_is_validation_of_the_whole(folder):
    """An exact likelihood shows that no row is lost or counted twice."""
    found = []
    for parts in (1, 4):
        changes = {"train.micro_batches": parts, "train.batch_size": 16, "train.eval_batches": 1}
        settings = tiny_settings(folder, "ar", **changes)
        objective = build_objective(settings, VOCAB_SIZE, VOCAB_SIZE - 1)
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        optimizer = make_optimizer(settings.optimizer, settings.model, 20)
        rng = np.random.default_rng(0)
        rows = [rng.integers(0, 257, n).astype(np.int32) for n in range(1, 17)]
        validation = ValidationBatches(rows, [len(row) for row in rows], 16, 257, 16)
        with sharding.activate(mesh):
            make_state, abstract = programs.state_maker(settings, objective, optimizer, mesh)
            evaluation = programs.compile_evaluation(settings, objective, abstract, mesh)
            state = make_state(jax.random.key(0))
            found.append(loop.evaluate(evaluation, state, validation, jax.random.key(1), mesh))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
