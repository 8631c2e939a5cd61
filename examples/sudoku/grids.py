"""Full grids: which are valid, how to draw them, and which are the same up to symmetry.

A grid of size n has the symbols 0 to n - 1, each once in every row, column and box, and is held row
by row as n * n integers. Its class is what relabelling, exchanging bands, stacks, rows of a band
and columns of a stack, and, where boxes are square, transposing make of it: 2 classes of size 4, 49
of size 6, 5,472,730,538 of size 9.

Train and test split by class. For sizes 4 and 6 `canonical` names the class. For size 9 that would
be slow, and is not needed: `signature` is equal for all grids of a class, and a side is chosen by
its hash. Two grids on different sides have different signatures, so they are of different classes.
That grids of different classes may share a signature only puts more of them on one side.

Why the signature is invariant: two rows a and b are a permutation a[j] -> b[j] of the symbols.
Permuting columns lists the same pairs in another order; relabelling conjugates it; exchanging the
two rows inverts it. None changes the lengths of its cycles. Permuting rows within bands, and bands,
permutes the pairs of rows within and between bands, whose lengths are sorted at each level.
Columns likewise; transposing exchanges the two halves, which are sorted, too.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gidd_jax.errors import InputError

# Share of the classes (by hash) that are held out for the test. Of size 4 it is one of two.
HELD_OUT = {4: 0.5, 6: 0.2, 9: 0.1}
_SALT = 32  # of the hash: of sizes 4 and 6 about the share of the grids is held out, too
_NODES = 4000  # cells tried before a filling starts again: some beginnings are hopeless


class Layout(NamedTuple):
    """Size n, rows and columns of a box, and the units: cells of each row, column and box, int
    [3 n, n]."""

    size: int
    box_rows: int
    box_columns: int
    units: np.ndarray

    @property
    def cells(self) -> int:
        return self.size**2


BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


@functools.cache
def layout(size: int) -> Layout:
    """Return the layout of a size; raises InputError when there is none."""
    if size not in BOXES:
        raise InputError(f"--size={size}: use one of {', '.join(map(str, BOXES))}")
    rows, columns = BOXES[size]
    cells = np.arange(size**2).reshape(size, size)
    boxes = cells.reshape(size // rows, rows, size // columns, columns)
    boxes = boxes.transpose(0, 2, 1, 3).reshape(size, size)
    return Layout(size, rows, columns, np.concatenate([cells, cells.T, boxes]))


def layout_of(num_cells: int) -> Layout:
    """Return the layout of a row of so many cells; raises InputError when there is none."""
    sizes = {size**2: size for size in BOXES}
    if num_cells not in sizes:
        legal = ", ".join(f"{count} ({size} x {size})" for count, size in sizes.items())
        raise InputError(f"a grid has {legal} cells, not {num_cells}")
    return layout(sizes[num_cells])


def faults(grids: np.ndarray) -> np.ndarray:
    """Return which units [rows, columns, boxes] of grids [N, L] lack a symbol, bool [N, 3 n]."""
    form = layout_of(grids.shape[1])
    found = np.sort(grids[:, form.units], axis=-1)
    return np.any(found != np.arange(form.size), axis=-1)


def is_valid(grids: np.ndarray) -> np.ndarray:
    """Tell which grids [N, L] have every symbol once in each row, column and box, bool [N]."""
    return np.logical_not(faults(grids).any(axis=-1))


def keeps_givens(answers: np.ndarray, grids: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Tell which answers [N, L] have the symbols of the grids wherever they are given, bool [N]."""
    return np.all((answers == grids) | ~given, axis=-1)


def cells_wrong(answers: np.ndarray, solutions: np.ndarray) -> np.ndarray:
    """Return how many cells of each answer [N, L] differ from the solution, int [N]."""
    return np.sum(answers != solutions, axis=-1)


def random_grids(size: int, count: int, seed: int) -> np.ndarray:
    """Return valid grids int64 [count, L]: random fillings by backtracking."""
    rng = np.random.default_rng(seed)
    return np.array(list(itertools.islice(_fillings(size, rng), count)))


def _fillings(size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    form = layout(size)
    places = [(cell // size, cell % size, box_of(form, cell)) for cell in range(form.cells)]

    def fill(cell: int) -> bool:
        nonlocal budget
        if cell == form.cells:
            return True
        budget -= 1
        row, column, box = places[cell]
        for symbol in rng.permutation(size).tolist():
            bit = 1 << symbol
            if (rows[row] | columns[column] | boxes[box]) & bit or budget < 0:
                continue
            grid[cell] = symbol
            rows[row] ^= bit
            columns[column] ^= bit
            boxes[box] ^= bit
            if fill(cell + 1):
                return True
            rows[row] ^= bit
            columns[column] ^= bit
            boxes[box] ^= bit
        return False

    while True:
        grid, budget = [0] * form.cells, _NODES
        rows, columns, boxes = ([0] * size for _ in range(3))
        if fill(0):
            yield grid


def box_of(form: Layout, cell: int) -> int:
    """Return the number of the box that a cell lies in."""
    row, column = divmod(cell, form.size)
    return row // form.box_rows * (form.size // form.box_columns) + column // form.box_columns


def images(grids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random symmetric image of each grid [N, L], uniform over its class."""
    form = layout_of(grids.shape[1])
    count, size = len(grids), form.size
    rows = _line_orders(rng, count, size, form.box_rows)
    columns = _line_orders(rng, count, size, form.box_columns)
    labels = rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)
    cube = grids.reshape(count, size, size)
    if form.box_rows == form.box_columns:
        cube = np.where(rng.random((count, 1, 1)) < 0.5, cube, cube.transpose(0, 2, 1))
    each = np.arange(count)[:, None, None]
    cube = cube[each, rows[:, :, None], columns[:, None, :]]
    return labels[each, cube].reshape(count, -1)


def _line_orders(rng: np.random.Generator, count: int, size: int, thick: int) -> np.ndarray:
    """Return random orders of lines [count, size] that keep those of a band together."""
    num_bands = size // thick
    bands = rng.permuted(np.tile(np.arange(num_bands), (count, 1)), axis=1)
    inside = rng.permuted(np.tile(np.arange(thick), (count, num_bands, 1)), axis=2)
    return (bands[:, :, None] * thick + inside).reshape(count, size)


@functools.cache
def _all_orders(size: int, thick: int) -> np.ndarray:
    """Return every order of lines that keeps those of a band together, [O, size]."""
    num_bands = size // thick
    inside = list(itertools.permutations(range(thick)))
    return np.array(
        [
            [
                band * thick + line
                for band, order in zip(bands, orders, strict=True)
                for line in order
            ]
            for bands in itertools.permutations(range(num_bands))
            for orders in itertools.product(inside, repeat=num_bands)
        ]
    )


def canonical(grid: np.ndarray) -> tuple[int, ...]:
    """Return the least image of a grid [L] of size 4 or 6, read row by row: the name of its class.

    Raises InputError for size 9.
    """
    found = normal_images(grid)
    return tuple(found[np.lexsort(found.T[::-1])[0]].tolist())


def normal_images(grid: np.ndarray) -> np.ndarray:
    """Return the images of a grid [L] of size 4 or 6 whose first row is 0, 1, ..., n - 1, [I, L].

    Raises InputError for size 9, which has 3,359,232.
    """
    form = layout_of(len(grid))
    if form.size > 6:
        raise InputError("the least image is found for sizes 4 and 6: use signature for size 9")
    square = np.asarray(grid).reshape(form.size, form.size)
    rows = _all_orders(form.size, form.box_rows)
    columns = _all_orders(form.size, form.box_columns)
    bases = [square, square.T] if form.box_rows == form.box_columns else [square]
    found = np.concatenate(
        [
            base[rows[:, None, :, None], columns[None, :, None, :]].reshape(-1, form.cells)
            for base in bases
        ]
    )
    labels = np.argsort(found[:, : form.size], axis=1)  # no other labels give less
    return np.take_along_axis(labels, found, axis=1)


def signature(grid: np.ndarray) -> tuple:
    """Return what all grids of the class of a grid [L] share, see the docstring of the module."""
    form = layout_of(len(grid))
    square = np.asarray(grid).reshape(form.size, form.size)
    halves = _cycles(square.tolist(), form.box_rows), _cycles(square.T.tolist(), form.box_columns)
    return tuple(sorted(halves)) if form.box_rows == form.box_columns else halves


def _cycles(lines: list[list[int]], thick: int) -> tuple:
    """Return the sorted lengths of cycles of all pairs of lines, within bands and between them."""
    bands = [lines[start : start + thick] for start in range(0, len(lines), thick)]
    within = (itertools.combinations(band, 2) for band in bands)
    between = (itertools.product(*pair) for pair in itertools.combinations(bands, 2))
    return tuple(
        tuple(sorted(tuple(sorted(_cycle_lengths(a, b) for a, b in pairs)) for pairs in groups))
        for groups in (within, between)
    )


def _cycle_lengths(a: list[int], b: list[int]) -> tuple[int, ...]:
    after, lengths = dict(zip(a, b, strict=True)), []
    while after:
        symbol, length = next(iter(after)), 0
        while symbol in after:
            symbol, length = after.pop(symbol), length + 1
        lengths.append(length)
    return tuple(sorted(lengths))


def is_held_out(grid: np.ndarray) -> bool:
    """Tell whether the class of a grid [L] belongs to the test: nothing else decides it."""
    size = layout_of(len(grid)).size
    digest = hashlib.sha256(f"{_SALT} {signature(grid)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT[size]


def split_grids(size: int, train: int, test: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return grids [train, L] and held-out grids [test, L]: no class has grids among both."""
    wanted, found = {False: train, True: test}, {False: [], True: []}
    for grid in _fillings(size, np.random.default_rng([seed, 0])):
        held_out = is_held_out(np.array(grid))
        if len(found[held_out]) < wanted[held_out]:
            found[held_out].append(grid)
        if all(len(found[held]) == wanted[held] for held in found):
            break
    return np.array(found[False]), np.array(found[True])
