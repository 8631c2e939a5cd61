"""Tokenizers of symbols: ids as they are, single characters, and the file that lists them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import settings

from gidd_jax.data.sources import run_tokenizer
from gidd_jax.data.symbols import read_characters, write_characters
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError


@pytest.fixture
def characters(tmp_path):
    file = tmp_path / "characters.txt"
    write_characters(file, ["GATTACA", "CC\nN"])
    return file


def test_ids_are_the_numbers_and_the_mask_follows_them():
    tokenizer = load_tokenizer("ids:12", ends=False)
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (13, 12)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    everything = np.arange(12)
    (ids,) = tokenizer.encode([" ".join(map(str, everything))])
    np.testing.assert_array_equal(ids, everything)
    assert tokenizer.decode(everything) == "0 1 2 3 4 5 6 7 8 9 10 11"


def test_characters_are_sorted_and_each_is_one_token(characters):
    assert characters.read_text() == "\nACGNT"
    tokenizer = load_tokenizer(f"chars:{characters}", ends=False)
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (7, 6)
    (ids,) = tokenizer.encode(["TAG\nGA"])
    np.testing.assert_array_equal(ids, [5, 1, 3, 0, 3, 1])
    assert tokenizer.decode(ids) == "TAG\nGA"
    ((_, num_bytes),) = tokenizer.encode_with_bytes(["TAG\nGA"])
    np.testing.assert_array_equal(num_bytes, np.ones(6))


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("kind", ["ids", "chars"])
def test_a_saved_copy_is_the_same_tokenizer(tmp_path, characters, kind, ends):
    name = "ids:12" if kind == "ids" else f"chars:{characters}"
    tokenizer = load_tokenizer(name, ends=ends)
    tokenizer.save(tmp_path / "saved")
    for again in (load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint
        for role in ("bos_id", "eos_id", "pad_id", "mask_id", "vocab_size"):
            assert getattr(again, role) == getattr(tokenizer, role)
    roles = {tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id}
    assert len(roles) == (3 if ends else 2)
    assert tokenizer.vocab_size == (12 if kind == "ids" else 6) + (3 if ends else 1)


def test_the_first_run_writes_the_characters_of_all_its_texts(tmp_path):
    corpus = tmp_path / "dna.txt"
    corpus.write_text("GATTACA\nTTTT\nCCXC\n")
    name = f"chars:{tmp_path / 'made' / 'dna.chars'}"
    data = settings(corpus, tokenizer=name, validation="last:1", frame="none")
    tokenizer = run_tokenizer(data)
    assert (tmp_path / "made" / "dna.chars").read_text() == "ACGTX"
    assert tokenizer.vocab_size == 6
    corpus.write_text("GATTACA\nTTTT\nUUUU\n")  # what is written stays
    with pytest.raises(InputError, match="cannot encode the text 'UUUU': it has no token 'U'"):
        run_tokenizer(data).encode(["UUUU"])


def test_texts_of_one_character_and_plans_write_no_file(tmp_path):
    corpus, file = tmp_path / "dna.txt", tmp_path / "made" / "dna.chars"
    data = settings(corpus, tokenizer=f"chars:{file}", validation="last:1", frame="none")
    corpus.write_text("AAAA\nAA\n")
    with pytest.raises(InputError, match=r"dna\.chars hold 1 different: give texts with"):
        run_tokenizer(data)
    corpus.write_text("GATTACA\nTTTT\nCCXC\n")
    planned = run_tokenizer(data, write=False)
    assert not file.parent.exists()
    written = run_tokenizer(data)
    assert (planned.vocab_size, planned.mask_id) == (written.vocab_size, written.mask_id)
    assert [found.name for found in file.parent.iterdir()] == ["dna.chars"]


def test_hosts_that_write_characters_at_once_write_files_of_their_own(tmp_path, monkeypatch):
    """Two processes of one id, on two hosts: the second writes while the first one does."""
    file, write_bytes, parts = tmp_path / "dna.chars", Path.write_bytes, []

    def both(part, content):
        parts.append(part)
        if len(parts) == 1:
            write_characters(file, ["ACGT"])
        return write_bytes(part, content)

    monkeypatch.setattr(Path, "write_bytes", both)
    write_characters(file, ["ACGT"])
    assert len(set(parts)) == 2
    assert [found.name for found in tmp_path.iterdir()] == ["dna.chars"]
    assert file.read_text() == "ACGT"


def test_what_is_no_symbol_is_named(characters):
    with pytest.raises(InputError, match="the text '3 12': it has no token '12'"):
        load_tokenizer("ids:12").encode(["0", "3 12"])
    with pytest.raises(InputError, match=r"it has no token '\['"):
        load_tokenizer(f"chars:{characters}").encode(["[MASK]"])


def test_bad_names_and_files_are_one_line_each(tmp_path):
    for name in ("ids:1", "ids:", "ids:07", "ids:nine", "ids:1048577"):
        with pytest.raises(InputError, match="VOCAB of ids:VOCAB must be an integer from 2 to"):
            load_tokenizer(name)
    file = tmp_path / "some.chars"
    for content, message in (
        (None, "no file of characters .*: training and gidd_jax.prepare_data write it"),
        (b"A", "holds 1: give at least 2"),
        (b"ABA", "holds 'A' twice"),
        (b"\xff\xfe", "cannot be read"),
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            read_characters(file)
        assert "\n" not in str(error.value)
