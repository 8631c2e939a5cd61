"""A run that continues notices that its corpus has changed, and names the file."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_corpus
from absl import logging

from gidd_jax.checkpoints.checkpoint import Checkpointer, find_checkpoint
from gidd_jax.data import fingerprint, shards
from gidd_jax.data.corpus import named_files
from gidd_jax.data.pipeline import TrainBatches
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError

SEQ_LEN = 16


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Texts in a folder and one beneath it."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for name, word in (("a.txt", "one"), ("b.txt", "two"), ("sub/a.txt", "three")):
        (folder / name).write_text("".join(f"{word} {i} and so on\n" for i in range(6)))
    return folder


def batches(tokenizer, path, index=0, count=1, validation="last:2") -> TrainBatches:
    settings = tiny_corpus.settings(path, validation=validation, mode="padded")
    return TrainBatches(settings, tokenizer, SEQ_LEN, 4, 1, index, count)


def saved(train: TrainBatches) -> dict:
    """The position as it comes back from a checkpoint."""
    return json.loads(json.dumps(train.get_state()))


def change_a_byte(file: Path, offset: int = 9) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(bytes(data))


def test_an_unchanged_corpus_goes_on_bit_by_bit(tokenizer, folder):
    train = batches(tokenizer, folder)
    for _ in range(3):
        next(train)
    state = saved(train)
    expected = [next(train) for _ in range(4)]
    train.close()
    parts = [batches(tokenizer, folder, index, 2) for index in range(2)]
    for part in parts:
        part.set_state(state)
        assert part.get_state() == state
    for batch in expected:
        halves = [next(part) for part in parts]
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([half[key] for half in halves]), value)
        assert parts[0].get_state() == parts[1].get_state()
    for part in parts:
        part.close()


def change(folder):
    change_a_byte(folder / "sub" / "a.txt")


def grow(folder):
    (folder / "b.txt").write_text((folder / "b.txt").read_text() + "more\n")


def remove(folder):
    (folder / "b.txt").unlink()


def add(folder):
    (folder / "c.txt").write_text("new\n")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change, "sub/a.txt changed;"),
        (grow, "b.txt changed;"),
        (remove, "b.txt is gone;"),
        (add, "c.txt is new;"),
    ],
)
def test_what_changed_is_named(tokenizer, folder, edit, words):
    state = saved(batches(tokenizer, folder))
    edit(folder)
    with pytest.raises(InputError) as caught:
        batches(tokenizer, folder).set_state(state)
    message = str(caught.value)
    assert f"data.path={folder} is not what it was when the checkpoint was written: " in message
    assert f"written: {words} restore it, or start in another workdir" in message
    assert "\n" not in message


def test_many_changes_are_counted(tokenizer, folder):
    state = saved(batches(tokenizer, folder))
    for name in ("c.txt", "d.txt", "e.txt", "f.txt", "g.txt"):
        (folder / name).write_text("new\n")
    with pytest.raises(InputError, match=r"c.txt is new, d.txt is new, e.txt is new and 2 more;"):
        batches(tokenizer, folder).set_state(state)


def test_held_out_files_count(tokenizer, folder):
    held_out = folder / "sub" / "a.txt"
    rule = f"path:{held_out}"
    state = saved(batches(tokenizer, folder / "*.txt", validation=rule))
    batches(tokenizer, folder / "*.txt", validation=rule).set_state(state)
    change_a_byte(held_out)
    with pytest.raises(InputError, match=r"written: a.txt \(validation\) changed;"):
        batches(tokenizer, folder / "*.txt", validation=rule).set_state(state)


def test_each_part_of_a_mixture_counts(tokenizer, folder):
    mixture = f"2:{folder / 'a.txt'},1:{folder / 'sub'}"
    state = saved(batches(tokenizer, mixture))
    batches(tokenizer, mixture).set_state(state)
    change_a_byte(folder / "sub" / "a.txt")
    with pytest.raises(InputError, match=r"written: a.txt changed;"):
        batches(tokenizer, mixture).set_state(state)


def test_a_corpus_may_move(tokenizer, folder, monkeypatch, caplog):
    monkeypatch.chdir(folder.parent)
    state = saved(batches(tokenizer, "texts"))
    absolute = saved(batches(tokenizer, folder))
    assert state["corpus"]["parts"] == absolute["corpus"]["parts"]
    moved = folder.parent / "elsewhere"
    moved.mkdir()
    shutil.move(folder, moved / "texts")
    monkeypatch.chdir(moved)
    batches(tokenizer, "texts").set_state(state)
    with caplog.at_level(logging.WARNING):
        batches(tokenizer, moved / "texts").set_state(absolute)
        assert not caplog.records
        # Another path is another config, on which someone has insisted.
        change(moved / "texts")
        batches(tokenizer, moved / "texts").set_state(absolute)
        assert "holds another corpus than before" in caplog.text


def test_positions_of_older_versions_and_damaged_ones(tokenizer, folder):
    train = batches(tokenizer, folder)
    train.set_state({"global_next_index": 8})
    state = saved(train)
    assert state["global_next_index"] == 8
    for corpus in (None, [], {**state["corpus"], "parts": 3}, {"path": "texts"}):
        with pytest.raises(InputError, match="corpus in the data position is damaged"):
            train.set_state({**state, "corpus": corpus})


def test_names_of_files(folder):
    texts = {name: folder / name for name in ("a.txt", "b.txt", "sub/a.txt")}
    assert named_files(str(folder)) == named_files(f"{folder}/**/*.txt") == texts
    assert named_files(f"{folder}/*/a.txt") == {"sub/a.txt": texts["sub/a.txt"]}
    both = named_files(f"{texts['a.txt']},{texts['sub/a.txt']}")
    assert both == {"a.txt": texts["a.txt"], "a.txt (2)": texts["sub/a.txt"]}
    assert list(named_files("embedded")) == ["austen.jsonl"]


def test_a_large_corpus_is_told_by_blocks(tmp_path, monkeypatch):
    """Of every file its size, and bytes from the first to the last; small files whole."""
    file, small = tmp_path / "a.txt", tmp_path / "b.txt"
    data = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8).tobytes()
    file.write_bytes(data)
    small.write_bytes(data[:35])

    def both() -> tuple[str, str]:
        found = fingerprint.file_fingerprints({"a.txt": file, "b.txt": small})
        return found["a.txt"], found["b.txt"]

    whole = both()
    assert whole[0].startswith("10000 bytes ")
    monkeypatch.setattr(fingerprint, "_BLOCK", 10)
    assert both() == whole
    monkeypatch.setattr(fingerprint, "MAX_HASHED_BYTES", 10_034)  # 501 blocks of each
    blocks = both()
    assert blocks[0] != whole[0]
    assert blocks[1] == whole[1]
    for offset in (0, 9_999):
        change_a_byte(file, offset)
        assert both()[0] != blocks[0]
        file.write_bytes(data)
    unread = [n for n in range(200) if n not in set(read_bytes(10_000, 501))]
    change_a_byte(file, unread[0])
    assert both() == blocks
    file.write_bytes(data[:5_000] + data[4_999:])  # one byte more
    assert both()[0].startswith("10001 bytes ")


def read_bytes(size: int, num_blocks: int) -> np.ndarray:
    """The bytes of blocks of ten that lie evenly over a file."""
    starts = np.linspace(0, size - 10, num_blocks).astype(int)
    return (starts[:, None] + np.arange(10)[None]).ravel()


def test_shards_are_told_by_their_manifest(tmp_path):
    def manifest(sha256: str) -> shards.Manifest:
        made = {s: [shards.Shard(f"{s}-0", 9, sha256, 1, 1, 1, 1)] for s in shards.SPLITS}
        return shards.Manifest("a.txt", "last:1", "t", "f", 9, "packed", 8, made)

    manifest("12").write(tmp_path)
    before = fingerprint.fingerprint(str(tmp_path), "last:1", "text")
    assert before["parts"] == [{"train-0": "12", "validation-0": "12"}]
    fingerprint.check_same(before, before)
    manifest("34").write(tmp_path)
    after = fingerprint.fingerprint(str(tmp_path), "last:1", "text")
    with pytest.raises(InputError, match="train-0 changed, validation-0 changed;"):
        fingerprint.check_same(before, after)


def test_it_travels_in_checkpoints(tokenizer, folder, tmp_path):
    train = batches(tokenizer, folder)
    options = {"every": 1, "max_to_keep": 1, "config": {}, "tokenizer": tokenizer}
    with Checkpointer(tmp_path / "run", **options) as writer:
        writer.save(3, {"step": jnp.int32(3)}, train.get_state())
    position = find_checkpoint(tmp_path / "run").data_position()
    assert position == train.get_state()
    train.set_state(position)
    change(folder)
    with pytest.raises(InputError, match=r"sub/a\.txt changed;"):
        batches(tokenizer, folder).set_state(position)
