"""Damaged items of checkpoints: nothing but InputError comes out, nor leads out of a folder."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from fuzzing import damaged, fuzz, only_input_error
from tiny_run import tiny_settings

from gidd_jax.checkpoints.checkpoint import Checkpointer, find_checkpoint
from gidd_jax.checkpoints.checksums import json_checksum
from gidd_jax.data.pipeline import TrainBatches
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.settings import Settings


@pytest.fixture(scope="module")
def step_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_settings(folder).to_dict()
    tokenizer = load_tokenizer(folder / "tokenizer")
    with Checkpointer(
        folder / "w", every=1, max_to_keep=1, config=config, tokenizer=tokenizer
    ) as writer:
        writer.save(3, {"step": jnp.int32(3)}, {"global_next_index": 24})
    return folder / "w" / "checkpoints" / "3"


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> TrainBatches:
    data = tiny_settings(tmp_path_factory.mktemp("data")).data
    return TrainBatches(data, load_tokenizer(data.tokenizer), 16, 4, seed=0)


def read_items(folder: Path, batches: TrainBatches) -> None:
    checkpoint = find_checkpoint(folder)
    Settings.from_saved(checkpoint.config())
    assert checkpoint.tokenizer().vocab_size > 0
    batches.set_state(checkpoint.data_position())
    assert isinstance(checkpoint.array_checksums(), dict)


@pytest.mark.parametrize("with_checksum", [False, True], ids=["flipped", "forged"])
@pytest.mark.parametrize("item", ["config", "tokenizer", "data", "checksums"])
def test_damaged_items_of_checkpoints(step_folder, batches, item, with_checksum):
    """Accidents change the checksum; who forges a checkpoint writes the right one."""
    file, sums = step_folder / item / "metadata", step_folder / "checksums" / "metadata"
    valid, valid_sums = file.read_bytes(), sums.read_bytes()
    read_items(step_folder, batches)

    def check(data: bytes) -> None:
        file.write_bytes(data)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if with_checksum and item != "checksums":
            sums.write_text(json.dumps({**json.loads(valid_sums), item: json_checksum(value)}))
        only_input_error(lambda: read_items(step_folder, batches))

    try:
        fuzz(check, damaged(valid), 15)
    finally:
        file.write_bytes(valid)
        sums.write_bytes(valid_sums)


@pytest.mark.parametrize("name", ["../escaped", "{root}/escaped", "sub/../../escaped", "..", ""])
def test_tokenizers_of_checkpoints_cannot_leave_their_folder(
    step_folder, tmp_path, monkeypatch, name
):
    copy = shutil.copytree(step_folder, tmp_path / "3")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    file, sums = copy / "tokenizer" / "metadata", copy / "checksums" / "metadata"
    value = {**json.loads(file.read_text()), name.format(root=tmp_path): "text"}
    file.write_text(json.dumps(value))
    sums.write_text(json.dumps({**json.loads(sums.read_text()), "tokenizer": json_checksum(value)}))
    with pytest.raises(InputError, match="no set of files"):
        find_checkpoint(copy).tokenizer()
    assert not list(tmp_path.rglob("escaped"))
