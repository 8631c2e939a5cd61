"""Damaged shards: nothing but InputError comes out, and no entry leads out of their folder."""

import json
import shutil
from pathlib import Path

import pytest
from fuzzing import BYTES, damaged, fuzz, only_input_error

from gidd_jax.data import shards
from gidd_jax.data.preparation import prepare
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.txt").write_text("\n".join(f"Text number {i}." for i in range(8)))
    prepare(
        str(folder / "a.txt"),
        "embedded",
        folder / "out",
        seq_len=8,
        mode="padded",
        validation="last:2",
        text_key="text",
        txt_documents="line",
        num_workers=1,
        shard_size=3,
    )
    return folder / "out"


def read_shards(folder: Path) -> None:
    tokenizer = load_tokenizer("embedded")
    for records in shards.open_shards(str(folder), tokenizer, "padded", 8):
        for i in range(len(records)):
            assert records[i].max() < tokenizer.vocab_size
            assert records.num_bytes(i) >= 0


def test_damaged_manifests(shard_folder):
    file = shard_folder / shards.MANIFEST
    valid = file.read_bytes()

    def check(data: bytes) -> None:
        file.write_bytes(data)
        only_input_error(lambda: read_shards(shard_folder))
        only_input_error(lambda: shards.verify(shard_folder))

    try:
        fuzz(check, damaged(valid), 50)
    finally:
        file.write_bytes(valid)


def test_damaged_shards(shard_folder):
    """Of the size that the manifest says, or not."""
    file = shard_folder / "train-00000.array_record"
    valid = file.read_bytes()

    def check(data: bytes) -> None:
        for content in (data, (data + valid[len(data) :])[: len(valid)]):
            file.unlink()
            file.write_bytes(content)
            only_input_error(lambda: read_shards(shard_folder))

    try:
        fuzz(check, damaged(valid))
    finally:
        file.write_bytes(valid)


@pytest.mark.parametrize("kind", ["parent", "absolute", "folder"])
def test_manifests_cannot_leave_their_folder(shard_folder, tmp_path, kind):
    shutil.copytree(shard_folder, tmp_path / "a" / "out")
    folder = tmp_path / "a" / "out"
    name = "train-00000.array_record"
    shutil.move(folder / name, tmp_path / "a" / name)
    shutil.copytree(folder / "tokenizer", folder / "sub")
    shutil.copy(tmp_path / "a" / name, folder / "sub")
    file = {"parent": f"../{name}", "absolute": str(tmp_path / "a" / name), "folder": f"sub/{name}"}
    manifest = json.loads((folder / shards.MANIFEST).read_text())
    manifest["splits"]["train"][0]["file"] = file[kind]
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="no file of the folder"):
        read_shards(folder)


@pytest.mark.parametrize("damage", BYTES)
def test_damaged_plans(shard_folder, tmp_path, damage):
    """What was to be made is not known: nothing is overwritten."""
    shutil.copytree(shard_folder, tmp_path / "out")
    (tmp_path / "out" / shards.PLAN).write_bytes(damage)
    with pytest.raises(InputError, match=r"plan\.json is damaged|other settings"):
        prepare(
            "embedded",
            "embedded",
            tmp_path / "out",
            seq_len=8,
            mode="padded",
            validation="last:2",
            text_key="text",
            txt_documents="line",
            num_workers=1,
            shard_size=3,
        )
