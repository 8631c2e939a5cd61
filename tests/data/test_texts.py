"""Texts that commands are given: read alike everywhere, packed without loss, UTF-8 or refused."""

import os

import numpy as np
import pytest

from gidd_jax.data.array_files import pack_texts, unpack_texts
from gidd_jax.data.corpus import open_corpus
from gidd_jax.data.files import open_text_file
from gidd_jax.data.texts import check_texts, read_text, read_texts
from gidd_jax.errors import InputError


def corpus_texts(path, txt_documents: str) -> list[str]:
    splits = open_corpus(str(path), "last:1", "text", txt_documents)
    return [part[i] for part in (splits.train, splits.validation) for i in range(len(part))]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("a\u2028b\x85c\x0cd\ne\n", ["a\u2028b\x85c\x0cd", "e"]),
        ("\ufeffone\ntwo\n", ["one", "two"]),
        ("one\r\n\r\n two \r\n", ["one", " two "]),
        ("one\rtwo\r", ["one", "two"]),
        ("one\x00\n\x00two", ["one\x00", "\x00two"]),
    ],
)
def test_lines_are_those_of_a_corpus(tmp_path, content, lines):
    file = tmp_path / "a.txt"
    file.write_bytes(content.encode())
    assert read_texts(file, "--samples").texts == lines
    assert corpus_texts(file, "line") == lines


@pytest.mark.parametrize("content", ["\ufeffa\r\n\r\nb\u2028\r\n", "    a\x00\n"])
def test_a_whole_text_is_that_of_a_corpus(tmp_path, content):
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_bytes(content.encode())
        assert read_text(tmp_path / name, "--text") == content.removeprefix("\ufeff")
    documents = open_text_file(tmp_path / "a.txt", "text", "file")
    assert [documents[i] for i in range(len(documents))] == [content.removeprefix("\ufeff")]


def test_indentation_stays(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n  a\n\n    def f():\n        pass\n \n\n\x0c\n\tb\n\n   \n")
    found = open_text_file(file, "text", "blank_line")
    assert [found[i] for i in range(len(found))] == ["  a", "    def f():\n        pass", "\tb"]


@pytest.mark.parametrize(
    ("name", "txt_documents", "content"),
    [
        ("a.txt", "blank_line", b"one\r\rtwo\r"),
        ("a.txt", "file", b"one\rtwo"),
        ("a.jsonl", "line", b'{"text": "a"}\r{"text": "b"}\r'),
    ],
)
def test_cr_alone_is_named(tmp_path, name, txt_documents, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"ends its lines with CR alone.*tr '\\r' '\\n'"):
        open_text_file(tmp_path / name, "text", txt_documents)


@pytest.mark.parametrize("reader", [read_text, read_texts])
def test_what_is_no_text_is_one_line_that_names_flag_and_file(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "blank.txt").write_text("\ufeff \n\n")
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9")
    (tmp_path / "folder.txt").mkdir()
    cases = {
        "none.txt": "no such file: {file}",
        "pipe.txt": "{file} is a pipe or device: give a file, written to the end",
        "folder.txt": "{file} is a folder: give a file, written to the end",
        "blank.txt": "{file} holds no text",
        "latin.txt": "{file}: byte 3 is not UTF-8; convert it",
    }
    for name, message in cases.items():
        with pytest.raises(InputError) as error:
            reader(tmp_path / name, "--flag")
        assert str(error.value) == "--flag: " + message.format(file=tmp_path / name)


def test_packed_texts_come_back_equal_at_their_own_size(tmp_path):
    texts = ["a\x00", "", "\x00\x00", "é\ud7ff\U0001f600\n", "b" * 10**6, *["c"] * 10**4]
    arrays = pack_texts("texts", texts)
    assert sum(array.nbytes for array in arrays.values()) < 1.1e6 + 8 * len(texts)
    np.savez(tmp_path / "a.npz", allow_pickle=False, **arrays)
    assert read_texts(tmp_path / "a.npz", "--samples").texts == texts
    assert unpack_texts(pack_texts("x", []), "x") == []


@pytest.mark.parametrize(
    "arrays",
    [
        {"texts": np.zeros(3, np.uint8)},
        {"texts": np.zeros(3, np.uint8), "texts_ends": np.array([1, 4])},
        {"texts": np.zeros(3, np.uint8), "texts_ends": np.array([-1, 3])},
        {"texts": np.zeros(3, np.uint8), "texts_ends": np.array([2, 1, 3])},
        {"texts": np.zeros(3, np.uint8), "texts_ends": np.array([1.0, 3.0])},
        {"texts": np.full(3, 0xFF, np.uint8), "texts_ends": np.array([3])},
        {"texts": np.zeros((1, 3), np.uint8), "texts_ends": np.array([3])},
    ],
)
def test_damaged_packed_texts_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match="holds no texts"):
        read_texts(tmp_path / "a.npz", "--samples")


def test_what_has_no_utf8_is_named():
    check_texts(["é", "", [1, 2], "\U0001f600"], "prompt")
    with pytest.raises(InputError) as error:
        check_texts(["a", "é\ud800"], "prompt")
    assert str(error.value) == (
        "prompt 2 is no UTF-8 text: half of a surrogate pair 0xd800 at character 2"
    )
    with pytest.raises(InputError, match=r"^text 1 is no UTF-8 text: byte 0xff at character 1$"):
        check_texts([os.fsdecode(b"\xff")], "text")
