"""Write docs/commands.md: the --help of every command. `make docs` runs it before each build.

python docs/write_commands.py --out=docs/commands.md
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """# Commands

Every command is a module: `python -m gidd_jax.NAME --help`. This page is what `--help` prints.
"""


def commands() -> list[str]:
    """Return the names of the modules that can be run."""
    files = sorted((ROOT / "gidd_jax").glob("*.py"))
    return [file.stem for file in files if '__name__ == "__main__"' in file.read_text("utf-8")]


def help_text(name: str) -> str:
    """Return what the command prints for --help; raises CalledProcessError when it fails."""
    run = [sys.executable, "-m", f"gidd_jax.{name}", "--help"]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def page(names: Iterable[str]) -> str:
    """Return the page: a heading and the help of each command."""
    parts = [f"## gidd_jax.{name}\n\n```text\n{help_text(name)}\n```\n" for name in names]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.parse_args().out.write_text(page(commands()), encoding="utf-8")
