"""The code that a checkpoint records: whose text counts, and that nobody runs it unasked."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_own_process import EXAMPLES, OPTIONS, RUN, command, inside, refused
from tiny_run import tiny_settings

from gidd_jax.checkpoints.checkpoint import find_checkpoint
from gidd_jax.checkpoints.checksums import json_checksum
from gidd_jax.checkpoints.workdir import check_workdir, recorded_process, run_source
from gidd_jax.evaluation import subjects
from gidd_jax.inference.gidd import Gidd
from gidd_jax.own_process import read_source
from gidd_jax.training import loop
from gidd_jax.views import pictures

COMMANDS = {
    "sample": ["--checkpoint=run"],
    "self_correct": ["--checkpoint=run", "--samples=texts.txt", "--out=corrected.npz"],
    "highlight": ["--checkpoint=run", "--text=texts.txt", "--out=page.html"],
    "evaluate": ["--checkpoint=run"],
    "plots": ["--workdir=run"],
    "check": ["--checkpoint=run"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with cosine.py, which leaves the file `ran` where it runs, and a run with it."""
    folder = tmp_path_factory.mktemp("code")
    mark = f"\nopen({str(folder / 'ran')!r}, 'a').close()\n"
    (folder / "cosine.py").write_text((EXAMPLES / "cosine.py").read_text() + mark)
    (folder / "texts.txt").write_text("a truth universally acknowledged\n")
    with inside(folder):
        loop.train(tiny_settings(folder, **RUN, **OPTIONS), folder / "run")
    assert (folder / "ran").exists()
    (folder / "ran").unlink()
    return folder


@pytest.fixture
def copy(trained, tmp_path, monkeypatch):
    """The folder without what ran, to spoil."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_it_unasked(trained, name):
    result = command(name, *COMMANDS[name], folder=trained)
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: the process of "), result.stderr
    assert "cosine.py:CosineProcess (sha256 " in line
    assert not (trained / "ran").exists()
    flags = importlib.import_module(f"gidd_jax.{name}").flags.values
    for flag in ("allow_code", "process"):
        assert f"--{flag}" in line
        assert flag in flags


def test_convert_refuses_by_the_settings(trained):
    """No published format holds such a process: neither flag would help, and none is offered."""
    result = command("convert", "--checkpoint=run", "--out=published", folder=trained)
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert "cosine.py:CosineProcess, which no published format can hold" in line
    assert "--" not in line
    assert not (trained / "ran").exists()
    assert not (trained / "published").exists()


def test_a_scorer_is_judged_by_its_settings(trained):
    flags = "--samples=texts.txt", "--scorer=run"
    result = command("generative_ppl", *flags, folder=trained)
    assert result.returncode == 2
    assert result.stderr.strip().endswith(
        "is a diffusion model: give an autoregressive one, it has an exact likelihood"
    )
    assert not (trained / "ran").exists()


def test_the_harness_names_what_it_takes(trained):
    pytest.importorskip("lm_eval")
    from gidd_jax.evaluation.harness_model import HarnessModel

    words = refused(HarnessModel, str(trained / "run"))
    assert "in --model_args: allow_code=True, process=FILE.py:CLASS" in words
    assert not (trained / "ran").exists()


def settings_of(folder, name="cosine.py:CosineProcess"):
    return tiny_settings(folder, **{**RUN, **OPTIONS, "process.name": name})


def test_another_spelling_of_its_path_is_no_change(copy, trained):
    (copy / "elsewhere").mkdir()
    shutil.copy("cosine.py", "elsewhere/moved.py")
    (copy / "link.py").symlink_to("cosine.py")
    for path in (copy / "cosine.py", "./cosine.py", "elsewhere/moved.py", "link.py"):
        settings = settings_of(trained, f"{path}:CosineProcess")
        check_workdir("run", settings, read_source(settings.process.name))


def test_a_changed_text_is_named_with_both_hashes(copy, trained):
    recorded = recorded_process("run")
    assert recorded is not None
    Path("moved.py").write_text(recorded.text + "# changed\n")
    settings = settings_of(trained, "moved.py:CosineProcess")
    own = read_source(settings.process.name)
    assert own is not None
    began = (
        f"moved.py has changed since the run in {copy / 'run'} began: its sha256 is "
        f"{own.sha256[:12]}, that of cosine.py was {recorded.sha256[:12]}"
    )
    fix = ": put that text back, use another workdir, or --allow_config_change"
    kept = f" ({copy / 'run' / 'process.py'} is a copy)"
    assert refused(check_workdir, "run", settings, own) == began + kept + fix
    Path("run/process.py").unlink()  # the checkpoint knows it still
    assert refused(check_workdir, "run", settings, own) == began + fix


def test_a_run_whose_file_is_gone_goes_on_with_what_is_recorded(copy, trained, caplog):
    text = Path("cosine.py").read_text()
    Path("cosine.py").unlink()
    Path("run/process.py").unlink()
    settings = settings_of(trained)
    words = refused(run_source, "run", settings.process)
    assert words.startswith("cosine.py:CosineProcess: no such file: cosine.py; its text (sha256 ")
    assert "pass --allow_code to gidd_jax.train" in words
    own = run_source("run", settings.process, allow_code=True)
    assert own is not None
    assert (own.name, own.text) == ("cosine.py:CosineProcess", text)
    assert "cosine.py is gone: continuing with the text recorded in run" in caplog.text
    check_workdir("run", settings, own)
    assert "no such file: other.py" in refused(
        run_source, "none", settings_of(trained, "other.py:P").process
    )


def rewrite(folder, changes):
    """Change the record and make its checksum fit, as who wants to deceive would."""
    process, sums = folder / "process" / "metadata", folder / "checksums" / "metadata"
    record = json.loads(process.read_text()) | changes
    record = {key: value for key, value in record.items() if value is not None}
    process.write_text(json.dumps(record))
    known = json.loads(sums.read_text())
    known["process"] = json_checksum(record)
    sums.write_text(json.dumps(known))


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "raise SystemExit(0)"},
        {"sha256": 64 * "0"},
        {"class": None},
        {"class": "Other"},
        {"options": "mask_share=="},
        {"path": "/elsewhere/cosine.py"},
        {"text": "\ud800"},
    ],
    ids=str,
)
def test_a_record_that_was_tampered_with_is_not_run(copy, trained, changes):
    rewrite(find_checkpoint("run").folder, changes)
    for use in (Gidd.from_pretrained, subjects.find_subject, pictures.run_pictures):
        arguments = (None, "run") if use is subjects.find_subject else (copy / "run",)
        words = refused(use, *arguments, allow_code=True)
        assert words.startswith("the record of the process in ")
        assert "\n" not in words
        assert "--process=FILE.py:CLASS" in words
    assert not (trained / "ran").exists()
    # What the message says helps.
    model = Gidd.from_pretrained("run", process="cosine.py:CosineProcess")
    assert model.process is not None
    np.testing.assert_allclose(model.process.alpha(np.array(0.5)), 0.5, rtol=1e-6)
    (trained / "ran").unlink(missing_ok=True)
    for name in [name for name in sys.modules if name.startswith("gidd_jax_own_process_")]:
        del sys.modules[name]  # so that the next one would run it again


def test_pictures_need_no_copy_in_the_workdir(copy):
    Path("run/process.py").unlink()
    assert "process" in pictures.run_pictures(Path("run"), allow_code=True)
    Path("run/process.py").write_text("raise SystemExit(0)")  # not what is recorded
    assert "process" in pictures.run_pictures(Path("run"), process="cosine.py:CosineProcess")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cosine.py:CosineProcess", "two_log_snrs.py:TwoLogSnrs"])
def test_the_examples_pass_the_whole_check(name, tmp_path):
    result = command("check", f"--process={EXAMPLES}/{name}", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all 12 checks passed\n")
