"""Train, sample and judge diffusion language models: one command for all that this package does.

Examples:
  gidd-jax train --config=quickstart --workdir=outputs/quickstart
  gidd-jax sample --checkpoint=outputs/quickstart --num_samples=4
  gidd-jax train --help

`gidd-jax NAME ...` is `python -m gidd_jax.NAME ...`, with the same flags and exit codes: 0, 2 for
bad input, 1 for a run that failed, 130 for Ctrl-C.
"""

import ast
import runpy
import sys
from pathlib import Path

from gidd_jax.cli import nearest, run
from gidd_jax.errors import InputError

COMMANDS = (  # in the order in which people meet them
    "quickstart",
    "prepare_data",
    "train",
    "sweep",
    "plots",
    "evaluate",
    "sample",
    "self_correct",
    "generative_ppl",
    "frontier",
    "highlight",
    "replay",
    "convert",
    "check",
    "harness",
)


def console() -> None:
    """Run the command that the first argument names; `--help` lists them all."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        run(main, examples=listing())
    del sys.argv[1]
    # As `python -m` does it: the module is __main__, and its flags are found under its file.
    runpy.run_module(f"gidd_jax.{name}", run_name="__main__", alter_sys=True)


def main(argv: list[str]) -> None:
    """Refuse arguments that name no command."""
    if len(argv) < 2:
        raise InputError(f"no command given: {nearest('', COMMANDS)}")
    raise InputError(f"unknown command {argv[1]!r}: {nearest(argv[1], COMMANDS)}")


def listing() -> str:
    """Return the commands, each with the first line of its docstring; imports none of them."""
    width = max(map(len, COMMANDS))
    return "\n".join(["Commands:", *(f"  {n:{width}}  {_first_line(n)}" for n in COMMANDS)])


def _first_line(name: str) -> str:
    tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text("utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


if __name__ == "__main__":
    console()
