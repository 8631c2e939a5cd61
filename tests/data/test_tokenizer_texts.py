"""Texts and tokenizers that do not fit: spelled special tokens, dropped characters, no tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gidd_jax.data import rows
from gidd_jax.data.tokenizer import Tokenizer, load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.sampling.trace import written_by

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
ROLES = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "mask_token": "<mask>"}
LETTERS = ["▁", *"</>abcehklmnopstuw[]"]


def wrapped(backend: tokenizers.Tokenizer, folder: Path, **roles: str) -> Tokenizer:
    backend.add_special_tokens([token for token in SPECIAL if backend.token_to_id(token)])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(ROLES | roles))
    return load_tokenizer(folder)


def words(folder: Path, **options: Any) -> Tokenizer:
    vocab = {name: i for i, name in enumerate([*SPECIAL, "hello", "world", "moon"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.normalizer = normalizers.Lowercase()
    return wrapped(backend, folder, **options)


def unigram(folder: Path) -> Tokenizer:
    pieces = [(token, 0.0) for token in SPECIAL] + [(letter, -3.0) for letter in LETTERS]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return wrapped(backend, folder)


def word_pieces(folder: Path) -> Tokenizer:
    tokens = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    return wrapped(backend, folder)


def whole_words(folder: Path) -> Tokenizer:
    """BPE that looks a word up before it merges."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(backend, folder)


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int | None]:
    return [tokenizer.backend.token_to_id(token) for token in tokens]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (unigram, [*"▁a", *"▁</s>", *"▁<mask>", *"▁b"]),
        (
            word_pieces,
            ["a", "<", "/", "##s", "##>", "<", "m", "##a", "##s", "##k", "##>", "b"],
        ),
        (whole_words, [*"a</s><mask>b"]),
        (words, ["<unk>"] * 6),
    ],
)
def test_special_tokens_of_the_models_own_vocabulary_stay_text(tmp_path, make, expected):
    tokenizer = make(tmp_path)
    (ids,) = tokenizer.encode(["a </s> <mask> b"])
    assert ids.tolist() == ids_of(tokenizer, *expected)
    ((with_bytes, num_bytes),) = tokenizer.encode_with_bytes(["a </s> <mask> b"])
    assert with_bytes.tolist() == ids.tolist()
    assert num_bytes.sum() == 15
    # Others are what they were, beside such a text and alone.
    both = tokenizer.encode(["a b", "a </s>"])[0]
    assert both.tolist() == tokenizer.encode(["a b"])[0].tolist()


def test_what_a_unigram_model_spells_comes_back(tmp_path):
    tokenizer = unigram(tmp_path)
    text = "he said </s> <s><mask> on"
    (ids,) = tokenizer.encode([text.replace("said", "spoke")])
    assert tokenizer.decode(ids) == text.replace("said", "spoke")


def test_a_special_token_that_cannot_be_text_is_named(tmp_path):
    vocab = {"<unk>": 0, "#": 1, "a": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = wrapped(backend, tmp_path, eos_token="#")
    assert tokenizer.encode(["a zz"])[0].tolist() == [2, 0]  # unknown is no special thing
    with pytest.raises(InputError, match=rf"{tmp_path}.*text 2 of 2 .* '#' \(id 1\)"):
        tokenizer.encode(["a", "a # a"])


def test_a_text_that_cannot_be_encoded_is_one_line(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "1": 1}))
    tokenizer = wrapped(backend, tmp_path)
    with pytest.raises(InputError, match=rf"{tmp_path}.* cannot encode a text: WordLevel error"):
        tokenizer.encode(["2"])


def test_what_tokens_write_without_an_a(tmp_path):
    vocab = {"</s>": 0, "1": 1, "2": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert written_by(wrapped(backend, tmp_path), np.array([2])) == [" 2"]


# ---- texts that do not come back


TEXT = "  Hello   zzz\tWORLD! hello  "


def test_pieces_are_the_text(tmp_path):
    tokenizer = words(tmp_path)
    assert tokenizer.pieces(TEXT) == ["  Hello", "   zzz", "\tWORLD!", " hello  "]
    assert tokenizer.pieces(" ") == []
    assert load_tokenizer("embedded").pieces("aé b") == ["a", "é", "", " b"]


def test_what_was_not_changed_stays_as_it_is_written(tmp_path):
    tokenizer = words(tmp_path)
    (before,) = tokenizer.encode([TEXT])
    assert tokenizer.revise(TEXT, before, before) == TEXT
    hello, world, moon = ids_of(tokenizer, "hello", "world", "moon")

    def changed(position: int, token_id: int | None) -> str:
        after = before.copy()
        after[position] = token_id
        return tokenizer.revise(TEXT, before, after)

    assert changed(2, moon) == "  Hello   zzz moon hello  "
    assert changed(1, world) == "  Hello world\tWORLD! hello  "
    assert changed(0, moon) == "moon   zzz\tWORLD! hello  "
    assert changed(3, tokenizer.eos_id) == "  Hello   zzz\tWORLD!"
    after = np.array([hello, world, moon, hello])
    assert tokenizer.revise(TEXT, before, after) == "  Hello world moon hello  "


def test_a_character_of_several_tokens_changes_as_a_whole(tmp_path):
    vocab = {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    vocab |= {token: i for i, token in enumerate(SPECIAL)} | {"a": 261, "b": 262}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Lowercase()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = wrapped(backend, tmp_path)
    text = "AéBü"
    (before,) = tokenizer.encode([text])
    assert before.tolist() == [261, 5 + 0xC3, 5 + 0xA9, 262, 5 + 0xC3, 5 + 0xBC]
    after = before.copy()
    after[2] = 5 + 0xA8
    assert tokenizer.revise(text, before, after) == "AèBü"


def test_a_text_that_comes_back_is_decoded():
    tokenizer = load_tokenizer("embedded")
    text = "It is a truth, é. "
    (before,) = tokenizer.encode([text])
    after = np.concatenate([tokenizer.encode([" lie"])[0], before])[: len(before)]
    expected = tokenizer.decode(after)
    assert tokenizer.revise(text, before, after) == expected


@pytest.mark.parametrize("mode", rows.TEXT_MODES)
def test_bytes_of_a_text_without_tokens_count_with_its_end(tmp_path, mode):
    tokenizer = words(tmp_path)
    texts = ["hello", "\u2003\u2003", "", "world "]
    assert [len(ids) for ids in tokenizer.encode(texts)] == [1, 0, 0, 1]
    documents = rows.tokenise(texts, tokenizer, mode)
    assert documents.ids.tolist() == [1, 5, 2, 1, 2, 1, 2, 1, 6, 2]
    assert documents.num_bytes.tolist() == [0, 5, 0, 0, 6, 0, 0, 0, 6, 0]
    assert rows.cut(documents, mode, 16).sums(documents.num_bytes).sum() == 17
