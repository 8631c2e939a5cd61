"""The console command: what it lists, what it starts, what it refuses."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gidd_jax import command
from gidd_jax.sampling.options import EstimatorOptions

ROOT = Path(__file__).parents[1]


def gidd_jax(*args: str, module: str = "command") -> subprocess.CompletedProcess[str]:
    """Run the command as the installed script does, or a module beside it."""
    script = f"from gidd_jax.{module} import console; console()"
    start = ["-c", script] if module == "command" else ["-m", f"gidd_jax.{module}"]
    return subprocess.run(
        [sys.executable, *start, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_installed_script_is_this_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    module, _, function = scripts["gidd-jax"].partition(":")
    assert getattr(importlib.import_module(module), function) is command.console


def test_it_knows_every_module_that_can_be_run():
    runnable = {
        file.stem
        for file in (ROOT / "gidd_jax").glob("*.py")
        if '__name__ == "__main__"' in file.read_text("utf-8")
    }
    assert len(command.COMMANDS) == len(set(command.COMMANDS))
    assert set(command.COMMANDS) == runnable - {"command"}


def test_help_lists_the_commands_with_what_they_do():
    result = gidd_jax("--help")
    assert result.returncode == 0, result.stderr
    for name in command.COMMANDS:
        doc = (ROOT / "gidd_jax" / f"{name}.py").read_text("utf-8").split('"""')[1]
        assert f"  {name} " in result.stdout
        assert f"  {doc.splitlines()[0]}\n" in result.stdout + "\n"


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_help_has_examples_that_name_the_command(name):
    result = gidd_jax(name, "--help")
    assert result.returncode == 0, result.stderr
    examples = result.stdout.partition("\nExamples:\n")[2].partition("\n\n")[0]
    assert f"  python -m gidd_jax.{name} --" in examples, result.stdout


def test_names_complete_with_the_tab_key():
    """Words of small letters; none begins another, which would then never complete alone."""
    for name in command.COMMANDS:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        assert not [other for other in command.COMMANDS if other != name and other.startswith(name)]


def test_a_command_is_the_module_of_its_name():
    here, there = gidd_jax("train", "--help"), gidd_jax("--help", module="train")
    assert here.returncode == there.returncode == 0, here.stderr
    assert here.stdout == there.stdout
    assert "--workdir: " in here.stdout


def test_flags_and_the_exit_code_are_those_of_the_module():
    result = gidd_jax("replay", "--trace=nothing.npz", "--out=page.html")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "nothing.npz" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "error: unknown command 'trian': did you mean train?\n"),
        (["self-correct"], "error: unknown command 'self-correct': did you mean self_correct?\n"),
        (["--workdir=x"], "error: unknown command '--workdir=x': use one of check, convert, "),
        ([], "error: no command given: use one of check, convert, "),
    ],
)
def test_what_is_no_command_is_one_line_and_exit_code_2(args, message):
    result = gidd_jax(*args)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_the_help_of_the_harness_names_what_a_model_takes():
    source = (ROOT / "gidd_jax" / "evaluation" / "harness_model.py").read_text("utf-8")
    (made,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    taken = [a.arg for a in [*made.args.args[1:], *made.args.kwonlyargs]]
    of_lm_eval = {"batch_size", "device", "max_batch_size"}
    text = (ROOT / "gidd_jax" / "harness.py").read_text("utf-8").partition("\n--model_args:\n")[2]
    listed = re.findall(r"^  (\w+)  ", text.partition("\n\n")[0], re.MULTILINE)
    assert set(listed) == set(taken) - of_lm_eval | {"estimator", "num_samples_t"}
    fields = {field.name for field in dataclasses.fields(EstimatorOptions)}
    assert all(name in text for name in fields)
