"""What docstrings, comments and pages call by name is there: modules, what is in them, files."""

import ast
import re
import sys
import tokenize
from pathlib import Path

import pytest
from test_docs import ROOT, TEXTS

PACKAGE = ROOT / "gidd_jax"
SOURCES = sorted(
    file
    for folder in ("gidd_jax", "configs", "benchmarks", "examples")
    for file in (ROOT / folder).rglob("*.py")
)
MODULES = {file.relative_to(ROOT).with_suffix(""): file for file in PACKAGE.rglob("*.py")}
# Names in the examples of commands and messages, and files of the PyTorch original.
PLACEHOLDERS = {
    "FILE.py",
    "configs/NAME.py",
    "my_sweep.py",
    "eval/loss.py",
    "convert_checkpoint.py",
}


def files_of(name: str) -> list[Path]:
    """The modules and rooms whose dotted name is this one or ends in it."""
    parts = tuple(name.split("."))
    return [
        file
        for path, file in MODULES.items()
        for own in [path.parts[:-1] if path.name == "__init__" else path.parts]
        if own[-len(parts) :] == parts
    ]


def defined(file: Path) -> set[str]:
    """The names that a module has."""
    names = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


def words_of(file: Path) -> str:
    """The docstrings and comments of a module."""
    texts = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    with file.open("rb") as stream:
        tokens = tokenize.tokenize(stream.readline)
        texts += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(texts)


def is_there(name: str) -> bool:
    """Whether a dotted name is a module of the package, or something in one."""
    module, _, last = name.rpartition(".")
    return bool(files_of(name)) or any(last in defined(file) for file in files_of(module))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_names_in_docstrings_and_comments_exist(file):
    words = re.sub(r"\s+", " ", words_of(file))
    wrong = [name for name in re.findall(r"\bgidd_jax(?:\.[a-z]\w*)+", words) if not is_there(name)]
    for name in re.findall(r"\bsee `([a-z]\w*(?:\.\w+)*)`", words):
        if not is_there(name) and name not in defined(file):
            wrong.append(name)
    for name in re.findall(r"`([a-z]\w*(?:\.[A-Za-z_]\w*)+)`", words):
        first, last = name.split(".")[0], name.split(".")[-1]
        known = first in ("jax", "jnp", *sys.stdlib_module_names) or last in ("py", "jsonl")
        if not known and not is_there(name):
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("file", [*SOURCES, *TEXTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_python_files_that_are_named_exist(file):
    """By a path that ends like that; in pages, also what the page writes itself."""
    is_page = file.suffix == ".md"
    words = file.read_text("utf-8") if is_page else words_of(file)
    there = {path.as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for name in re.findall(r"(?<![\w/.*{}<>$-])((?:[\w-]+/)*[\w-]+\.py)\b", words):
        elsewhere = name.startswith(("gidd/", "runs/", "tests/FILE"))
        made = is_page and (f"> {name}" in words or elsewhere)
        if name in PLACEHOLDERS or made or "NAME" in name:
            continue
        assert any(f"/{path}".endswith(f"/{name}") for path in there), name
