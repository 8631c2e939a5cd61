"""A run that continues gives texts the ids that it gave them before, or says that it does not."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from tiny_run import tiny_settings

from gidd_jax.checkpoints.checkpoint import Checkpoint, Checkpointer, find_checkpoint
from gidd_jax.checkpoints.same_tokenizer import check_same_tokenizer
from gidd_jax.data.shards import Manifest, Shard, open_shards
from gidd_jax.data.tokenizer import Tokenizer, load_tokenizer
from gidd_jax.errors import InputError


def save_as_earlier(self: Tokenizer, folder: str | Path) -> None:
    """What versions before fingerprints had versions wrote: transformers' own files."""
    from transformers import PreTrainedTokenizerFast

    roles = {"eos": self.eos_id, "pad": self.pad_id, "mask": self.mask_id, "bos": self.bos_id}
    tokens = {f"{role}_token": self.backend.id_to_token(i) for role, i in roles.items()}
    PreTrainedTokenizerFast(tokenizer_object=self.backend, **tokens).save_pretrained(str(folder))


def step_of(folder: Path) -> Checkpoint:
    config = tiny_settings(folder).to_dict()
    tokenizer = load_tokenizer(folder / "tokenizer")
    with Checkpointer(
        folder / "run", every=1, max_to_keep=1, config=config, tokenizer=tokenizer
    ) as writer:
        writer.save(1, {"step": jnp.int32(1)}, {})
    return find_checkpoint(folder / "run")


def changed(folder: Path, part: str, value: object) -> Tokenizer:
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
    return load_tokenizer(folder / "tokenizer")


@pytest.mark.parametrize("is_earlier", [False, True])
def test_another_tokenizer_under_the_same_name_is_refused(
    tmp_path, monkeypatch, caplog, is_earlier
):
    if is_earlier:
        monkeypatch.setattr(Tokenizer, "save", save_as_earlier)
    step, settings = step_of(tmp_path), tiny_settings(tmp_path)
    same = load_tokenizer(tmp_path / "tokenizer")
    check_same_tokenizer(step, same, settings)
    assert step.tokenizer().encode(["It is."])[0].tolist() == same.encode(["It is."])[0].tolist()
    other = changed(tmp_path, "normalizer", {"type": "Lowercase"})
    with pytest.raises(InputError, match="is not what it was when the checkpoint was written"):
        check_same_tokenizer(step, other, settings)
    assert not caplog.records
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "named")
    named = tiny_settings(tmp_path, **{"data.tokenizer": str(tmp_path / "named")})
    check_same_tokenizer(step, other, named)
    assert [r.getMessage() for r in caplog.records] == [
        f"data.tokenizer={tmp_path / 'named'} is another tokenizer than before"
    ]


def test_another_decoder_is_noticed(tmp_path):
    step, settings = step_of(tmp_path), tiny_settings(tmp_path)
    with pytest.raises(InputError, match="is not what it was"):
        check_same_tokenizer(step, changed(tmp_path, "decoder", {"type": "Fuse"}), settings)


def test_shards_of_earlier_versions_are_read(tmp_path):
    """Up to the files, which are not there: the tokenizer is that of the manifest."""
    tokenizer = load_tokenizer("embedded")
    earlier = "03d4840ea10fe48ee1ae7328cb6883849657bb94381809fd151177716d846239"
    shard = Shard("a.array_record", 1, "", 1, 1, 1, 1)
    for fingerprint, message in ((earlier, "is missing"), (earlier[::-1], "made with tokenizer")):
        splits = {"train": [shard], "validation": [shard]}
        manifest = Manifest(
            "embedded", "hash:0.1", "embedded", fingerprint, 4096, "packed", 16, splits
        )
        manifest.write(tmp_path)
        with pytest.raises(InputError, match=message):
            open_shards(str(tmp_path), tokenizer, "packed", 16)
