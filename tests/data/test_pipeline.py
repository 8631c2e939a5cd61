"""Batches of training and validation: exact contents, coverage, resumption, errors."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from absl import flags
from tiny_corpus import TEXTS, first_batches, settings, write_jsonl

from gidd_jax.data import rows, sources
from gidd_jax.data.build_assets import split_chapters
from gidd_jax.data.corpus import list_files
from gidd_jax.data.pipeline import TrainBatches, unigram_bits_per_byte, validation_batches
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError

SEQ_LEN = 32


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


# ---- training batches


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["mask"], b["mask"])


@pytest.fixture(params=["memory", "on_the_fly"])
def source(request, monkeypatch):
    """Both ways of reading: tokenised at the start, and text too large for that."""
    if request.param == "on_the_fly":
        monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 1000)
    return request.param


def test_an_epoch_covers_all_documents_in_a_new_order(tmp_path, tokenizer, source):
    path = write_jsonl(tmp_path / "a.jsonl")
    train = TrainBatches(settings(path, mode="padded"), tokenizer, SEQ_LEN, 5, seed=3)
    assert train.num_records == 20
    batches = first_batches(train, 12)
    tokens = np.concatenate([b["tokens"] for b in batches])
    mask = np.concatenate([b["mask"] for b in batches])
    expected = []
    for ids in tokenizer.encode(TEXTS[:20]):
        framed = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]])[:SEQ_LEN]
        expected.append(tuple(np.pad(framed, (0, SEQ_LEN - len(framed)), constant_values=1)))
    epochs = [[tuple(r) for r in tokens[e : e + 20]] for e in (0, 20, 40)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(expected)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    np.testing.assert_array_equal(mask, tokens != tokenizer.pad_id)


def test_packed_epoch_holds_every_token(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl")
    train = TrainBatches(settings(path, mode="packed"), tokenizer, SEQ_LEN, 1, seed=0)
    batches = first_batches(train, train.num_records)
    assert all(b["mask"].all() for b in batches)
    seen = {tuple(b["tokens"][0]) for b in batches}
    stream = [i for ids in tokenizer.encode(TEXTS[:20]) for i in [*ids.tolist(), tokenizer.eos_id]]
    starts = rows.window_starts(len(stream), SEQ_LEN)
    assert seen == {tuple(stream[s : s + SEQ_LEN]) for s in starts}
    assert train.num_records == len(starts) == math.ceil(len(stream) / SEQ_LEN)


def test_crops_are_windows_of_documents_and_change(tmp_path, tokenizer, source):
    path = write_jsonl(tmp_path / "a.jsonl")
    train = TrainBatches(settings(path), tokenizer, 16, 20, seed=0)
    batches = first_batches(train, 30)
    framed = [[0, *ids.tolist(), 0] for ids in tokenizer.encode(TEXTS[:20])]
    windows = {tuple(f[s : s + 16]) for f in framed for s in range(max(len(f) - 16, 0) + 1)}
    found = {tuple(t[m]) for b in batches for t, m in zip(b["tokens"], b["mask"], strict=True)}
    assert found <= windows
    assert len(found) > 100  # far more than one per document
    assert {tuple(f[-16:]) for f in framed} & found  # the end of text can be seen


@pytest.mark.parametrize("mode", rows.TEXT_MODES)
def test_order_does_not_depend_on_the_number_of_processes(tmp_path, tokenizer, mode):
    config = settings(write_jsonl(tmp_path / "a.jsonl"), mode=mode)
    whole = first_batches(TrainBatches(config, tokenizer, SEQ_LEN, 8, seed=1), 7)
    for count in (2, 4):
        parts = [
            first_batches(TrainBatches(config, tokenizer, SEQ_LEN, 8, 1, index, count), 7)
            for index in range(count)
        ]
        joined = [
            {k: np.concatenate([p[step][k] for p in parts]) for k in ("tokens", "mask")}
            for step in range(7)
        ]
        assert_same(joined, whole)


@pytest.mark.parametrize("mode", rows.TEXT_MODES)
def test_empty_tokens_are_put_between_the_same_rows(tmp_path, tokenizer, mode):
    """The same on any number of processes; they are part of the text, and never in validation."""
    file = write_jsonl(tmp_path / "a.jsonl")
    plain, config = (settings(file, mode=mode, empty_tokens=share) for share in (0.0, 0.4))
    whole = first_batches(TrainBatches(config, tokenizer, SEQ_LEN, 8, seed=1), 7)
    parts = [first_batches(TrainBatches(config, tokenizer, SEQ_LEN, 8, 1, i, 2), 7) for i in (0, 1)]
    joined = [{k: np.concatenate([p[n][k] for p in parts]) for k in whole[0]} for n in range(7)]
    assert_same(joined, whole)
    without = first_batches(TrainBatches(plain, tokenizer, SEQ_LEN, 8, seed=1), 7)
    changed = 0
    for batch, other in zip(whole, without, strict=True):
        columns = [b[k] for b in (batch, other) for k in ("tokens", "mask")]
        for ids, mask, text, real in zip(*columns, strict=True):
            empty = mask & (ids == tokenizer.pad_id)
            kept = ids[mask & ~empty]
            if mode != "crop":  # windows of crops are their own
                np.testing.assert_array_equal(kept, text[real][: len(kept)])
            assert mask.sum() == min(len(kept) + empty.sum(), SEQ_LEN)
            changed += empty.any()
    assert changed > 40
    judged = [list(validation_batches(c, tokenizer, SEQ_LEN, 4)) for c in (plain, config)]
    assert_same(*judged)
    pads_with_end = dataclasses.replace(tokenizer, pad_id=tokenizer.eos_id)
    with pytest.raises(InputError, match=r"data\.empty_tokens = 0\.4: tokenizer .* pads with"):
        TrainBatches(config, pads_with_end, SEQ_LEN, 8, seed=1)


@pytest.mark.parametrize("mode", rows.TEXT_MODES)
def test_resumes_in_the_middle_of_an_epoch_on_other_processes(tmp_path, tokenizer, mode):
    config = settings(write_jsonl(tmp_path / "a.jsonl"), mode=mode)
    train = TrainBatches(config, tokenizer, SEQ_LEN, 8, seed=1)
    for _ in range(4):
        next(train)
    state = json.loads(json.dumps(train.get_state()))
    assert state["global_next_index"] == 32
    rest = first_batches(train, 5)
    for count in (2, 4):
        for index in range(count):
            again = TrainBatches(config, tokenizer, SEQ_LEN, 8, 1, index, count)
            next(again)
            again.set_state(state)
            assert again.get_state() == state
            own = slice(index * 8 // count, (index + 1) * 8 // count)
            assert_same(first_batches(again, 5), [{k: v[own] for k, v in b.items()} for b in rest])
    # Another batch size goes on with the same rows.
    finer = TrainBatches(config, tokenizer, SEQ_LEN, 4, seed=1)
    finer.set_state(state)
    halves = [{k: v[s] for k, v in b.items()} for b in rest for s in (slice(4), slice(4, 8))]
    assert_same(first_batches(finer, 10), halves)


def test_resumes_on_the_fly_and_with_workers(tmp_path, tokenizer, monkeypatch):
    config = settings(write_jsonl(tmp_path / "a.jsonl"))
    expected = first_batches(TrainBatches(config, tokenizer, SEQ_LEN, 4, seed=1), 9)
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 1000)
    train = TrainBatches(config, tokenizer, SEQ_LEN, 4, seed=1)
    train.set_state({"global_next_index": 12})
    assert_same(first_batches(train, 6), expected[3:])
    flags.FLAGS.unparse_flags()  # as in an interpreter that runs no command
    config = settings(config.path, num_workers=2)
    train = TrainBatches(config, tokenizer, SEQ_LEN, 4, seed=1)
    train.set_state({"global_next_index": 12})
    assert_same(first_batches(train, 6), expected[3:])
    # In the second epoch (of 20 rows), saved without workers.
    plain = TrainBatches(settings(config.path), tokenizer, SEQ_LEN, 4, seed=1)
    for batch in expected[:7]:
        assert_same([next(plain)], [batch])
    train = TrainBatches(config, tokenizer, SEQ_LEN, 4, seed=1)
    train.set_state(json.loads(json.dumps(plain.get_state())))
    assert plain.num_records == 20
    assert_same(first_batches(train, 2), expected[7:])


def test_share_of_padding(tmp_path, tokenizer, monkeypatch):
    lengths = [len(ids) + 2 for ids in tokenizer.encode(TEXTS)]
    config = settings(write_jsonl(tmp_path / "a.jsonl"), mode="padded")
    train = TrainBatches(config, tokenizer, SEQ_LEN, 4, seed=1)
    kept = [min(length, SEQ_LEN) for length in lengths]
    share = train.padding_share()
    order = [len(row) for row in train._sources[0].records]
    assert set(order) <= set(kept)
    assert share == pytest.approx(1 - np.mean(order) / SEQ_LEN)
    assert 0 < share < 1
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 1000)  # tokenised when it is read
    assert TrainBatches(config, tokenizer, SEQ_LEN, 4, seed=1).padding_share() == share


def test_seed_changes_the_order(tmp_path, tokenizer):
    config = settings(write_jsonl(tmp_path / "a.jsonl"))
    one, same, other = (
        first_batches(TrainBatches(config, tokenizer, SEQ_LEN, 8, seed=s), 1) for s in (0, 0, 1)
    )
    assert_same(one, same)
    assert (one[0]["tokens"] != other[0]["tokens"]).any()


def test_bad_batches(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="multiple of the number of processes, 2"):
        TrainBatches(settings(path), tokenizer, SEQ_LEN, 7, 0, 0, 2)
    with pytest.raises(InputError, match="not of the form"):
        TrainBatches(settings(path), tokenizer, SEQ_LEN, 8, 0).set_state({"next_index": 3})
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(InputError, match="prepare_data"):
        TrainBatches(settings(path, mode="packed"), tokenizer, SEQ_LEN, 8, 0)
    with pytest.raises(InputError, match="prepare_data"):
        TrainBatches(settings(tmp_path / "a.parquet"), tokenizer, SEQ_LEN, 8, 0)


@pytest.mark.parametrize("line", ["{broken", '{"text": null}'])
def test_a_bad_document_of_a_large_corpus_is_named_at_once(tmp_path, tokenizer, monkeypatch, line):
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 100)
    file = tmp_path / "a.jsonl"
    write_jsonl(file)
    file.write_text(file.read_text() + f"{line}\n" + '{"text": "end"}\n')
    with pytest.raises(InputError, match="JSON document 24"):
        TrainBatches(settings(file, validation="last:1"), tokenizer, SEQ_LEN, 24, 0)


# ---- validation batches


@pytest.mark.parametrize("mode", rows.TEXT_MODES)
def test_validation_batches(tmp_path, tokenizer, mode):
    config = settings(write_jsonl(tmp_path / "a.jsonl"), mode=mode, validation="last:7")
    held = validation_batches(config, tokenizer, SEQ_LEN, 4)
    batches = list(held)
    assert_same(batches, list(held))
    assert len(batches) == len(held)
    assert all(b["tokens"].shape == (4, SEQ_LEN) for b in batches)
    mask = np.concatenate([b["mask"] for b in batches])
    tokens = np.concatenate([b["tokens"] for b in batches])
    assert held.num_tokens == mask.sum()
    assert (tokens[~mask] == tokenizer.pad_id).all()
    tokenised = rows.tokenise(TEXTS[-7:], tokenizer, mode)
    expected = rows.cut(tokenised, mode, SEQ_LEN)
    found = [tuple(t[m]) for t, m in zip(tokens, mask, strict=True) if m.any()]
    assert sorted(found) == sorted(tuple(expected[i]) for i in range(len(expected)))
    # The last batch is filled up with rows that count for nothing.
    assert len(mask) - len(found) == -len(found) % 4
    parts = [list(validation_batches(config, tokenizer, SEQ_LEN, 4, i, 2)) for i in range(2)]
    joined = [
        {k: np.concatenate([p[k] for p in pair]) for k in pair[0]}
        for pair in zip(*parts, strict=True)
    ]
    assert_same(joined, batches)


def test_validation_bytes(tmp_path, tokenizer):
    config = settings(write_jsonl(tmp_path / "a.jsonl"), validation="last:7")
    size = len("".join(TEXTS[-7:]).encode())
    held = validation_batches(config, tokenizer, 4096, 4)
    assert held.num_bytes == size
    assert held.num_tokens == sum(len(i) + 2 for i in tokenizer.encode(TEXTS[-7:]))
    packed = validation_batches(
        settings(config.path, validation="last:7", mode="packed"), tokenizer, 4096, 4
    )
    assert (packed.num_bytes, packed.num_tokens) == (size, held.num_tokens - 7)


def test_first_validation_batches_are_a_part_of_all(tmp_path, tokenizer):
    config = settings(write_jsonl(tmp_path / "a.jsonl"), mode="packed", validation="last:12")
    held = validation_batches(config, tokenizer, 8, 4)
    some = validation_batches(config, tokenizer, 8, 4, max_batches=3)
    assert len(some) == 3 < len(held)
    assert_same(list(some), list(held)[:3])
    texts = [tokenizer.decode(t, True) for b in some for t in b["tokens"]]
    assert some.num_bytes == pytest.approx(len("".join(texts).encode()), abs=12)  # cut é
    assert some.num_tokens == 96


def test_unigram_bits_per_byte(tmp_path, tokenizer):
    train, held_out = ["the the cat", "the dog"], ["the cat sat"]
    config = settings(write_jsonl(tmp_path / "a.jsonl", train + held_out), validation="last:1")
    held = validation_batches(config, tokenizer, SEQ_LEN, 4)
    counts = Counter(i for ids in tokenizer.encode(train) for i in [0, *ids.tolist(), 0])
    total = sum(counts.values()) + 4096
    scored = [0, *tokenizer.encode(held_out)[0].tolist(), 0]
    bits = sum(-math.log2((counts[i] + 1) / total) for i in scored)
    found = unigram_bits_per_byte(config, tokenizer, SEQ_LEN, held)
    assert found == pytest.approx(bits / len("the cat sat"), rel=1e-12)


def test_embedded_corpus_is_three_novels_by_chapter():
    (file,) = list_files("embedded")
    assert file.stat().st_size < 2_000_000
    records = [json.loads(line) for line in file.read_text().splitlines()]
    novels = Counter(r["id"][:-3] for r in records)
    assert novels == {"persuasion": 24, "pride-and-prejudice": 61, "sense-and-sensibility": 50}
    assert split_chapters("\n\n".join(r["text"] for r in records)) == records


def test_embedded_corpus_batches_and_baseline(tokenizer):
    config = settings("embedded", validation="hash:0.05", mode="packed")
    train = TrainBatches(config, tokenizer, 512, 2, seed=0)
    train.close()
    held = validation_batches(config, tokenizer, 512, 8)
    assert train.num_records == 797
    assert held.num_bytes == pytest.approx(119_759, rel=0.02)
    # The baseline that a trained model has to beat.
    assert unigram_bits_per_byte(config, tokenizer, 512, held) == pytest.approx(2.265, abs=0.002)
