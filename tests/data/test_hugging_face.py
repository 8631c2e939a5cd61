"""Datasets of the Hugging Face hub: which one is asked for, what is read, what is refused."""

import pickle
import sys
import types
from pathlib import Path

import pytest

from gidd_jax.data.corpus import open_corpus
from gidd_jax.data.fingerprint import check_same, fingerprint
from gidd_jax.data.preparation import prepare
from gidd_jax.errors import InputError

TEXTS = [f"Text é {i}." for i in range(9)]


class Table(list):
    """What the library gives back, as far as it is read."""

    column_names = ("id", "text")
    data = types.SimpleNamespace(nbytes=300)
    _fingerprint = "first"

    def select_columns(self, names: list[str]) -> "Table":
        return Table({name: row[name] for name in names} for row in self)


@pytest.fixture
def bars() -> list[str]:
    """What the library was told about its progress bars."""
    return []


@pytest.fixture
def asked(monkeypatch, bars) -> list[tuple]:
    """What the library was asked for; the dataset old/script comes without its script alone."""
    asked = []

    def load_dataset(*arguments: str | None, **options: str) -> Table:
        asked.append((*arguments, options))
        if arguments[0] == "old/script" and "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported")
        if arguments[0] == "no/such":
            raise ValueError("there is no such dataset\non the hub")
        texts = TEXTS if options["split"] == "train" else ["held"]
        return Table({"id": i, "text": text} for i, text in enumerate(texts))

    library = types.ModuleType("datasets")
    vars(library).update(
        load_dataset=load_dataset, disable_progress_bars=lambda: bars.append("off")
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    return asked


def both(path: str, validation: str = "last:2", text_key: str = "text") -> list[list[str]]:
    splits = open_corpus(path, validation, text_key, "line")
    return [[d[i] for i in range(len(d))] for d in (splits.train, splits.validation)]


def test_names_on_the_hub(asked):
    assert both("hf:owner/name") == [TEXTS[:-2], TEXTS[-2:]]
    assert both("hf:owner/name/sample-10BT", "split:test") == [TEXTS, ["held"]]
    assert both("hf:old/script") == [TEXTS[:-2], TEXTS[-2:]]
    assert asked == [
        ("owner/name", None, {"split": "train"}),
        ("owner/name", "sample-10BT", {"split": "train"}),
        ("owner/name", "sample-10BT", {"split": "test"}),
        ("old/script", None, {"split": "train"}),
        ("old/script", None, {"split": "train", "revision": "refs/convert/parquet"}),
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_are_for_terminals(asked, bars, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    both("hf:owner/name")
    assert set(bars) == (set() if terminal else {"off"})


def test_a_changed_dataset_is_noticed(asked, monkeypatch):
    before = fingerprint("hf:owner/name", "split:test", "text")
    assert before["parts"] == [
        {"split train": "first, 9 rows, 300 bytes", "split test": "first, 1 rows, 300 bytes"}
    ]
    check_same(before, fingerprint("hf:owner/name", "split:test", "text"))
    monkeypatch.setattr(Table, "_fingerprint", "second")
    with pytest.raises(InputError, match="split train changed, split test changed"):
        check_same(before, fingerprint("hf:owner/name", "split:test", "text"))


@pytest.mark.parametrize(
    ("path", "validation", "text_key", "match"),
    [
        ("hf:name", "last:2", "text", "OWNER/NAME"),
        ("hf:no/such", "last:2", "text", "there is no such dataset on the hub"),
        ("hf:owner/name", "last:2", "body", "no column 'body'; it has: .*'text'"),
        ("hf:owner/name", "last:2", "id", "row 1: 'id' is int, not a text"),
        ("hf:owner/name", "path:a.txt", "text", "does not fit a hf corpus"),
        ("hf:owner/name", "split:train[:5]", "text", "part of the training split"),
    ],
)
def test_refusals(asked, path, validation, text_key, match):
    with pytest.raises(InputError, match=match):
        both(path, validation, text_key)


def test_the_package_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'gidd-jax\[datasets\]'"):
        both("hf:owner/name")


@pytest.fixture
def saved(tmp_path) -> Path:
    datasets = pytest.importorskip("datasets")
    splits = {"train": TEXTS, "test": ["held"]}
    made = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_saved_datasets(saved, tmp_path):
    """With the library itself, in this process and in the workers of prepare_data."""
    assert both(f"hf:{saved}", "split:test") == [TEXTS, ["held"]]
    train = open_corpus(f"hf:{saved}", "last:2", "text", "line").train
    assert train.num_bytes > 0
    copy = pickle.loads(pickle.dumps(train))
    assert [copy[i] for i in range(len(copy))] == TEXTS[:-2]
    with pytest.raises(InputError, match="no dataset with a split 'nope'"):
        both(f"hf:{saved}", "split:nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a"):
        both(f"hf:{tmp_path / 'empty'}")
    manifest = prepare(
        f"hf:{saved}",
        "embedded",
        tmp_path / "out",
        seq_len=8,
        mode="padded",
        validation="split:test",
        text_key="text",
        txt_documents="line",
        num_workers=1,
        shard_size=4,
    )
    assert manifest.totals("train")["bytes"] == len("".join(TEXTS).encode())
    for file in sorted(saved.rglob("*.arrow")):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError):
        both(f"hf:{saved}", "split:test")
