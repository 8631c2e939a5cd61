"""Mixtures of corpora: shares of the rows, order on any number of processes, validation, errors."""

import json
from pathlib import Path

import grain
import numpy as np
import pytest
import tiny_corpus

from gidd_jax.data import rows, sources
from gidd_jax.data.corpus import open_corpus
from gidd_jax.data.pipeline import TrainBatches, unigram_bits_per_byte, validation_batches
from gidd_jax.data.preparation import prepare
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.mixture import Part, split_mixture

SEQ_LEN = 24
WORDS = ("wiki", "book", "code")  # of which part a document is
SIZES = (12, 12, 7)
NUM_HELD_OUT = 2  # of each part
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A file of each part, and the second one as shards."""
    folder = tmp_path_factory.mktemp("parts")
    for word, size in zip(WORDS, SIZES, strict=True):
        texts = [f"{word} {i} " + "and so on " * (i % 4) for i in range(size)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{word}.jsonl").write_text("".join(lines))
    prepare(
        str(folder / "book.jsonl"),
        "embedded",
        folder / "shards",
        seq_len=SEQ_LEN,
        mode="padded",
        validation=f"last:{NUM_HELD_OUT}",
        text_key="text",
        txt_documents="line",
        num_workers=1,
        shard_size=5,
    )
    return folder


def settings(path: str, **changes):
    ours = {"validation": f"last:{NUM_HELD_OUT}", "mode": "padded", **changes}
    return tiny_corpus.settings(path, **ours)


def mixture(folder: Path, second: str = "book.jsonl") -> str:
    names = ("wiki.jsonl", second, "code.jsonl")
    return ",".join(f"{w}:{folder / n}" for w, n in zip(WEIGHTS, names, strict=True))


def take(train: TrainBatches, count: int) -> dict[str, np.ndarray]:
    """The rows of the next batches."""
    try:
        batches = [next(train) for _ in range(count)]
    finally:
        train.close()
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def texts(tokenizer, found: dict[str, np.ndarray]) -> list[str]:
    pairs = zip(found["tokens"], found["mask"], strict=True)
    return [tokenizer.decode(tokens[mask], skip_special_tokens=True) for tokens, mask in pairs]


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    for key in ("tokens", "mask"):
        np.testing.assert_array_equal(left[key], right[key])


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("embedded", [(1, "embedded")]),
        ("a.txt,b/*.txt", [(1, "a.txt,b/*.txt")]),
        ("tfds:lm1b", [(1, "tfds:lm1b")]),
        ("0.7*.txt", [(1, "0.7*.txt")]),  # a glob
        ("./0.7:a.txt", [(1, "./0.7:a.txt")]),  # a file of that name
        ("3:a.txt", [(3, "a.txt")]),
        (".7:a*.txt,3e-1:tfds:lm1b/x,1:embedded", [(0.7, "a*.txt"), (0.3, "tfds:lm1b/x")]),
    ],
)
def test_paths_with_and_without_weights(path, parts):
    assert split_mixture(path)[: len(parts)] == [Part(*part) for part in parts]


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("0.7:a.txt,b.txt", "every part of a mixture needs a weight and a path.*'b.txt' has none"),
        ("a.txt,0.3:b.txt", "'a.txt' has none"),
        ("0.7:a.txt,0.3:", "'' has none"),
        ("0.7:a.txt,", "'' has none"),
        ("0:a.txt,1:b.txt", "weight of 'a.txt' must lie in"),
        ("1:a.txt,-1:b.txt", "weight of 'b.txt' must lie in"),
        ("1:a.txt,nan:b.txt", "weight of 'b.txt' must lie in"),
        ("1:a.txt,inf:b.txt", "weight of 'b.txt' must lie in"),
        ("1e-7:a.txt", r"must lie in \[1e-06, 1e\+06\]"),
    ],
)
def test_bad_weights(path, match):
    with pytest.raises(InputError, match=match):
        settings(path)


@pytest.mark.parametrize("second", ["book.jsonl", "shards"])
def test_rows_come_in_the_shares_of_the_weights(folder, tokenizer, second):
    config = settings(mixture(folder, second))
    train = TrainBatches(config, tokenizer, SEQ_LEN, 10, seed=3)
    assert train.num_records == sum(SIZES) - 3 * NUM_HELD_OUT
    found = texts(tokenizer, take(train, 40))
    parts = [WORDS.index(text.split()[0]) for text in found]
    constant = [grain.MapDataset.source([part]).repeat(1000) for part in range(3)]
    mixed = grain.MapDataset.mix(constant, list(WEIGHTS))
    assert parts == [mixed[i] for i in range(400)]
    np.testing.assert_allclose(np.bincount(parts), 400 * np.array(WEIGHTS), atol=2)
    # Each part has its own epochs, every document once in each.
    for part, size in enumerate(SIZES):
        own = [text.split()[1] for p, text in zip(parts, found, strict=True) if p == part]
        count = size - NUM_HELD_OUT
        for start in range(0, len(own) - count, count):
            assert sorted(own[start : start + count], key=int) == [str(i) for i in range(count)]
    first, other = ([t.split()[1] for t in found if t.startswith(w)] for w in WORDS[:2])
    assert first[:10] != other[:10]  # of one size, and yet in different orders


def joined(parts: list[TrainBatches], num_batches: int) -> dict[str, np.ndarray]:
    """The rows of the next batches of all processes together."""
    own = [take(part, num_batches) for part in parts]
    by_batch = [{k: v.reshape(num_batches, -1, v.shape[1]) for k, v in o.items()} for o in own]
    return {
        key: np.concatenate([b[key] for b in by_batch], axis=1).reshape(-1, own[0][key].shape[1])
        for key in own[0]
    }


@pytest.mark.parametrize("mode", rows.TEXT_MODES)
def test_order_does_not_depend_on_the_number_of_processes(folder, tokenizer, mode):
    config = settings(mixture(folder), mode=mode)
    whole = take(TrainBatches(config, tokenizer, 8, 8, seed=1), 5)
    for count in (2, 4):
        parts = [TrainBatches(config, tokenizer, 8, 8, 1, index, count) for index in range(count)]
        assert_same(joined(parts, 5), whole)


@pytest.mark.parametrize("second", ["book.jsonl", "shards"])
def test_resumes_on_another_number_of_processes(folder, tokenizer, second):
    config = settings(mixture(folder, second))
    two = [TrainBatches(config, tokenizer, SEQ_LEN, 8, 1, index, 2) for index in range(2)]
    for _ in range(3):
        for part in two:
            next(part)
    state = two[0].get_state()
    assert state == two[1].get_state()
    rest = joined(two, 4)
    for count in (1, 4):
        parts = [
            TrainBatches(config, tokenizer, SEQ_LEN, 8, 1, index, count) for index in range(count)
        ]
        for part in parts:
            part.set_state(state)
        assert_same(joined(parts, 4), rest)


def test_resumes_from_any_position(folder, tokenizer, monkeypatch):
    config = settings(mixture(folder, "shards"))
    expected = take(TrainBatches(config, tokenizer, SEQ_LEN, 4, seed=1), 16)
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 10)  # and where texts are tokenised when read
    train = TrainBatches(config, tokenizer, SEQ_LEN, 2, 1, 1, 2)
    for position in range(0, 56, 5):
        train.set_state({"global_next_index": position})
        found = take(train, 4)
        # The second of two processes: every other row, as the global batch is two rows.
        assert_same(found, {k: v[position + 1 : position + 9 : 2] for k, v in expected.items()})


def test_one_part_is_the_corpus_itself(folder, tokenizer):
    path = str(folder / "wiki.jsonl")
    plain, weighted = (
        take(TrainBatches(settings(p), tokenizer, SEQ_LEN, 4, seed=2), 6)
        for p in (path, f"3:{path}")
    )
    assert_same(plain, weighted)


@pytest.mark.parametrize("second", ["book.jsonl", "shards"])
def test_validation_is_that_of_all_parts(folder, tokenizer, second):
    config = settings(mixture(folder, second))
    held = validation_batches(config, tokenizer, SEQ_LEN, 4)
    batches = list(held)
    found = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    starts = sorted(" ".join(t.split()[:2]) for t in texts(tokenizer, found) if t)
    expected = [f"{w} {n - 1 - i}" for w, n in zip(WORDS, SIZES, strict=True) for i in range(2)]
    assert starts == sorted(expected)
    alone = [
        validation_batches(settings(str(folder / f"{w}.jsonl")), tokenizer, SEQ_LEN, 4)
        for w in WORDS
    ]
    assert held.num_bytes == sum(part.num_bytes for part in alone)
    assert held.num_tokens == sum(part.num_tokens for part in alone)
    assert 0 < unigram_bits_per_byte(config, tokenizer, SEQ_LEN, held) < 12


def test_files_held_out_count_once(folder):
    corpus = open_corpus(
        f"2:{folder / 'wiki.jsonl'},1:{folder / '*.jsonl'}",
        f"path:{folder / 'code.jsonl'}",
        "text",
        "line",
    )
    held = [corpus.validation[i].split()[0] for i in range(len(corpus.validation))]
    assert held == ["code"] * 7
    train = [corpus.train[i].split()[0] for i in range(len(corpus.train))]
    assert train == ["wiki"] * 12 + ["book"] * 12 + ["wiki"] * 12


def test_shards_are_not_made_of_mixtures(folder, tmp_path):
    with pytest.raises(InputError, match="prepare each part into a folder of its own"):
        prepare(
            mixture(folder),
            "embedded",
            tmp_path / "out",
            seq_len=8,
            mode="padded",
            validation="last:2",
            text_key="text",
            txt_documents="line",
            num_workers=1,
            shard_size=5,
        )
