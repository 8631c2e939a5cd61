"""Files that commands write: possible before the work begins, and not lost by what follows."""

import errno
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fresh_command import fresh_command
from tiny_checkpoint import write_checkpoint

from gidd_jax.data.texts import read_texts
from gidd_jax.errors import InputError
from gidd_jax.evaluation import detection, tables
from gidd_jax.inference.samples import check_apart, check_output
from gidd_jax.views import marked


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs gidd and ar, and a file of samples."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("gidd", "ar"):
        write_checkpoint(folder / name, folder, name)
    (folder / "two.txt").write_text("It is\na truth\n")
    return folder


def test_a_file_can_be_written_where_its_folder_can_be_made(tmp_path):
    assert check_output(tmp_path / "a" / "b" / "o.npz", ".npz") == tmp_path / "a/b/o.npz"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "f.npz").mkdir()
    with pytest.raises(InputError, match=r"--trace=.*f.npz is a folder: name a file"):
        check_output(tmp_path / "f.npz", ".npz", "--trace")


def test_a_folder_that_takes_no_file_is_named(tmp_path, monkeypatch):
    def read_only(*, dir: Path) -> None:
        assert dir == tmp_path
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(InputError) as error:
        check_output(tmp_path / "new" / "o.npz", ".npz")
    assert str(error.value) == (
        f"--out={tmp_path}/new/o.npz: {tmp_path} cannot be written to (Read-only file system): "
        "name another folder"
    )


def test_two_flags_do_not_mean_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_apart(out=Path("a.npz"), trace=Path("b.npz"), samples=None)
    with pytest.raises(InputError, match=r"--trace=a\.npz is the file of --out: name another"):
        check_apart(out=tmp_path / "a.npz", trace=Path("a.npz"))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("sample", ["--out={here}/a.npz", "--trace={here}/a.npz"], "--trace=.* file of --out"),
        ("self_correct", ["--samples={here}/a.npz", "--out={here}/a.npz"], "file of --samples"),
        ("self_correct", ["--samples={here}/t.txt", "--out={here}/t.npz"], "t.csv is a folder"),
        ("highlight", ["--text={here}/t.html", "--out={here}/t.html"], "--out=.* file of --text"),
        ("highlight", ["--evaluate", "--out={here}/t.txt/o.json"], "t.txt is not a folder"),
        ("evaluate", ["--out={here}/t.txt/o.json"], "t.txt is not a folder"),
    ],
)
def test_outputs_are_checked_before_the_model_is_looked_for(tmp_path, name, flags, message):
    (tmp_path / "t.csv").mkdir()
    for file in ("t.txt", "t.html"):
        (tmp_path / file).write_text("text")
    given = [flag.format(here=tmp_path) for flag in flags]
    with pytest.raises(InputError, match=message):
        fresh_command(name, "--checkpoint=nowhere", *given).main([])


def broken_pipe(*_: Any, **__: Any) -> str:
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_figures_are_on_disk_before_they_are_shown(runs, tmp_path, monkeypatch):
    """As when the reader of the terminal's text goes away."""
    monkeypatch.setattr(tables, "table", broken_pipe)
    monkeypatch.setattr(detection, "table_line", broken_pipe)
    cases = [
        ("evaluate", ["--num_samples_t=1", "--bootstrap=2"]),
        ("highlight", ["--evaluate", "--corruption=0.3,0.5", "--bootstrap=2"]),
    ]
    for name, flags in cases:
        out = tmp_path / f"{name}.json"
        module = fresh_command(name, f"--checkpoint={runs}/gidd", f"--out={out}", *flags)
        with pytest.raises(BrokenPipeError):
            module.main([])
        report = json.loads(out.read_text())
        (figures,) = report["corpora" if name == "evaluate" else "figures"]
        assert figures["tokens"] > 0


def test_generative_perplexity_is_on_disk_before_it_is_shown(runs, tmp_path):
    out = tmp_path / "ppl.json"
    flags = [f"--scorer={runs}/ar", f"--samples={runs}/two.txt", f"--out={out}", "--bootstrap=2"]
    module = fresh_command("generative_ppl", *flags)
    module._shown = broken_pipe
    with pytest.raises(BrokenPipeError):
        module.main([])
    assert json.loads(out.read_text())["num_samples"] == 2


def test_texts_are_on_disk_before_they_are_shown(runs, tmp_path, monkeypatch):
    out, page = tmp_path / "o.npz", tmp_path / "o.html"
    flags = [f"--checkpoint={runs}/gidd", f"--samples={runs}/two.txt", f"--out={out}"]
    module = fresh_command("self_correct", *flags, "--num_steps=1")
    module.printable = broken_pipe
    with pytest.raises(BrokenPipeError):
        module.main([])
    assert len(read_texts(out, "--samples").texts) == 2
    assert len(out.with_suffix(".csv").read_text().splitlines()) == 3

    monkeypatch.setattr(marked, "print_marked", broken_pipe)
    flags = [f"--checkpoint={runs}/gidd", f"--text={runs}/two.txt", f"--out={page}"]
    with pytest.raises(BrokenPipeError):
        fresh_command("highlight", *flags).main([])
    assert page.read_text("utf-8").rstrip().endswith("</html>")
