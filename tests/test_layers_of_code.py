"""The layers of the code base: each module imports only from its own layer and those below it."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gidd_jax"
# The plan of the house, from the ground. A room is a folder; the modules of the root are named one
# by one, but for the commands, which are what can be run: they stand on the top floor.
FLOORS = (
    {
        "errors",
        "compiled",
        "cli",
        "model_flags",
        "sections",
        "together",
        "settings",
        "mixture",
        "draws",
        "hardware",
    },
    {"interpolation", "process", "own_process", "loss", "likelihood", "models", "ops", "parallel"},
    {"data"},
    {"sampling", "checkpoints"},
    {"training"},
    {"interchange", "planning"},
    {"inference"},
    {"evaluation"},
    {"views"},
)
TESTS = Path(__file__).parent
BESIDE = sorted(
    file
    for folder in (TESTS, PACKAGE.parent / "benchmarks", PACKAGE.parent / "examples")
    for file in folder.rglob("*.py")
)
# Tests that go through several modules of their room, by what they ask.
OF_WHOLE_ROOMS = {
    "checkpoints/before_rooms",
    "checkpoints/remote",
    "inference/log_likelihood",
    "inference/sudoku",
    "sampling/reference_generate",
    "training/blocks",
    "training/scaling_trace",
}
ROOMS = sorted(f.parent.name for f in PACKAGE.glob("*/__init__.py"))
TOP = len(FLOORS)
HEAVY = {
    "jax",
    "flax",
    "optax",
    "orbax",
    "grain",
    "transformers",
    "tokenizers",
    "tensorflow_datasets",
    "matplotlib",
    "pyarrow",
    "clu",
}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# No modules: files that go with exported models, for programs that do not have this package.
CARRIED = "interchange/torch_code"
FILES = {
    module_name(file): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if CARRIED not in file.as_posix()
}
TREES = {name: ast.parse(file.read_text("utf-8")) for name, file in FILES.items()}
ENTRIES = [name for name in FILES if '__name__ == "__main__"' in FILES[name].read_text("utf-8")]


def floor(module: str) -> int:
    """The floor of a module; fails when the plan does not say which."""
    if module == "gidd_jax" or module in ENTRIES:
        return TOP
    part = module.split(".")[1]
    found = [number for number, members in enumerate(FLOORS) if part in members]
    assert found, f"gidd_jax/{part} has no floor: give it a room, or a place in FLOORS"
    return found[0]


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, those in functions too, but not what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


def imports(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for node in runtime_nodes(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import: {ast.unparse(node)}"
            assert node.module is not None
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= inside or {node.module}
    return {name for name in found if name.split(".")[0] == "gidd_jax"}


def test_the_modules_of_the_plan_are_there():
    assert len(FILES) >= 25  # else the tests below look at the wrong folder
    assert {
        f"gidd_jax.{name}" for name in ("process", "loss", "training.loop", "sampling.steps")
    } <= FILES.keys()
    assert {"gidd_jax.train", "gidd_jax.sample", "gidd_jax.quickstart"} <= set(ENTRIES)
    assert imports("gidd_jax.training.loop") >= {
        "gidd_jax.training.step",
        "gidd_jax.parallel.sharding",
    }


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    for imported in imports(module):
        assert floor(imported) <= floor(module), f"{module} imports {imported}, which is above it"
        assert imported not in ENTRIES, f"{module} imports the command {imported}"


def test_no_circles():
    graph = {name: imports(name) - {"gidd_jax"} for name in FILES if name != "gidd_jax"}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)


@pytest.mark.parametrize("module", FILES)
def test_modules_have_a_concern_and_fit_in_a_head(module):
    assert not {"utils", "util", "helpers", "common", "misc"} & set(module.split("."))
    assert not re.search(r"_v\d+$", module)
    most = 200 if module in ENTRIES else 400
    assert len(FILES[module].read_text("utf-8").splitlines()) <= most
    assert ast.get_docstring(TREES[module]), f"{module}: no docstring"


def test_the_root_holds_the_heart_and_the_commands():
    root = {name.split(".")[1] for name in FILES if name.count(".") == 1} - set(ROOMS)
    assert len(root) <= 32
    assert set(ROOMS) == set().union(*FLOORS) - root
    assert set().union(*FLOORS) <= root | set(ROOMS), "a floor names what is not there"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_a_face_and_nothing_behind_it(room):
    tree = TREES[f"gidd_jax.{room}"]
    face = ast.get_docstring(tree) or ""
    assert len(tree.body) == 1, "a room's __init__.py is its docstring alone: it re-exports nothing"
    named = re.findall(r"`([\w/]+\.py)`", face)
    assert named, "the face says where to start reading"
    for file in named:
        assert (PACKAGE / room / file).is_file() or (PACKAGE / file).is_file(), file


@pytest.mark.parametrize("room", ROOMS)
def test_tests_mirror_the_rooms(room):
    """A file of tests is named after a module of its room, or after that and what it asks of it."""
    files = sorted((TESTS / room).glob("test_*.py"))
    assert files, f"tests/{room}: a room has a folder of tests"
    modules = {name.split(".")[2] for name in FILES if name.startswith(f"gidd_jax.{room}.")}
    for file in files:
        subject = file.stem.removeprefix("test_")
        of_module = any(subject == name or subject.startswith(f"{name}_") for name in modules)
        is_of_room = f"{room}/{subject}" in OF_WHOLE_ROOMS
        assert of_module != is_of_room, f"{file}: name it after one of {sorted(modules)}"
        assert is_of_room or f"gidd_jax.{room}" in file.read_text("utf-8"), f"{file}: not of {room}"


def test_folders_of_tests_are_rooms():
    assert {f.parent.name for f in TESTS.glob("*/test_*.py")} == set(ROOMS)
    for name in OF_WHOLE_ROOMS:
        assert (TESTS / name.replace("/", "/test_")).with_suffix(".py").is_file(), name


@pytest.mark.parametrize("file", BESIDE, ids=lambda file: str(file.relative_to(PACKAGE.parent)))
def test_tests_and_benchmarks_ask_one_question_a_file(file):
    assert len(file.read_text("utf-8").splitlines()) <= 450


@pytest.mark.parametrize("module", FILES)
def test_defaults_live_in_the_base_config_alone(module):
    """A `config.get(key, default)` would keep a second default, and swallow a misspelt key."""
    for node in runtime_nodes(TREES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            is_config = re.search(r"(config|settings)(\.\w+)*$", owner)
            assert not (node.func.attr == "get" and is_config), ast.unparse(node)


@pytest.mark.parametrize("module", [name for name in FILES if floor(name) != TOP])
def test_only_entries_see_the_command_line_or_print(module):
    door = "cli", "model_flags", "parallel.distributed", "settings"
    if module in [f"gidd_jax.{name}" for name in door]:
        return
    for node in runtime_nodes(TREES[module]):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("print", "sys.exit"), ast.unparse(node)
        names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        assert not names & {"ConfigDict", "flags", "config_flags"}, ast.unparse(node)


def loaded_modules(script: str) -> set[str]:
    """Top-level names in sys.modules after `script` in a new interpreter."""
    report = (
        "import atexit, json, sys\natexit.register(lambda: print(json.dumps([*sys.modules])))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", report + script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return {name.split(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_modules("import gidd_jax") & HEAVY


@pytest.mark.parametrize("module", ENTRIES)
def test_help_loads_nothing_heavy(module):
    run = f"runpy.run_module('{module}', run_name='__main__')"
    loaded = loaded_modules(f"import runpy\nsys.argv = ['x', '--help']\n{run}")
    assert "absl" in loaded
    assert not loaded & HEAVY
