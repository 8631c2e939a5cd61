"""Shards: the records and batches they give, refusal of those that do not fit or are damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_corpus
from tiny_corpus import TEXTS

from gidd_jax.data import rows, shards
from gidd_jax.data.pipeline import TrainBatches, unigram_bits_per_byte, validation_batches
from gidd_jax.data.preparation import prepare
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError

SEQ_LEN = 16


def settings(path, mode="padded"):
    return tiny_corpus.settings(path, mode=mode, validation="last:4")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "a.txt"
    file.write_text("\n".join(TEXTS))
    return file


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory) -> dict[str, Path]:
    """A folder of shards for each mode."""
    made = {mode: tmp_path_factory.mktemp(mode) / "shards" for mode in rows.TEXT_MODES}
    for mode, folder in made.items():
        prepare(
            str(corpus),
            "embedded",
            folder,
            seq_len=SEQ_LEN,
            mode=mode,
            validation="last:4",
            text_key="text",
            txt_documents="line",
            num_workers=1,
            shard_size=5,
        )
    return made


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "shards"
    for file in folders["padded"].rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(folders["padded"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return copy


def batches(train: TrainBatches, count: int) -> list[dict[str, np.ndarray]]:
    try:
        return [next(train) for _ in range(count)]
    finally:
        train.close()


@pytest.mark.parametrize(("vocab_size", "width"), [(65_535, 2), (65_536, 2), (65_537, 4)])
def test_record_bytes(vocab_size, width):
    ids = np.array([0, 258, vocab_size - 1])
    record = shards.encode_record(ids, 7, vocab_size)
    little_endian = b"".join(int(i).to_bytes(width, "little") for i in ids)
    assert record == (7).to_bytes(4, "little") + little_endian


@pytest.mark.parametrize("mode", ["padded", "crop"])
def test_batches_are_those_of_the_texts(folders, corpus, tokenizer, mode):
    """One record per document, in the same order: the batches agree bit by bit."""
    from_text = TrainBatches(settings(corpus, mode), tokenizer, SEQ_LEN, 4, seed=5)
    from_shards = TrainBatches(settings(folders[mode], mode), tokenizer, SEQ_LEN, 4, seed=5)
    assert from_text.num_records == from_shards.num_records == 19
    for a, b in zip(batches(from_text, 12), batches(from_shards, 12), strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["mask"], b["mask"])


def test_packed_records_hold_every_token_of_each_shard(folders, tokenizer):
    train, _ = shards.open_shards(str(folders["packed"]), tokenizer, "packed", SEQ_LEN)
    expected = []
    for start in range(0, 19, 5):
        tokenised = rows.tokenise(TEXTS[start : min(start + 5, 19)], tokenizer, "packed")
        windows = rows.cut(tokenised, "packed", SEQ_LEN)
        sizes = windows.sums(tokenised.num_bytes)
        expected += [(windows[i].tolist(), int(sizes[i])) for i in range(len(windows))]
    assert [(train[i].tolist(), train.num_bytes(i)) for i in range(len(train))] == expected


@pytest.mark.parametrize("mode", rows.TEXT_MODES)
def test_validation_is_that_of_the_texts(folders, corpus, tokenizer, mode):
    from_text = validation_batches(settings(corpus, mode), tokenizer, SEQ_LEN, 4)
    from_shards = validation_batches(settings(folders[mode], mode), tokenizer, SEQ_LEN, 4)
    assert from_shards.num_bytes == from_text.num_bytes
    assert from_shards.num_tokens == from_text.num_tokens
    for a, b in zip(from_text, from_shards, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["mask"], b["mask"])
    if mode != "packed":
        baselines = [
            unigram_bits_per_byte(settings(path, mode), tokenizer, SEQ_LEN, held)
            for path, held in ((corpus, from_text), (folders[mode], from_shards))
        ]
        assert baselines[0] == baselines[1]


@pytest.mark.parametrize("mode", rows.TEXT_MODES)
def test_resumes_in_the_middle_of_an_epoch_on_other_processes(folders, tokenizer, mode):
    config = settings(folders[mode], mode)
    train = TrainBatches(config, tokenizer, SEQ_LEN, 8, seed=2)
    for _ in range(5):
        next(train)
    state = train.get_state()
    rest = batches(train, 3)
    for count in (2, 4):
        parts = []
        for index in range(count):
            part = TrainBatches(config, tokenizer, SEQ_LEN, 8, 2, index, count)
            part.set_state(state)
            assert part.get_state() == state
            parts.append(batches(part, 3))
        for step in range(3):
            for key in ("tokens", "mask"):
                joined = np.concatenate([p[step][key] for p in parts])
                np.testing.assert_array_equal(joined, rest[step][key])


def test_manifest_counts(folders, tokenizer):
    manifest = shards.verify(folders["padded"])
    totals = manifest.totals("train")
    assert totals["documents"] == totals["records"] == 19
    assert totals["bytes"] == len("".join(TEXTS[:19]).encode())
    assert totals["tokens"] == sum(len(i) + 2 for i in tokenizer.encode(TEXTS[:19]))
    assert [s.documents for s in manifest.splits["train"]] == [5, 5, 5, 4]
    copy = load_tokenizer(folders["padded"] / shards.TOKENIZER_FOLDER)
    assert copy.fingerprint == manifest.fingerprint == tokenizer.fingerprint


def test_other_settings_are_refused(folder, tokenizer, tmp_path):
    with pytest.raises(InputError, match="seq_len 16, this run has 32"):
        shards.open_shards(str(folder), tokenizer, "padded", 32)
    with pytest.raises(InputError, match="mode padded, this run has packed"):
        TrainBatches(settings(folder, "packed"), tokenizer, SEQ_LEN, 4, 0)
    spec = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"made with tokenizer .* use .*tokenizer"):
        shards.open_shards(str(folder), load_tokenizer(other), "padded", SEQ_LEN)


def test_missing_and_short_shards_are_named(folder, tokenizer):
    file = folder / "train-00001.array_record"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"train-00001\.array_record is damaged"):
        TrainBatches(settings(folder), tokenizer, SEQ_LEN, 4, 0)
    file.unlink()
    with pytest.raises(InputError, match=r"train-00001\.array_record is missing"):
        TrainBatches(settings(folder), tokenizer, SEQ_LEN, 4, 0)


def test_changed_bytes_are_found(folder, tokenizer):
    shards.verify(folder)
    file = folder / "train-00001.array_record"
    data = bytearray(file.read_bytes())
    for offset in range(100, 400):  # records follow the file's header
        data[offset] ^= 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"train-00001\.array_record is damaged"):
        shards.verify(folder)
    train = TrainBatches(settings(folder), tokenizer, SEQ_LEN, 19, 0)
    with pytest.raises(InputError, match=r"train-00001\.array_record is damaged"):
        batches(train, 1)


def test_bad_manifests(folder, tokenizer):
    file = folder / shards.MANIFEST
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        shards.Manifest.read(folder)
    file.write_text(json.dumps({k: v for k, v in content.items() if k != "seq_len"}))
    with pytest.raises(InputError, match="damaged"):
        shards.Manifest.read(folder)
    file.unlink()
    with pytest.raises(InputError, match="to its end"):
        TrainBatches(settings(folder), tokenizer, SEQ_LEN, 4, 0)
