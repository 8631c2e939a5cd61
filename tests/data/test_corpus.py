"""Corpora: kinds of files hold the same documents, rules split them, errors are named."""

import glob
import gzip
import lzma
import pickle
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_corpus import TEXTS, contents, write_jsonl, write_tfds

from gidd_jax.data import files
from gidd_jax.data.corpus import open_corpus
from gidd_jax.errors import InputError


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    return write_tfds(tmp_path_factory.mktemp("tfds"))


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
