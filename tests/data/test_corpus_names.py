"""Names in a data path: what exists is meant, and what is not read is named."""

import os
import pickle

import pytest

from gidd_jax.data import corpus
from gidd_jax.data.corpus import list_files, named_files
from gidd_jax.data.files import open_text_file
from gidd_jax.errors import InputError
from gidd_jax.mixture import Part, split_mixture


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str) -> None:
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "w") as file:
            file.write("text\n")


def files(path: str) -> list[str]:
    return [file.as_posix() for part in split_mixture(path) for file in list_files(part.path)]


def test_what_exists_wins_over_weights_and_lists():
    write("2024:notes.txt", "notes.txt", "a,b.txt", "a", "b.txt", "c.txt", "tfds:x/d.txt")
    assert split_mixture("2024:notes.txt") == [Part(1.0, "2024:notes.txt")]
    assert files("2024:notes.txt") == ["2024:notes.txt"]
    assert files("a,b.txt") == ["a,b.txt"]
    assert files("c.txt,2024:notes.txt") == ["c.txt", "2024:notes.txt"]
    assert files("tfds:x") == ["tfds:x/d.txt"]
    assert corpus.dataset_of("tfds:x") is None
    assert corpus.dataset_of("tfds:y") == ("tfds", "y")
    os.remove("a")
    assert files("c.txt,a,b.txt") == ["c.txt", "a,b.txt"]
    assert split_mixture("0.7:a,b.txt,2:2024:notes.txt") == [
        Part(0.7, "a,b.txt"),
        Part(2.0, "2024:notes.txt"),
    ]


def test_what_exists_wins_over_globs():
    write("x[1]/a.txt", "x[1]/b.txt", "x1/c.txt", "y[ab].txt", "ya.txt")
    assert files("x[1]/") == ["x[1]/a.txt", "x[1]/b.txt"]
    assert files("x[1]/*.txt") == ["x[1]/a.txt", "x[1]/b.txt"]
    assert list(named_files("x[1]/*.txt")) == ["a.txt", "b.txt"]
    assert files("y[ab].txt") == ["y[ab].txt"]
    os.remove("y[ab].txt")
    assert files("y[ab].txt") == ["ya.txt"]
    assert files("x?/*.txt") == ["x1/c.txt"]


def test_skipped_files_are_named(caplog):
    corpus._warn_once.cache_clear()
    write("d/a.txt", "d/.hidden", "d/b.TXT", "d/c.csv", "d/e/f.md", "d/g.txt.gz")
    assert files("d") == files("d") == ["d/a.txt"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        "data path 'd': skipped 4 other files (b.TXT, c.csv, f.md, ...), not "
        ".txt, .jsonl, .jsonl.gz, .jsonl.xz, .parquet"
    )
    os.remove("d/a.txt")
    with pytest.raises(InputError, match=r"holds no .txt.*it holds 4 other files \(b.TXT, c.csv"):
        list_files("d")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("a.jsonl.zst", "unpack it first, with unzstd"),
        ("a.txt.gz", "unpack it first, with gunzip"),
        ("a.TXT", "legal suffixes: .txt, .jsonl, .jsonl.gz, .jsonl.xz, .parquet"),
    ],
)
def test_files_of_other_kinds_are_refused_with_what_to_do(name, fix):
    write(name)
    with pytest.raises(InputError) as error:
        open_text_file(list_files(name)[0], "text", "line")
    assert str(error.value) == f"{name}: unknown kind of file; {fix}"


@pytest.mark.parametrize("path", ["d/pipe.txt", "d", "d/*.txt"])
def test_a_pipe_is_refused_and_not_waited_for(path):
    write("d/a.txt")
    os.mkfifo("d/pipe.txt")
    with pytest.raises(InputError, match=r"^d/pipe.txt is a pipe or device: give a file"):
        list_files(path)


def test_a_file_that_grows_is_named(folder):
    write("a.txt")
    documents = pickle.dumps(open_text_file(folder / "a.txt", "text", "line"))
    assert pickle.loads(documents)[0] == "text"
    with open("a.txt", "a") as file:
        file.write("more\n")
    with pytest.raises(InputError, match=r"a.txt had 5 bytes when it was opened and has 10 now"):
        pickle.loads(documents)
