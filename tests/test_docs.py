"""The documentation: its code runs, its links lead somewhere, what it names is there."""

import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from test_layers_of_code import FLOORS

from gidd_jax import __version__
from gidd_jax.cli import load_config

ROOT = Path(__file__).parents[1]
DOCS, NOTEBOOK = ROOT / "docs", ROOT / "notebooks" / "gidd_jax.ipynb"
GENERATED = {DOCS / "commands.md"}  # by docs/write_commands.py, before each build
PAGES = sorted(set(DOCS.glob("*.md")) - GENERATED)
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REASON = re.compile(r"<!-- not executed: (.*?) -->\n\Z")
# Stands in for IPython, which notebooks have: the page that is shown goes to a file.
DISPLAY = """
import sys, types
module = types.ModuleType("IPython.display")
module.HTML = str
module.display = lambda page: open("shown.html", "w").write(page)
sys.modules["IPython"], sys.modules["IPython.display"] = types.ModuleType("IPython"), module
"""


class Block(NamedTuple):
    """A fenced block of a page; reason: why it is not executed."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """The bash and python blocks of a page."""
    text, found = page.read_text("utf-8"), []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        reason = REASON.search(before)
        block = Block(page.name, before.count("\n") + 1, *match.groups(), reason and reason[1])
        if block.language in ("bash", "python"):
            found.append(block)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """`python` is the interpreter of the tests; no network; programs are compiled once, quickly."""
    folder = tmp_path_factory.mktemp("documentation")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def execute(block: Block, folder: Path, environment: dict[str, str]) -> str:
    """Run a block in a folder and return what it printed; fails where it fails."""
    shell = ["bash", "-euo", "pipefail", "-c", block.code]
    command = shell if block.language == "bash" else [sys.executable, "-c", block.code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{block.page}:{block.line}\n{block.code}\n{done.stderr}"
    return done.stdout


def execute_page(page: Path, folder: Path, environment: dict[str, str]) -> list[str]:
    """Run all blocks of a page but those that say why not."""
    return [execute(b, folder, environment) for b in blocks(page) if b.reason is None]


@pytest.mark.slow
def test_the_tutorial_and_the_readme_run(tmp_path, environment):
    """The README's model is that of the tutorial."""
    printed = execute_page(DOCS / "tutorial.md", tmp_path, environment)
    assert len(printed) == 11
    assert "validation: loss " in printed[2]
    assert "network calls" in printed[3]
    assert printed[4].rstrip("\n") in printed[3]  # the text that is read back
    assert (tmp_path / "replay.html").is_file()
    assert (tmp_path / "essay.html").is_file()
    assert json.loads((tmp_path / "evaluation.json").read_text())["corpora"][0]["nelbo"] > 0
    assert (tmp_path / "published" / "model.safetensors").is_file()
    (tmp_path / "runs" / "small").symlink_to(tmp_path / "runs" / "tiny")
    python = [b for b in blocks(ROOT / "README.md") if b.language == "python" and not b.reason]
    assert len(python) >= 2
    for block in python:
        execute(block, tmp_path, environment)


@pytest.mark.slow
def test_the_page_on_own_processes_runs(tmp_path, environment):
    printed = execute_page(DOCS / "own-process.md", tmp_path, environment)
    assert re.search(r"all \d+ checks passed", printed[1])


@pytest.mark.slow
def test_the_page_on_own_symbols_runs(tmp_path, environment):
    _, filled, sampled = execute_page(DOCS / "your-own-symbols.md", tmp_path, environment)
    assert re.match(r"\[\[0 1 2 \d\]\n \[1 \d \d \d\]", filled)
    assert re.search(r"^[ACGT]{48}$", sampled, re.MULTILINE)


def test_the_costs_are_what_the_code_beside_them_prints(tmp_path, environment):
    text = (DOCS / "scaling.md").read_text("utf-8")
    shown = [code for _, code in FENCE.findall(text) if "device-hours\n" in code]
    assert execute_page(DOCS / "scaling.md", tmp_path, environment) == shown


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, environment):
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    install, *rest = code
    assert install["metadata"]["tags"] == ["install"]
    source = "\n".join("".join(cell["source"]) for cell in rest)
    block = Block(NOTEBOOK.name, 0, "python", DISPLAY + source, None)
    assert "bits per byte" in execute(block, tmp_path, environment)
    shown = (tmp_path / "shown.html").read_text("utf-8")
    assert shown.startswith("<iframe srcdoc=")
    assert "&lt;script&gt;" in shown


def test_blocks_say_why_they_are_not_executed():
    """On the pages that are executed; each reason says something."""
    reasons = [
        block.reason
        for name in ("tutorial.md", "own-process.md", "scaling.md")
        for block in blocks(DOCS / name)
        if block.reason is not None
    ]
    assert reasons
    assert all(len(reason.split()) >= 2 for reason in reasons)
    marks = sum(page.read_text("utf-8").count("<!-- not executed") for page in PAGES)
    assert marks == sum(block.reason is not None for page in PAGES for block in blocks(page))


def slug(heading: str) -> str:
    """The anchor of a heading, as the generator and code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() or file in GENERATED, f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


def code_spans(page: Path) -> Iterator[str]:
    """Code in the text of a page; of the page on the original's keys only the right-hand side."""
    for line in FENCE.sub("", page.read_text("utf-8")).splitlines():
        if page.name == "migration.md" and line.startswith("|"):
            line = line.split("|", 2)[2]
        yield from re.findall(r"`([^`]+)`", line)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_files_and_modules_that_are_named_exist(page):
    folders = "|".join(("configs", "gidd_jax", "launch", "tests", "benchmarks", "docs"))
    for span in code_spans(page):
        if re.fullmatch(rf"({folders})/[\w./-]*", span) and not re.search("FILE|NAME", span):
            assert (ROOT / span).exists() or ROOT / span in GENERATED, f"{page.name}: {span}"
    for name in re.findall(r"\bgidd_jax\.([a-z_]+)\b", page.read_text("utf-8")):
        package = ROOT / "gidd_jax"
        found = (package / f"{name}.py").is_file() or (package / name).is_dir()
        assert found or name in ("git", "ipynb"), f"{page.name}: gidd_jax.{name}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_config_keys_that_are_named_exist(page):
    config = load_config("base")
    legal = {f"{s}.{k}" for s, keys in config.items() if s != "seed" for k in keys}
    legal.add("grid.seed")  # of a sweep
    text = page.read_text("utf-8")
    named = re.findall(r"--config\.([a-z_]+\.\w+)=", text)
    sections = "|".join(section for section in config if section != "seed")
    for span in code_spans(page):
        match = re.fullmatch(rf"(({sections})\.\w+)(=.*)?", span)
        named += [match[1]] if match and not re.search(r"\.(py|pt)$", span) else []
    for key in named:
        assert key in legal, f"{page.name}: {key}"


@functools.cache
def write_commands() -> types.ModuleType:
    """The script that makes the page of commands."""
    spec = importlib.util.spec_from_file_location("write_commands", DOCS / "write_commands.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@functools.cache
def flags_of(command: str) -> set[str]:
    return set(re.findall(r"^ +--(\w+):", write_commands().help_text(command), re.MULTILINE))


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_flags_that_are_shown_exist(page):
    """Of every `python -m gidd_jax.NAME --flag ...` in blocks and in the text."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    for name, arguments in re.findall(r"python -m gidd_jax\.(\w+)([^\n`]*)", text):
        if name in ("NAME", "harness"):  # the harness's flags are not ours
            continue
        assert name in write_commands().commands(), f"{page.name}: no command gidd_jax.{name}"
        given = set(re.findall(r"--(\w+)", re.sub(r"--config\.\S+", "", arguments)))
        unknown = given - flags_of(name) - {"help"}
        assert not unknown, f"{page.name}: gidd_jax.{name}: {unknown}"


def test_the_page_of_commands_is_what_help_prints():
    script = write_commands()
    entries = [
        file.stem
        for file in (ROOT / "gidd_jax").glob("*.py")
        if '__name__ == "__main__"' in file.read_text("utf-8")
    ]
    assert sorted(script.commands()) == sorted(entries)
    assert "train" in entries
    page = script.page(["replay"])
    assert "## gidd_jax.replay\n" in page
    assert "--trace: File of a trace" in page


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    listed = {DOCS / file for entry in config["nav"] for file in entry.values()}
    assert listed == {*PAGES, *GENERATED}


def test_the_reference_names_what_exists():
    names = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text("utf-8"), re.MULTILINE)
    assert len(names) > 20
    for name in names:
        parts = name.split(".")
        if parts[-1][0].isupper():
            assert hasattr(importlib.import_module(".".join(parts[:-1])), parts[-1]), name
        else:
            importlib.import_module(name)


def test_the_reference_has_a_place_for_every_module():
    """Each file is in the table of its room, and each table names what is there."""
    text = (DOCS / "reference.md").read_text("utf-8")
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    package = ROOT / "gidd_jax"
    commands = set(write_commands().commands())
    rooms = {face.parent.name: face.parent for face in package.glob("*/__init__.py")}
    titles = {name: [name.capitalize()] for name in rooms}
    titles["the root"] = ["The ground", "The heart: process, loss and bound"]
    for room, headings in titles.items():
        listed = re.findall(
            r"^\| `(\w+)\.py` \|", "".join(sections[h] for h in headings), re.MULTILINE
        )
        there = {file.stem for file in rooms.get(room, package).glob("*.py")} - {"__init__"}
        assert sorted(listed) == sorted(there - commands if room == "the root" else there), room


def test_the_readme_shows_every_room_and_a_path_that_is_short_enough():
    text = (ROOT / "README.md").read_text("utf-8")
    plan = text[text.index("## Where things are") : text.index("## Train")]
    rows = re.findall(r"^\| `(\w+)/` \| .* \| `(\w+\.py)` \|$", plan, re.MULTILINE)
    assert {room for room, _ in rows} == {
        face.parent.name for face in (ROOT / "gidd_jax").glob("*/__init__.py")
    }
    for room, start in rows:
        assert (ROOT / "gidd_jax" / room / start).is_file(), f"{room}/{start}"
    path = re.findall(r"`(gidd_jax/[\w/]+\.py)`", plan)
    lines = [len((ROOT / file).read_text("utf-8").splitlines()) for file in path]
    assert len(path) == 9
    assert sum(lines) < 2500
    stated = re.search(r"some ([\d,]+) lines", plan)
    assert stated is not None
    assert abs(sum(lines) - int(stated[1].replace(",", ""))) <= 150


def test_contributing_shows_the_floors_and_names_what_is_there():
    """The table of floors is that of the test of layers; recipes name modules as in a room."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    shown = {int(number): set(re.findall(r"`(\w+)(?:/|\.py)`", names)) for number, names in rows}
    commands = shown.pop(len(FLOORS) + 1)
    assert shown == dict(enumerate(FLOORS, start=1))
    assert commands <= set(write_commands().commands())
    recipes = text[text.index("## Recipes") : text.index("## What a change needs")]
    named = {name for name in re.findall(r"`([\w./]+\.\w+)`", recipes) if "NAME" not in name}
    files = {
        name for name in named if (ROOT / name).exists() or (ROOT / "gidd_jax" / name).exists()
    }
    assert {name for name in named - files if re.search(r"/|\.(py|md|toml)$", name)} == set()
    assert len(files) >= 20


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## {__version__}" in changelog
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text("utf-8")
