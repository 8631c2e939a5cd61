"""Datasets of tfds: their batches and versions, and bars for terminals alone."""

import sys

import pytest
import tensorflow_datasets as tfds
from tiny_corpus import TEXTS, contents, first_batches, settings, write_tfds

from gidd_jax.data.corpus import open_corpus
from gidd_jax.data.pipeline import TrainBatches, validation_batches
from gidd_jax.data.tokenizer import load_tokenizer

SEQ_LEN = 32


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    return write_tfds(tmp_path_factory.mktemp("tfds"))


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_tfds_are_for_terminals(tfds_folder, monkeypatch, terminal):
    told = []
    monkeypatch.setattr(tfds, "display_progress_bar", told.append)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    open_corpus(f"tfds:{tfds_folder}", "last:2", "text", "line")
    assert set(told) == {terminal}


def test_tfds_batches(tfds_folder):
    tokenizer = load_tokenizer("embedded")
    config = settings(f"tfds:{tfds_folder}", validation="split:test", mode="padded")
    train = TrainBatches(config, tokenizer, SEQ_LEN, len(TEXTS), seed=0)
    (batch,) = first_batches(train, 1)
    texts = [
        tokenizer.decode(t[m], True) for t, m in zip(batch["tokens"], batch["mask"], strict=True)
    ]
    assert sorted(t[:10] for t in texts) == sorted(t[:10] for t in TEXTS)
    held = validation_batches(config, tokenizer, SEQ_LEN, 4)
    assert (len(held), held.num_bytes) == (1, 4)
    parts = train.get_state()["corpus"]["parts"]
    assert parts[0].keys() == {"split train", "split test"}
    assert parts[0]["split train"].startswith("local_text/1.0.0, 23 examples, ")
    part = open_corpus(f"tfds:{tfds_folder}", "split:test[:100%]", "text", "line")
    assert contents(part.validation) == ["held"]
