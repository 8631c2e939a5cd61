"""Tokenizers: round trips, literal special tokens, byte counts, special ids, errors."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gidd_jax.data.corpus import open_corpus
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError

TEXTS = [
    "Hello  world,\n\n\tthis is\r\na test. ",
    "naïve café — “quotes” 你好 😀👩‍👩‍👧 é",
    "The [MASK] and <|endoftext|> and [PAD], [UNK] <s></s> [MASK][MASK] of it",
    "\x00\x7f  \u2028 \ufeff",
    " ",
]


def byte_level(folder: Path, special: tuple[str, ...] = (), **config: str) -> Path:
    """A folder with a tokenizer of the 256 bytes and one merge, and its config when given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet, "th"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def embedded():
    return load_tokenizer("embedded")


def test_embedded_ids(embedded):
    assert embedded.vocab_size == 4096
    assert (embedded.bos_id, embedded.eos_id, embedded.pad_id, embedded.mask_id) == (0, 0, 1, 2)
    ids = embedded.encode(["It is a truth universally acknowledged"])[0]
    # The vocabulary fits the corpus: words, not letters.
    assert len(ids) <= 8


def test_embedded_tokenizer_saw_training_text_only(embedded):
    from gidd_jax.data.build_assets import train_tokenizer

    splits = open_corpus("embedded", "hash:0.05", "text", "file")
    texts = [splits.train[i] for i in range(len(splits.train))]
    again = train_tokenizer(texts, 4096)
    assert again.get_vocab() == embedded.backend.get_vocab()


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_is_exact(embedded, text):
    (ids,) = embedded.encode([text])
    assert embedded.decode(ids) == text


def test_round_trip_of_the_embedded_corpus(embedded):
    corpus = open_corpus("embedded", "hash:0.05", "text", "file").validation
    texts = [corpus[i] for i in range(len(corpus))]
    assert [embedded.decode(ids) for ids in embedded.encode(texts)] == texts


@pytest.mark.parametrize("copy", [lambda t: t, lambda t: pickle.loads(pickle.dumps(t))])
def test_special_tokens_written_in_a_text_stay_text(embedded, copy):
    tokenizer = copy(embedded)
    special = {tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id}
    (ids,) = tokenizer.encode([TEXTS[2]])
    (with_bytes,) = tokenizer.encode_with_bytes([TEXTS[2]])
    assert not special & set(ids.tolist())
    np.testing.assert_array_equal(with_bytes[0], ids)
    assert tokenizer.decode(ids) == TEXTS[2]
    assert tokenizer.decode([tokenizer.mask_id]) == "[MASK]"
    assert tokenizer.decode([tokenizer.mask_id], skip_special_tokens=True) == ""


def test_bytes_per_token(embedded):
    for text, (ids, num_bytes) in zip(TEXTS, embedded.encode_with_bytes(TEXTS), strict=True):
        assert len(ids) == len(num_bytes)
        assert num_bytes.sum() == len(text.encode())
    ((ids, num_bytes),) = embedded.encode_with_bytes(["Miss Dashwood's  house.\n\n"])
    assert num_bytes.tolist() == [len(embedded.decode([i])) for i in ids]
    # An é of two byte tokens counts with the first of them.
    ((_, num_bytes),) = embedded.encode_with_bytes(["aé"])
    assert num_bytes.tolist() == [1, 2, 0]
    assert embedded.encode_with_bytes([""])[0][1].size == 0


def test_missing_pad_and_mask_are_added(tmp_path):
    from transformers import AutoTokenizer

    folder = byte_level(tmp_path, ("<|endoftext|>",), eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size) == (258, 259, 260)
    # The id 0 is a legal EOS, and BOS may be missing.
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)
    tokenizer.save(tmp_path / "saved")
    hf = AutoTokenizer.from_pretrained(str(tmp_path / "saved"), local_files_only=True)
    assert len(hf) == tokenizer.vocab_size
    assert (hf.pad_token_id, hf.mask_token_id, hf.eos_token_id) == (258, 259, 0)
    assert (
        hf("this", add_special_tokens=False)["input_ids"] == tokenizer.encode(["this"])[0].tolist()
    )


def test_bos_of_id_zero_is_preferred_to_cls(tmp_path):
    special = ("<s>", "</s>", "[CLS]", "[SEP]")
    names = dict(zip(("bos_token", "eos_token", "cls_token", "sep_token"), special, strict=True))
    tokenizer = load_tokenizer(byte_level(tmp_path, special, **names))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_word_pieces_with_cls_and_sep(tmp_path):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {t: i for i, t in enumerate([*names, "hello", "wor", "##ld", "[", "]", "mask"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(names)
    backend.save(str(tmp_path / "tokenizer.json"))
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    config = dict(zip(roles, names, strict=True), tokenizer_class="PreTrainedTokenizerFast")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 11
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
    assert (tokenizer.pad_id, tokenizer.mask_id) == (0, 4)
    # Dropped blanks count with the next token, at the end of a text with the last one.
    ((ids, num_bytes),) = tokenizer.encode_with_bytes(["  Hello   WORLD  [MASK] "])
    assert ids.tolist() == [5, 6, 7, 8, 10, 9]
    assert num_bytes.tolist() == [7, 6, 2, 3, 4, 2]


def test_folder_with_only_tokenizer_json(tmp_path):
    assert load_tokenizer(byte_level(tmp_path, ("<s>", "</s>"))).bos_id == 0
    assert load_tokenizer(byte_level(tmp_path, ("<s>", "</s>"))).eos_id == 1


def test_fingerprint(tmp_path, embedded):
    embedded.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == embedded.fingerprint
    assert pickle.loads(pickle.dumps(embedded)).fingerprint == embedded.fingerprint
    special = ("<s>", "</s>")
    first = load_tokenizer(byte_level(tmp_path / "a", special, eos_token="</s>"))
    role = load_tokenizer(byte_level(tmp_path / "b", special, eos_token="<s>"))
    vocab = load_tokenizer(byte_level(tmp_path / "c", ("<t>", "</s>"), eos_token="</s>"))
    prints = {t.fingerprint for t in (embedded, first, role, vocab)}
    assert len(prints) == 4


BPE = {"type": "BPE", "vocab": {"<e>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<e>", 0.0], ["a", -1.0], ["aa", -2.5]]}
PIECES = {"type": "WordPiece", "unk_token": "[U]", "vocab": {"<e>": 0, "a": 1, "[U]": 2}}
PIECES |= {"max_input_chars_per_word": 100, "continuing_subword_prefix": "##"}


@pytest.mark.parametrize(
    ("model", "part", "change"),
    [
        (UNIGRAM, "model", {"vocab": [["<e>", 0.0], ["a", -1.5], ["aa", -2.5]]}),
        (UNIGRAM, "model", {"byte_fallback": True}),
        (UNIGRAM, "model", {"unk_id": 1}),
        (BPE, "model", {"ignore_merges": True}),
        (BPE, "model", {"merges": []}),
        (BPE, "model", {"fuse_unk": True}),
        (BPE, "model", {"unk_token": "b"}),
        (PIECES, "model", {"max_input_chars_per_word": 7}),
        (PIECES, "model", {"continuing_subword_prefix": "@@"}),
        (BPE, "added", {"lstrip": True}),
        (BPE, "added", {"normalized": True}),
        (BPE, "added", {"special": True}),
        (BPE, "decoder", {"type": "Fuse"}),
        (BPE, "normalizer", {"type": "Lowercase"}),
        (BPE, "pre_tokenizer", {"type": "WhitespaceSplit"}),
    ],
)
def test_fingerprint_of_what_changes_ids_or_texts(tmp_path, model, part, change):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = flags | {"id": 1, "content": "a"}
    spec: dict = {"version": "1.0", "model": model, "added_tokens": [added]}
    found = []
    for changed in (False, True):
        if changed and part == "added":
            spec["added_tokens"] = [added | change]
        elif changed:
            spec[part] = spec.get(part, {}) | change
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
        found.append(load_tokenizer(tmp_path))
    before, after = found
    assert before.fingerprint != after.fingerprint
    assert not before.has_fingerprint(after.fingerprint)
    assert after.has_fingerprint(after.fingerprint)


def test_fingerprints_of_earlier_versions_are_compared_as_they_were_made(embedded, tmp_path):
    written_then = "03d4840ea10fe48ee1ae7328cb6883849657bb94381809fd151177716d846239"
    assert embedded.fingerprint.startswith("2:")
    assert embedded.has_fingerprint(written_then)
    assert embedded.has_fingerprint(embedded.fingerprint)
    assert not embedded.has_fingerprint(written_then[::-1])
    assert not load_tokenizer(byte_level(tmp_path, ("</s>",))).has_fingerprint(written_then)


@pytest.mark.parametrize("name", ["/does/not/exist", "./nothing", "a/b/c", ""])
def test_missing_folder(name):
    with pytest.raises(InputError, match="no tokenizer folder"):
        load_tokenizer(name)


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="neither an EOS nor a SEP"):
        load_tokenizer(byte_level(tmp_path / "no_end"))
