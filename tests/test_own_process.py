"""A process of one's own: from its file to training, checkpoints, and consent to run its code."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import (
    assert_same_arrays,
    environment,
    figures_by_step,
    saved_arrays,
    tiny_config,
    tiny_settings,
)

from gidd_jax.checkpoints.checkpoint import find_checkpoint
from gidd_jax.errors import InputError
from gidd_jax.evaluation import certify, grid
from gidd_jax.inference.gidd import Gidd
from gidd_jax.interchange.save import save_pretrained
from gidd_jax.own_process import Source, make, read_source
from gidd_jax.planning.plan import make_plan
from gidd_jax.planning.report import describe
from gidd_jax.training import build, loop
from gidd_jax.views import pictures

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN = {"train.num_steps": 2, "process.name": "cosine.py:CosineProcess"}
OPTIONS = {"process.options": "mask_share=0.75,t_eps=1e-3"}


@contextlib.contextmanager
def inside(folder: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with cosine.py and a run of two steps with it."""
    path = tmp_path_factory.mktemp("own")
    (path / "cosine.py").write_text((EXAMPLES / "cosine.py").read_text())
    with inside(path):
        loop.train(tiny_settings(path, **RUN, **OPTIONS), path / "run")
    return path


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def refused(function, *arguments, **keywords) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


def source(text: str, name: str = "P") -> Source:
    header = "import dataclasses\nfrom gidd_jax.process import *\nimport jax.numpy as jnp\n"
    return Source("own.py", name, header + text)


PLAIN = """
@dataclasses.dataclass(frozen=True)
class P(InterpolatingProcess):
    number: float = 0.5
    count: "int" = 3
    flag: bool = False
    word: str = "a"
    several: tuple = ()
    def alpha(self, t): return 1 - as_float(t)
    def beta_pi(self, t): return NoiseMass(as_float(t), 0 * as_float(t))
"""


def test_options_become_fields_of_their_types():
    process = make(source(PLAIN), 9, 8, "number=2,count=4,flag=true,word=1,t_eps=1e-3")
    found = [getattr(process, k) for k in ("number", "count", "flag", "word", "t_eps")]
    assert found == [2.0, 4, True, "1", 1e-3]
    assert [type(value) for value in found] == [float, int, bool, str, float]
    assert (process.vocab_size, process.mask_id) == (9, 8)
    assert make(source(PLAIN), 9, 8) == make(source(PLAIN), 9, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("nmber=1", "own.py:P: unknown option 'nmber': did you mean number?"),
        ("vocab_size=3", "unknown option 'vocab_size'"),
        ("number=x", "own.py:P: number=x: must be a number"),
        ("count=1.5", "count=1.5: must be an integer"),
        ("flag=1", "flag=1: must be true or false"),
        ("several=1", "several=1: only numbers, true or false, and strings can be options"),
        ("count=1,count=2", "the option count is there twice"),
        ("t_eps=0.7", "own.py:P: t_eps must lie in (0, 0.5): 0.7"),
    ],
)
def test_wrong_options_are_named(options, words):
    assert words in refused(make, source(PLAIN), 9, 8, options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = (", "own.py:P: SyntaxError: '(' was never closed"),
        ("1 / 0", "own.py:P: ZeroDivisionError: division by zero"),
        ("class Q: pass", "no P there: did you mean"),
        ("P = HybridProcess(9, 8, 0.1)", "is made for 9 tokens: name its class instead"),
    ],
)
def test_wrong_files_are_named(text, words):
    if words.startswith("no P"):
        words = "own.py:P: no P there"
    assert words in refused(make, source(text), 9, 8)


def test_settings_know_own_names(tmp_path):
    for name, words in {
        "cosin": "process.name = 'cosin': must be hybrid | masked | log_snr | autoregressive | FIL",
        "a.py:B\x1b": "must be hybrid",
        "a.py:": "must be hybrid",
    }.items():
        assert words in refused(tiny_settings, tmp_path, **{"process.name": name})
    assert "belong to a process of your own" in refused(
        tiny_settings, tmp_path, **{"process.options": "a=1"}
    )
    both = {"process.name": "a.py:B", "process.options": "a"}
    assert "must be KEY=VALUE" in refused(tiny_settings, tmp_path, **both)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine.py:CosineProcess", ""),
        ("cosine.py:CosineProcess", "mask_share=1"),
        ("two_log_snrs.py:TwoLogSnrs", ""),
        ("two_log_snrs.py:TwoLogSnrs", "mask_shift=1,uniform_shift=-1"),
    ],
)
def test_the_examples_are_right(name, options):
    own = read_source(f"{EXAMPLES}/{name}")
    assert own is not None
    process = make(own, 50258, 50257, options)
    with jax.disable_jit():
        checks = list(certify.formula_checks(process))
    assert [check.name for check in checks if not check.ok] == []


def test_two_log_snrs_are_masks_and_replacement_independently():
    own = read_source(f"{EXAMPLES}/two_log_snrs.py:TwoLogSnrs")
    assert own is not None
    process = make(own, 11, 10, "mask_shift=0.5,uniform_shift=2")
    t = np.array([0.1, 0.5, 0.9])
    log_snr = np.log((1 - t) / t)
    masked, replaced = (1 / (1 + np.exp(log_snr + shift)) for shift in (0.5, 2.0))
    mass = process.beta_pi(t)
    np.testing.assert_allclose(process.alpha(t), (1 - masked) * (1 - replaced), rtol=1e-6)
    np.testing.assert_allclose(mass.mask, masked, rtol=1e-6)
    np.testing.assert_allclose(mass.uniform * 10, (1 - masked) * replaced, rtol=1e-6)
    # Its masks are not absorbing: they share the noise that all tokens get between two times.
    signal, between = process.transition(t[1:], t[:-1])
    more = mass.uniform[1:] - signal * mass.uniform[:-1]
    np.testing.assert_allclose(between.uniform, more, rtol=1e-5)
    assert np.all(more > 0)


def test_a_run_with_it_is_that_of_the_same_class_built_in(here, monkeypatch):
    own = read_source("cosine.py:CosineProcess")
    assert own is not None
    process = make(own, 259, 258, OPTIONS["process.options"])
    assert (process.mask_share, process.t_eps) == (0.75, 1e-3)  # pyright: ignore
    monkeypatch.setattr(build, "build_process", lambda *_: process)
    loop.train(tiny_settings(here, **{"train.num_steps": 2}), here / "built_in")
    assert figures_by_step(here / "run") == figures_by_step(here / "built_in")
    assert_same_arrays(saved_arrays(here / "run"), saved_arrays(here / "built_in"))


def test_the_checkpoint_records_it(here):
    text = (EXAMPLES / "cosine.py").read_text()
    assert find_checkpoint("run").process() == {
        "path": "cosine.py",
        "class": "CosineProcess",
        "options": "mask_share=0.75,t_eps=1e-3",
        "text": text,
        "sha256": Source("", "", text).sha256,
    }
    assert (here / "run" / "process.py").read_text() == text
    saved = json.loads((here / "run" / "config.json").read_text())["process"]
    assert saved["name"] == "cosine.py:CosineProcess"


def test_code_runs_only_with_consent(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no cosine.py here
    words = "cosine.py:CosineProcess (sha256 "
    assert words in refused(Gidd.from_pretrained, here / "run")
    assert words in refused(pictures.run_pictures, here / "run")
    model = Gidd.from_pretrained(here / "run", allow_code=True)
    assert type(model.process).__name__ == "CosineProcess"
    assert (model.process.mask_share, model.process.t_eps) == (0.75, 1e-3)  # pyright: ignore
    assert "process" in pictures.run_pictures(here / "run", allow_code=True)
    changed = (here / "cosine.py").read_text().replace("CosineProcess", "Other")
    Path("other.py").write_text(changed)
    other = Gidd.from_pretrained(here / "run", process="other.py:Other")
    assert type(other.process).__name__ == "Other"
    assert "no such file" in refused(Gidd.from_pretrained, here / "run", process="no.py:P")
    assert "FILE.py:CLASS" in refused(Gidd.from_pretrained, here / "run", process="masked")
    out = tmp_path / "published"
    assert "CosineProcess cannot be exported" in refused(save_pretrained, model, out)
    assert not out.exists()


def command(name: str, *words: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"gidd_jax.{name}", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder),
        check=False,
    )


def test_convert_refuses_by_the_settings_alone(here):
    """No flag is asked for that would run code, and then be of no use."""
    result = command("convert", "--checkpoint=run", "--out=converted", folder=here)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: the process of {find_checkpoint('run').folder} is code of its own, "
        "cosine.py:CosineProcess, which no published format can hold: give a model whose process "
        "is built in (hybrid, masked, log_snr)\n"
    )
    result = command("convert", "--checkpoint=run", "--out=converted", "--allow_code", folder=here)
    assert "Unknown command line flag 'allow_code'" in result.stderr
    assert not (here / "converted").exists()


def test_the_sample_command_refuses_and_runs(here):
    flags = "--checkpoint=run", "--num_samples=1", "--num_steps=2"
    result = command("sample", *flags, folder=here)
    digest = find_checkpoint("run").process()["sha256"][:12]  # pyright: ignore
    where = find_checkpoint("run").folder
    assert result.returncode == 2
    assert result.stderr == (
        f"error: the process of {where} is code of its own, cosine.py:CosineProcess (sha256 "
        f"{digest}), which is not run unless you say so: pass --allow_code to run the text "
        "recorded there, or --process=FILE.py:CLASS to run that of your file (in Python and in "
        "--model_args: allow_code=True, process=FILE.py:CLASS)\n"
    )
    result = command("sample", *flags, "--allow_code", folder=here)
    assert result.returncode == 0, result.stderr


def test_a_changed_file_is_named_when_the_run_goes_on(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (folder / "cosine.py").read_text()
    Path("cosine.py").write_text(text)
    settings = tiny_settings(tmp_path, **RUN)
    loop.train(settings, "run")
    Path("cosine.py").write_text(text + "# changed\n")
    assert refused(loop.train, settings, "run").startswith(
        f"cosine.py has changed since the run in {tmp_path / 'run'} began: its sha256 is "
    )
    assert (tmp_path / "run" / "process.py").read_text() == text
    longer = tiny_settings(tmp_path, **{**RUN, "train.num_steps": 3})
    loop.train(longer, "run", allow_config_change=True)
    assert find_checkpoint("run").process()["text"].endswith("# changed\n")  # pyright: ignore


def test_plan_and_sweep_take_it(here):
    settings = tiny_settings(here, **RUN, **OPTIONS)
    assert "run: 2 steps" in describe(make_plan(settings, "here"))
    config = tiny_config(here, **RUN)
    both = type(config)({"base": config, "grid": {}})
    both.grid = {"process": {"options": ("mask_share=0.5", "mask_share=0.9")}}
    names = [one.settings.process.options for one in grid.plan_runs(both)]
    assert names == ["mask_share=0.5", "mask_share=0.9"]
    both.grid.process.options = ("mask_shape=0.5",)
    assert "did you mean mask_share?" in refused(grid.plan_runs, both)


def test_check_takes_the_flags_of_training(here):
    few = (
        "import runpy, sys; from gidd_jax.evaluation import certify as c\n"
        "c.formula_checks, c.toy_checks = lambda p: [c.masses_sum(p)], lambda p: [c.prior(p)]\n"
        "runpy.run_module('gidd_jax.check', run_name='__main__')"
    )
    for flags in (
        ["--config.process.name=cosine.py:CosineProcess", "--config.process.options=mask_share=.6"],
        ["--checkpoint=run", "--allow_code"],
    ):
        result = subprocess.run(
            [sys.executable, "-c", few, *flags],
            capture_output=True,
            text=True,
            cwd=here,
            env=environment(here),
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        share = "0.6" if "run" not in flags[0] else "0.75"
        assert f"mask_share={share})" in result.stdout


def test_the_quickstart_takes_it_to_its_last_picture(here):
    """Whoever names the file in this very command has agreed to run it: no flag is asked for."""
    config = tiny_config(here, **RUN).to_json()
    text = f"import json\nfrom ml_collections import ConfigDict\nVALUES = json.loads({config!r})\n"
    (here / "tiny.py").write_text(text + "def get_config(): return ConfigDict(VALUES)\n")
    flags = "--config=tiny.py", "--workdir=quick", "--config.train.num_steps=1"
    result = command("quickstart", *flags, folder=here)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("summary.json, samples.npz, loss.png, plots/\n")
    assert json.loads((here / "quick" / "summary.json").read_text())["steps"] == 1
    assert (here / "quick" / "plots" / "process.svg").exists()
