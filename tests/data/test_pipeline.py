"""Corpora, splits, rows and batches: exact contents, coverage, resumption, errors."""

import glob
import gzip
import json
import lzma
import math
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from absl import flags

from gidd_jax.data import files, pipeline, rows
from gidd_jax.data.build_assets import split_chapters
from gidd_jax.data.corpus import list_files, open_corpus
from gidd_jax.data.pipeline import TrainBatches, unigram_bits_per_byte, validation_batches
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.settings import DataSettings

TEXTS = [f"Document {i}: " + f"words é {i} and more. " * (1 + 5 * (i % 4)) for i in range(23)]
SEQ_LEN = 32


class LocalText(tfds.core.GeneratorBasedBuilder):
    """A prepared dataset that needs neither a network nor TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(["held"])}

    def _generate_examples(self, texts):
        for i, text in enumerate(texts):
            yield i, {"text": text}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    builder = LocalText(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def write_jsonl(file: Path, texts=TEXTS, key="text") -> str:
    file.write_text("".join(json.dumps({key: t}, ensure_ascii=False) + "\n" for t in texts))
    return str(file)


def settings(path, **changes) -> DataSettings:
    values = {
        "path": str(path),
        "tokenizer": "embedded",
        "validation": "last:3",
        "text_key": "text",
        "txt_documents": "line",
        "mode": "crop",
        "num_workers": 0,
    }
    return DataSettings(**{**values, **changes})


def contents(documents) -> list[str]:
    return [documents[i] for i in range(len(documents))]


def both(path, validation="last:1", text_key="text", txt_documents="line") -> list[str]:
    splits = open_corpus(str(path), validation, text_key, txt_documents)
    return contents(splits.train) + contents(splits.validation)


# ---- sources


def test_kinds_of_file_hold_the_same_documents(tmp_path, tfds_folder):
    plain = write_jsonl(tmp_path / "a.jsonl")
    data = Path(plain).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(data))
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    table = pyarrow.table({"text": TEXTS, "other": list(range(23))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.txt", "a.parquet"):
        assert both(tmp_path / name) == TEXTS, name
    # tfds shuffles the examples once, when it prepares them.
    assert sorted(both(f"tfds:{tfds_folder}")) == sorted(TEXTS)


def test_documents_of_txt_files(tmp_path):
    text = "\ufeffone\r\nstill one\r\n\r\n \t\r\ntwo é\nlast\n\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    write_jsonl(tmp_path / "held.jsonl", ["held"])
    path, held = str(tmp_path / "a.txt"), f"path:{tmp_path / 'held.jsonl'}"
    lines = open_corpus(path, held, "text", "line").train
    assert contents(lines) == ["one", "still one", "two é", "last"]
    blank = open_corpus(path, held, "text", "blank_line").train
    assert contents(blank) == ["one\r\nstill one", "two é\nlast"]
    whole = open_corpus(path, held, "text", "file").train
    assert contents(whole) == [text[1:]]


def test_folders_globs_and_comma_lists(tmp_path):
    (tmp_path / "sub").mkdir()
    a = write_jsonl(tmp_path / "a.jsonl", ["a0", "a1"])
    b = write_jsonl(tmp_path / "sub" / "b.jsonl", ["b0"])
    (tmp_path / "notes.md").write_text("not data")
    assert both(tmp_path) == ["a0", "a1", "b0"]
    assert both(f"{b},{a}") == ["b0", "a0", "a1"]
    assert both(tmp_path / "**" / "*.jsonl") == ["a0", "a1", "b0"]
    assert glob.glob(str(tmp_path / "*.jsonl")) == [a]
    assert both(f"{a},{a},{b}") == ["a0", "a1", "b0"]  # a file counts once


def test_documents_survive_pickling(tmp_path, tfds_folder):
    for path in (write_jsonl(tmp_path / "a.jsonl"), f"tfds:{tfds_folder}"):
        train = open_corpus(path, "last:3", "text", "line").train
        assert contents(pickle.loads(pickle.dumps(train))) == contents(train)


def test_unreadable_sources(tmp_path, tfds_folder):
    def fails(match, path, validation="last:1", text_key="text", txt="line"):
        with pytest.raises(InputError, match=match) as caught:
            both(path, validation, text_key, txt)
        assert "\n" not in str(caught.value)

    fails("does not exist", tmp_path / "none.jsonl")
    fails("holds no .txt", tmp_path)
    (tmp_path / "empty.txt").write_text("")
    fails("holds no text", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("ok\ncafé\n".encode("latin-1"))
    fails("byte 6 is not UTF-8", tmp_path / "latin.txt")
    a = write_jsonl(tmp_path / "a.jsonl", key="body")
    fails("has no 'text'; it has: body", a)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    fails("JSON document 2 is not valid", tmp_path / "bad.jsonl")
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    fails("is int, not a text", tmp_path / "number.jsonl")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    fails("surrogate", tmp_path / "half.jsonl")
    (tmp_path / "a.csv").write_text("text\na\n")
    fails("legal suffixes", tmp_path / "a.csv")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(Path(a).read_bytes())[:-9])
    fails("cannot be read", tmp_path / "a.jsonl.gz")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    fails("not a Parquet file", tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "b.parquet")
    fails("no column 'text'; it has: body", tmp_path / "b.parquet")
    fails("no feature 'body'; it has: text", f"tfds:{tfds_folder}", text_key="body")
    fails("tfds dataset 'no_such_set'", "tfds:no_such_set")
    fails("split 'nope'", f"tfds:{tfds_folder}", "split:nope")
    fails("part of the training split", f"tfds:{tfds_folder}", "split:train[:5]")
    fails("txt_documents 'page'", tmp_path / "latin.txt", txt="page")


def test_unpacked_size_is_limited(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 100))
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(InputError, match="decompress it"):
        both(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_tfds_are_for_terminals(tfds_folder, monkeypatch, terminal):
    told = []
    monkeypatch.setattr(tfds, "display_progress_bar", told.append)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    open_corpus(f"tfds:{tfds_folder}", "last:2", "text", "line")
    assert set(told) == {terminal}


# ---- splits


def test_validation_rules(tmp_path, tfds_folder):
    path = write_jsonl(tmp_path / "a.jsonl")
    last = open_corpus(path, "last:5", "text", "line")
    assert (contents(last.train), contents(last.validation)) == (TEXTS[:-5], TEXTS[-5:])
    held = write_jsonl(tmp_path / "held.jsonl", ["held 1", "held 2"])
    by_file = open_corpus(str(tmp_path), f"path:{held}", "text", "line")
    assert contents(by_file.train) == TEXTS
    assert contents(by_file.validation) == ["held 1", "held 2"]
    by_split = open_corpus(f"tfds:{tfds_folder}", "split:test", "text", "line")
    assert sorted(contents(by_split.train)) == sorted(TEXTS)
    assert contents(by_split.validation) == ["held"]


def test_hash_split_goes_by_contents(tmp_path):
    texts = [f"text {i}" for i in range(400)]
    one = open_corpus(write_jsonl(tmp_path / "a.jsonl", texts * 2), "hash:0.25", "text", "line")
    train, held = contents(one.train), contents(one.validation)
    assert Counter(train + held) == Counter(texts * 2)
    assert not set(train) & set(held)  # a document that occurs twice is on one side
    assert 0.2 < len(held) / 800 < 0.3
    other = open_corpus(write_jsonl(tmp_path / "b.jsonl", texts[::-1]), "hash:0.25", "text", "line")
    assert set(contents(other.validation)) == set(held)
    wider = open_corpus(str(tmp_path / "b.jsonl"), "hash:0.5", "text", "line")
    assert set(contents(wider.validation)) > set(held)


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ("last:0", "COUNT must be"),
        ("last:23", "leaves no training document"),
        ("hash:1.5", "between 0 and 1"),
        ("hash:0.0001", "leaves no validation document"),
        ("split:test", "legal values"),
        ("some", "legal values"),
        ("path:/none", "does not exist"),
    ],
)
def test_bad_validation_rules(tmp_path, rule, match):
    with pytest.raises(InputError, match=match):
        open_corpus(write_jsonl(tmp_path / "a.jsonl"), rule, "text", "line")


def test_validation_may_not_take_every_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="takes every file"):
        open_corpus(path, f"path:{path}", "text", "line")


# ---- rows


def test_every_crop_is_drawn_and_the_last_token_is_in_reach():
    ids = np.arange(10)
    rng = np.random.default_rng(0)
    starts = Counter(int(rows.crop(ids, 4, rng)[0]) for _ in range(7000))
    assert sorted(starts) == list(range(7))
    # 1000 expected for each: 5 standard deviations are 146.
    assert all(abs(n - 1000) < 150 for n in starts.values())
    np.testing.assert_array_equal(rows.crop(ids, 10, rng), ids)
    np.testing.assert_array_equal(rows.crop(ids, 12, rng), ids)


@pytest.mark.parametrize(
    ("num_tokens", "starts"),
    [(0, [0]), (3, [0]), (4, [0]), (5, [0, 1]), (8, [0, 4]), (11, [0, 4, 7])],
)
def test_windows_cover_everything(num_tokens, starts):
    assert rows.window_starts(num_tokens, 4).tolist() == starts


def test_pad():
    row = rows.pad(np.array([5, 6]), 4, 1)
    assert row["tokens"].tolist() == [5, 6, 1, 1]
    assert row["mask"].tolist() == [True, True, False, False]
    assert (row["tokens"].dtype, row["mask"].dtype) == (np.int32, np.bool_)


def test_rows_of_each_mode(tokenizer):
    texts = ["alpha beta", "gamma delta epsilon", ""]
    ids = [i.tolist() for i in tokenizer.encode(texts)]
    end = [tokenizer.eos_id]
    framed = [end + i + end for i in ids]
    tokenised = rows.tokenise(texts, tokenizer, "crop")
    assert [tokenised.whole()[i].tolist() for i in range(3)] == framed
    # BOS and EOS stand for no bytes.
    sizes = [[0, *(len(tokenizer.decode([i])) for i in d), 0] for d in ids]
    assert tokenised.num_bytes.tolist() == [size for document in sizes for size in document]
    exact = len(framed[0])  # the document that exactly fills a row gains no other row
    padded = rows.cut(tokenised, "padded", exact)
    assert [padded[i].tolist() for i in range(len(padded))] == [f[:exact] for f in framed]
    cropped = rows.cut(tokenised, "crop", exact)
    assert cropped[0].tolist() == framed[0]
    assert cropped[1].tolist() == framed[1][:exact]
    assert cropped[len(cropped) - 2].tolist() == framed[1][-exact:]
    # Packed: one separator where BOS and EOS are the same token.
    stream = ids[0] + end + ids[1] + end + end
    tokenised = rows.tokenise(texts, tokenizer, "packed")
    assert tokenised.ids.tolist() == stream
    packed = rows.cut(tokenised, "packed", 4)
    starts = rows.window_starts(len(stream), 4)
    assert [packed[i].tolist() for i in range(len(packed))] == [stream[s : s + 4] for s in starts]
    assert packed.sums(tokenised.num_bytes)[0] == len(tokenizer.decode(packed[0], True))


# ---- training batches


def first_batches(train: TrainBatches, count: int) -> list[dict[str, np.ndarray]]:
    try:
        return [next(train) for _ in range(count)]
    finally:
        train.close()


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["mask"], b["mask"])


@pytest.fixture(params=["memory", "on_the_fly"])
def source(request, monkeypatch):
    """Both ways of reading: tokenised at the start, and text too large for that."""
    if request.param == "on_the_fly":
        monkeypatch.setattr(pipeline, "MAX_TEXT_BYTES", 1000)
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


@pytest.mark.parametrize("mode", rows.MODES)
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


@pytest.mark.parametrize("mode", rows.MODES)
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
    monkeypatch.setattr(pipeline, "MAX_TEXT_BYTES", 1000)
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
    monkeypatch.setattr(pipeline, "MAX_TEXT_BYTES", 1000)  # tokenised when it is read
    assert TrainBatches(config, tokenizer, SEQ_LEN, 4, seed=1).padding_share() == share


def test_seed_changes_the_order(tmp_path, tokenizer):
    config = settings(write_jsonl(tmp_path / "a.jsonl"))
    one, same, other = (
        first_batches(TrainBatches(config, tokenizer, SEQ_LEN, 8, seed=s), 1) for s in (0, 0, 1)
    )
    assert_same(one, same)
    assert (one[0]["tokens"] != other[0]["tokens"]).any()


def test_tfds_batches(tokenizer, tfds_folder):
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


def test_bad_batches(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="multiple of the number of processes, 2"):
        TrainBatches(settings(path), tokenizer, SEQ_LEN, 7, 0, 0, 2)
    with pytest.raises(InputError, match="not of the form"):
        TrainBatches(settings(path), tokenizer, SEQ_LEN, 8, 0).set_state({"next_index": 3})
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    monkeypatch.setattr(pipeline, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(InputError, match="prepare_data"):
        TrainBatches(settings(path, mode="packed"), tokenizer, SEQ_LEN, 8, 0)
    with pytest.raises(InputError, match="prepare_data"):
        TrainBatches(settings(tmp_path / "a.parquet"), tokenizer, SEQ_LEN, 8, 0)


@pytest.mark.parametrize("line", ["{broken", '{"text": null}'])
def test_a_bad_document_of_a_large_corpus_is_named_at_once(tmp_path, tokenizer, monkeypatch, line):
    monkeypatch.setattr(pipeline, "MAX_TEXT_BYTES", 100)
    file = tmp_path / "a.jsonl"
    write_jsonl(file)
    file.write_text(file.read_text() + f"{line}\n" + '{"text": "end"}\n')
    with pytest.raises(InputError, match="JSON document 24"):
        TrainBatches(settings(file, validation="last:1"), tokenizer, SEQ_LEN, 24, 0)


# ---- validation batches


@pytest.mark.parametrize("mode", rows.MODES)
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
