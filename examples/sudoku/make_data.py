"""Make grids to train on, and puzzles with one solution to solve, from other base grids.

Examples:
  python examples/sudoku/make_data.py --size=6 --out=outputs/sudoku/6
  python examples/sudoku/make_data.py --size=9 --train=1000000 --out=outputs/sudoku/9

No grid of the training is one of the puzzles' solutions, not even after relabelling, exchanging
rows, columns, bands and stacks, or transposing (see the docstring of grids.py). The same seed makes
the same files. Files of --out, for gidd_jax.train and solve.py:
  train.npz   ids uint8 [N, L]: full grids, row by row, symbols 0 to size - 1
  validation.npz   ids uint8 [M, L]: full grids, images of the puzzles' solutions
  test.npz    ids uint8 [M, L]: solutions; given bool [M, L]: their cells that the puzzle shows
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError

flags = CommandFlags()
SIZE = flags.DEFINE_integer("size", 6, "Rows of a grid: 4, 6 or 9.")
OUT = flags.DEFINE_string("out", None, "Folder to write to.", required=True)
TRAIN = flags.DEFINE_integer("train", 20_000, "Grids to train on.", lower_bound=1)
TEST = flags.DEFINE_integer("test", 128, "Puzzles at each number of givens.", lower_bound=1)
GIVENS = flags.DEFINE_list("givens", None, "Numbers of givens. Default: four or five by size.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything that is drawn.", lower_bound=0)
MOST_BASES = 20_000  # more training grids than this are further symmetric images of so many


def main(argv: list[str]) -> None:
    del argv
    import grids
    import puzzles

    size, folder = SIZE.value, Path(OUT.value or "")
    cells = grids.layout(size).cells
    levels = puzzles.LEVELS[size] if GIVENS.value is None else _levels(GIVENS.value, cells)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out={folder} is a file: name a folder")
    print(make(folder, size, TRAIN.value, TEST.value, levels, SEED.value))


def make(
    folder: Path, size: int, num_train: int, num_test: int, levels: Sequence[int], seed: int
) -> str:
    """Write train.npz and test.npz; return what they hold and where it came from."""
    import grids
    import numpy as np
    import puzzles

    form, rng = grids.layout(size), np.random.default_rng([seed, 1])
    bases, solutions = grids.split_grids(size, min(num_train, MOST_BASES), num_test, seed)
    copies = [grids.images(bases, rng) for _ in range(-(-num_train // len(bases)))]
    train = np.concatenate(copies)[:num_train].astype(np.uint8)
    test = puzzles.make_puzzles(grids.images(solutions, rng), levels, rng)
    seen, unseen = ({grids.signature(grid) for grid in part} for part in (bases, solutions))
    files = {
        "train.npz": {"ids": train},
        "validation.npz": {"ids": grids.images(solutions, rng).astype(np.uint8)},
        "test.npz": {"ids": test.ids.astype(np.uint8), "given": test.given},
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{size} x {size}, boxes of {form.box_rows} x {form.box_columns}, seed {seed}",
        f"{len(bases)} base grids to train on with {len(seen)} signatures, {len(solutions)} for "
        f"puzzles with {len(unseen)}: {len(seen & unseen)} shared",
        f"{num_test} puzzles with one solution at each of {', '.join(map(str, levels))} givens",
        *(_write(folder / name, arrays) for name, arrays in files.items()),
    ]
    return "\n".join(lines)


def _levels(words: list[str], num_cells: int) -> tuple[int, ...]:
    legal = {str(count): count for count in range(1, num_cells)}
    for word in words:
        if word not in legal:
            raise InputError(f"--givens={word}: give numbers from 1 to {num_cells - 1}, as 20,16")
    return tuple(sorted({legal[word] for word in words}, reverse=True))


def _write(path: Path, arrays: Mapping[str, Any]) -> str:
    import numpy as np

    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    os.replace(part, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"wrote {path}: {len(arrays['ids'])} rows, sha256 {digest[:16]}"


if __name__ == "__main__":
    run(main, flags)
