"""Puzzles: how many solutions they have, digging holes until few givens are left, and text files.

A puzzle is a row of L cells: the symbols 0 to n - 1 where they are given, FREE elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from grids import BOXES, Layout, box_of, layout, layout_of

from gidd_jax.errors import InputError

FREE = -1
# Numbers of givens that puzzles are graded by. Fewer is harder.
LEVELS = {4: (10, 8, 6, 5), 6: (24, 20, 16, 12), 9: (45, 40, 36, 32, 28)}


class Puzzles(NamedTuple):
    """Solutions int [N, L] and which of their cells are given, bool [N, L]."""

    ids: np.ndarray
    given: np.ndarray


class _Search:
    """The cells of a puzzle that are still free, and the symbols used in each unit, as bits."""

    def __init__(self, form: Layout, cells: Sequence[int]):
        self.size, self.all = form.size, (1 << form.size) - 1
        self.places = [(c // form.size, c % form.size, box_of(form, c)) for c in range(form.cells)]
        self.rows, self.columns, self.boxes = ([0] * form.size for _ in range(3))
        self.cells, self.free = list(cells), {c for c, s in enumerate(cells) if s < 0}
        self.conflict = False
        for cell, symbol in enumerate(cells):
            if symbol >= 0:
                self.conflict |= not self.candidates(cell) >> symbol & 1
                self.flip(cell, symbol)

    def candidates(self, cell: int) -> int:
        row, column, box = self.places[cell]
        return self.all & ~(self.rows[row] | self.columns[column] | self.boxes[box])

    def flip(self, cell: int, symbol: int) -> None:
        row, column, box = self.places[cell]
        self.rows[row] ^= 1 << symbol
        self.columns[column] ^= 1 << symbol
        self.boxes[box] ^= 1 << symbol

    def put(self, cell: int, symbol: int) -> None:
        self.flip(cell, symbol)
        self.cells[cell] = symbol
        self.free.remove(cell)

    def take(self, cell: int) -> None:
        self.flip(cell, self.cells[cell])
        self.cells[cell] = FREE
        self.free.add(cell)

    def solutions(self, most: int) -> list[list[int]]:
        """Return solutions, at most so many."""
        if self.conflict:
            return []
        if not self.free:
            return [list(self.cells)]
        best, left, fewest = -1, 0, self.size + 1
        for cell in self.free:
            found = self.candidates(cell)
            if (count := found.bit_count()) < fewest:
                best, left, fewest = cell, found, count
                if count < 2:
                    break
        found = []
        while left and len(found) < most:
            bit = left & -left
            left ^= bit
            self.put(best, bit.bit_length() - 1)
            found += self.solutions(most - len(found))
            self.take(best)
        return found


def solutions(cells: Sequence[int], most: int = 2) -> list[list[int]]:
    """Return the solutions of a puzzle [L], at most so many."""
    return _Search(layout_of(len(cells)), cells).solutions(most)


def dig(
    grid: Sequence[int], levels: Sequence[int], rng: np.random.Generator
) -> dict[int, np.ndarray] | None:
    """Return which cells of a grid [L] are given, bool [L], for each number of givens, or None.

    Cells are freed in random order where the solution stays the only one, so that the puzzles of a
    grid are nested. None: so few givens were not reached in this order.
    """
    form = layout_of(len(grid))
    search, found = _Search(form, grid), {}
    for cell in [*rng.permutation(form.cells).tolist(), None]:
        count = form.cells - len(search.free)
        if count in levels and count not in found:
            found[count] = np.array(search.cells) >= 0
        if cell is None or len(found) == len(set(levels)):
            break
        symbol = search.cells[cell]
        search.take(cell)
        if _another(search, cell, symbol):
            search.put(cell, symbol)
    return found if len(found) == len(set(levels)) else None


def _another(search: _Search, cell: int, symbol: int) -> bool:
    """Tell whether there is a solution with another symbol in the cell."""
    others = search.candidates(cell) & ~(1 << symbol)
    for other in range(search.size):
        if others >> other & 1:
            search.put(cell, other)
            exists = bool(search.solutions(1))
            search.take(cell)
            if exists:
                return True
    return False


def make_puzzles(
    grids: np.ndarray, levels: Sequence[int], rng: np.random.Generator, tries: int = 50
) -> Puzzles:
    """Return a puzzle of each grid [N, L] at each level, those of a level together.

    Raises InputError for a number of givens that no order of digging reaches in so many tries.
    """
    size = layout_of(grids.shape[1]).size
    dug = []
    for grid in grids.tolist():
        for _ in range(tries):
            if (found := dig(grid, levels, rng)) is not None:
                dug.append(found)
                break
        else:
            raise InputError(
                f"no puzzle of size {size} with {min(levels)} givens and one solution in {tries} "
                f"tries: use more, as {', '.join(map(str, LEVELS[size]))}"
            )
    given = np.concatenate([[one[level] for one in dug] for level in levels])
    return Puzzles(np.tile(grids, (len(levels), 1)), given)


def load_puzzles(path: str | Path) -> Puzzles:
    """Read puzzles and their solutions: .npz of make_data.py, or text, one puzzle a line.

    In text a digit from 1 on is given, `.` or 0 is free, and blank lines are skipped. Raises
    InputError that names the line of a puzzle that is none, or has no or several solutions.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"--puzzles={path}: no such file: make one with make_data.py")
    return _load_arrays(path) if path.suffix == ".npz" else _load_text(path)


def _load_arrays(path: Path) -> Puzzles:
    from gidd_jax.data.array_files import read_arrays

    found = read_arrays(path, ("ids", "given"), "file of puzzles")
    ids, given = found.get("ids"), found.get("given")
    fits = ids is not None and given is not None and ids.shape == given.shape and ids.ndim == 2
    if ids is None or given is None or not fits or given.dtype != bool or not len(ids):
        raise InputError(f"{path} holds no `ids` and `given` [N, L]: make it with make_data.py")
    form, ids = layout_of(ids.shape[1]), ids.astype(np.int64)
    for number, (row, fixed) in enumerate(zip(ids, given, strict=True), 1):
        _check(np.where(fixed, row, FREE).tolist(), form, f"{path}: puzzle {number}", row.tolist())
    return Puzzles(ids, given)


def _load_text(path: Path) -> Puzzles:
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8: give one puzzle a line") from error
    rows, ids = [], []
    for number, line in enumerate(lines, 1):
        if not (text := line.strip()):
            continue
        place = f"{path}: line {number}"
        if len(text) not in (legal := {size**2: size for size in BOXES}):
            counts = ", ".join(map(str, legal))
            raise InputError(f"{place} has {len(text)} cells: use one of {counts}")
        form = layout(legal[len(text)])
        if rows and len(rows[0]) != len(text):
            raise InputError(f"{place} has {len(text)} cells, those before it {len(rows[0])}")
        symbols = "0" + "".join(str(n) for n in range(1, form.size + 1))
        wrong = [c for c in text if c not in symbols + "."]
        if wrong:
            raise InputError(f"{place}: {wrong[0]!r} is no cell: use 1 to {form.size}, . if free")
        rows.append([FREE if c == "." else int(c) - 1 for c in text])
        ids.append(_check(rows[-1], form, place))
    if not rows:
        raise InputError(f"{path} holds no puzzle: give one a line, `.` for a free cell")
    return Puzzles(np.array(ids), np.array(rows) >= 0)


def _check(
    cells: list[int], form: Layout, place: str, solution: list[int] | None = None
) -> list[int]:
    """Return the only solution; InputError when there are none, several, or it is another one."""
    if min(cells) < FREE or max(cells) >= form.size:
        raise InputError(f"{place}: symbols must be 0 to {form.size - 1}")
    found = solutions(cells)
    if len(found) != 1:
        how_many = "several solutions: give more cells" if found else "no solution: change a given"
        raise InputError(f"{place} has {how_many}")
    if solution is not None and solution != found[0]:
        raise InputError(f"{place}: its `ids` are not its solution: make it with make_data.py")
    if FREE not in cells:
        raise InputError(f"{place} has no free cell: nothing is left to solve")
    return found[0]
