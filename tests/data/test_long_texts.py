"""Long texts are encoded in parts: the ids and bytes are those of the whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gidd_jax.data import long_texts
from gidd_jax.data.tokenizer import Tokenizer, load_tokenizer
from gidd_jax.errors import InputError

WORDS = ["It's", "a  truth", "\n\n", "we'll", "(twice)", "naïve", "1813,", "\t", "— ☕", "don't"]
TEXT = " ".join(np.random.default_rng(0).choice(WORDS, 600).tolist())


@pytest.fixture(autouse=True)
def short_parts(monkeypatch) -> None:
    monkeypatch.setattr(long_texts, "PART", 256)
    monkeypatch.setattr(long_texts, "LOT", 600)


def trained(folder: Path, kind: str) -> Tokenizer:
    """A tokenizer of TEXT's words, as three families divide them."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    if kind == "wordpiece":
        vocab = {name: i for i, name in enumerate([*special, "it", "'", "s", "##s", "a", "we"])}
        backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        unigram = [(name, -2.0) for name in [*special, "▁", "▁It", "'s", *"Itsatruhdon"]]
        backend = tokenizers.Tokenizer(models.Unigram(unigram, 0, False))
        if kind == "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        else:
            backend.normalizer = normalizers.Prepend("▁")
        backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(special)
    backend.save(str(folder / "tokenizer.json"))
    roles = {"eos_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["embedded", "wordpiece", "metaspace"])
def test_parts_have_the_ids_and_bytes_of_the_whole(tmp_path, monkeypatch, kind):
    tokenizer = load_tokenizer("embedded") if kind == "embedded" else trained(tmp_path, kind)
    texts = [TEXT, "It's", "", TEXT[::-1]]
    in_parts, alone = tokenizer.encode_with_bytes(texts), tokenizer.encode(texts)
    parts = long_texts.divide(TEXT, tokenizer._splits)
    assert "".join(parts) == TEXT
    assert len(parts) > 8
    assert max(map(len, parts)) <= 256
    monkeypatch.setattr(long_texts, "PART", 1 << 20)
    whole = tokenizer.encode_with_bytes(texts)
    for text, (ids, num_bytes), only, expected in zip(texts, in_parts, alone, whole, strict=True):
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(only, expected[0])
        np.testing.assert_array_equal(num_bytes, expected[1])
        assert num_bytes.sum() == len(text.encode())


def test_what_cannot_be_cut_has_a_limit(tmp_path, monkeypatch):
    tokenizer = trained(tmp_path, "whole")
    assert long_texts.divide(TEXT, tokenizer._splits) == [TEXT]
    whole = tokenizer.encode([TEXT])[0]
    monkeypatch.setattr(long_texts, "MOST", 1000)
    with pytest.raises(
        InputError, match=r"^text 2 of 2, \"— ☕ 18.*, has 3,261 characters, and this"
    ):
        tokenizer.encode(["It's", TEXT])
    monkeypatch.undo()
    np.testing.assert_array_equal(tokenizer.encode([TEXT])[0], whole)


def test_a_text_of_nothing_but_one_word_has_a_limit(monkeypatch):
    monkeypatch.setattr(long_texts, "MOST", 1000)
    tokenizer = load_tokenizer("embedded")
    assert len(tokenizer.encode(["a" * 1000])[0]) > 0
    with pytest.raises(InputError, match="divide it into documents of at most 1,000 characters"):
        tokenizer.encode(["a" * 1001])


def test_lots_hold_few_characters():
    made = list(long_texts.lots([TEXT, "a", "b" * 300, "c" * 290], lambda *_: True))
    assert max(sum(len(part.text) for part in lot) for lot in made) <= 600
    parts = [part for lot in made for part in lot]
    joined = ["".join(part.text for part in parts if part.number == n) for n in range(4)]
    assert joined == [TEXT, "a", "b" * 300, "c" * 290]
