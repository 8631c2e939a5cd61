"""Grids and puzzles: planted faults are found, classes are counted, train and test are apart."""

import math
import subprocess
import sys
from pathlib import Path

import grids
import make_data
import numpy as np
import puzzles
import pytest

from gidd_jax.errors import InputError

SIZES = (4, 6, 9)


@pytest.mark.parametrize("size", SIZES)
def test_the_checker_finds_what_is_planted(size):
    """Each change breaks units of one kind alone, or of all three."""
    form, found = grids.layout(size), grids.random_grids(size, 8, seed=3)
    assert grids.is_valid(found).all()
    each = np.arange(8)

    def broken(wrong: np.ndarray) -> list[bool]:
        found = grids.faults(wrong)
        assert grids.is_valid(wrong).tolist() == [not any(row) for row in found.tolist()]
        return [bool(found[:, kind * size : (kind + 1) * size].any()) for kind in range(3)]

    cube = found.reshape(8, size, size)
    one = found.copy()
    one[each, each] = (one[each, each] + 1) % size
    assert broken(one) == [True, True, True]
    # The cells of each row move on by one: rows stay right.
    shifted = np.stack([np.roll(cube[:, row], row % 2, axis=1) for row in range(size)], axis=1)
    assert broken(shifted.reshape(8, -1))[:2] == [False, True]
    shifted = np.stack([np.roll(cube[:, :, j], j % 2, axis=1) for j in range(size)], axis=2)
    assert broken(shifted.reshape(8, -1))[:2] == [True, False]
    # Rows of different bands change places: rows and columns stay right, boxes do not.
    swapped = cube.copy()
    swapped[:, [0, form.box_rows]] = swapped[:, [form.box_rows, 0]]
    assert broken(swapped.reshape(8, -1)) == [False, False, True]
    masked = found.copy()
    masked[:, 0] = size  # a mask that was left
    assert not grids.is_valid(masked).any()


def test_a_changed_given_is_found_in_a_valid_grid():
    grid = grids.random_grids(6, 1, seed=0)
    other = (grid + 1) % 6
    given = np.arange(36)[None] < 5
    assert grids.is_valid(other).all()
    assert not grids.keeps_givens(other, grid, given).any()
    assert grids.keeps_givens(np.where(given, grid, other), grid, given).all()
    assert grids.cells_wrong(np.where(given, grid, other), grid).tolist() == [31]


@pytest.mark.parametrize("size", SIZES)
def test_images_are_valid_and_of_the_same_class(size):
    found = grids.random_grids(size, 20, seed=1)
    moved = grids.images(found, np.random.default_rng(0))
    assert grids.is_valid(moved).all()
    assert (moved != found).any(axis=1).all()
    for one, other in zip(found, moved, strict=True):
        assert grids.signature(one) == grids.signature(other)
        assert grids.is_held_out(one) == grids.is_held_out(other)
        if size < 9:
            assert grids.canonical(one) == grids.canonical(other)


def test_random_images_reach_the_whole_class_evenly():
    """One class of size 4 has 96 grids, the other 192."""
    for grid, orbit in _classes(4, 50).values():
        drawn = grids.images(np.tile(grid, (100 * orbit, 1)), np.random.default_rng(0))
        _, counts = np.unique(drawn, axis=0, return_counts=True)
        assert len(counts) == orbit
        chi_square = ((counts - 100) ** 2 / 100).sum()
        assert abs(chi_square - orbit + 1) < 5 * math.sqrt(2 * orbit)


def _classes(size: int, count: int) -> dict[tuple, tuple[np.ndarray, int]]:
    """The classes among random grids, each with a grid and how many grids it has."""
    found = {}
    for grid in grids.random_grids(size, count, seed=0):
        key = grids.canonical(grid)
        if key not in found:
            normal = len(np.unique(grids.normal_images(grid), axis=0))
            found[key] = grid, normal * math.factorial(size)
    return found


def test_there_are_288_grids_of_size_4_in_two_classes_on_different_sides():
    found = _classes(4, 50)
    assert sorted(orbit for _, orbit in found.values()) == [96, 192]
    assert {grids.is_held_out(grid) for grid, _ in found.values()} == {False, True}


@pytest.mark.slow
def test_there_are_28200960_grids_of_size_6_in_49_classes():
    """The known numbers: no class was missed, and none was split."""
    found = _classes(6, 4000)
    assert len(found) == 49
    assert sum(orbit for _, orbit in found.values()) == 28_200_960
    held_out = [orbit for grid, orbit in found.values() if grids.is_held_out(grid)]
    assert len(held_out) == 9
    assert 0.15 < sum(held_out) / 28_200_960 < 0.25


def test_size_9_has_no_least_image():
    with pytest.raises(InputError, match="signature for size 9"):
        grids.canonical(grids.random_grids(9, 1, 0)[0])


@pytest.mark.parametrize("size", SIZES)
def test_train_and_test_share_no_class(size, tmp_path: Path):
    levels = puzzles.LEVELS[size]
    said, again = (make_data.make(tmp_path / name, size, 300, 3, levels, seed=7) for name in "ab")
    names = ("train", "test", "validation")
    train, test, held_out = (np.load(tmp_path / "a" / f"{name}.npz") for name in names)
    assert grids.is_valid(held_out["ids"]).all()
    assert all(map(grids.is_held_out, held_out["ids"]))
    assert train["ids"].shape == (300, size**2)
    assert grids.is_valid(train["ids"]).all()
    assert grids.is_valid(test["ids"]).all()
    assert not any(map(grids.is_held_out, train["ids"]))
    assert all(map(grids.is_held_out, test["ids"]))
    assert test["given"].sum(axis=1).tolist() == [level for level in levels for _ in range(3)]
    assert ": 0 shared\n" in said
    assert again == said.replace(str(tmp_path / "a"), str(tmp_path / "b"))  # digests, too


def brute_force(cells: list[int]) -> int:
    """How many of the 288 grids of size 4 fit a puzzle."""
    fits = np.array(cells) < 0
    return int(((np.array(cells) == ALL_OF_4) | fits).all(axis=1).sum())


def _all_of_4() -> np.ndarray:
    rows = np.array(np.meshgrid(*[np.arange(4)] * 8, indexing="ij")).reshape(8, -1).T
    tops = rows[[all(sorted(r[i : i + 4]) == [0, 1, 2, 3] for i in (0, 4)) for r in rows.tolist()]]
    pairs = np.concatenate([np.repeat(tops, len(tops), 0), np.tile(tops, (len(tops), 1))], axis=1)
    return pairs[grids.is_valid(pairs)]


ALL_OF_4 = _all_of_4()


def test_solutions_are_counted():
    assert len(ALL_OF_4) == 288
    assert len(puzzles.solutions([-1] * 16, most=1000)) == 288
    rng = np.random.default_rng(0)
    for _ in range(100):
        cells = np.where(rng.random(16) < 0.3, ALL_OF_4[rng.integers(288)], -1)
        if rng.random() < 0.3:
            cells[rng.integers(16)] = rng.integers(4)
        found = puzzles.solutions(cells.tolist(), most=1000)
        assert len(found) == len(set(map(tuple, found))) == brute_force(cells.tolist())


@pytest.mark.parametrize("size", SIZES)
def test_puzzles_have_one_solution(size):
    found = puzzles.make_puzzles(
        grids.random_grids(size, 3, 0), puzzles.LEVELS[size], np.random.default_rng(0)
    )
    for grid, given in zip(found.ids, found.given, strict=True):
        assert puzzles.solutions(np.where(given, grid, -1).tolist()) == [grid.tolist()]
    nested = found.given.reshape(-1, 3, size**2)
    assert (nested[1:] <= nested[:-1]).all()  # fewer givens of the same grid


def test_too_few_givens_are_refused():
    with pytest.raises(InputError, match="no puzzle of size 4 with 3 givens"):
        puzzles.make_puzzles(grids.random_grids(4, 1, 0), [3], np.random.default_rng(0), tries=3)


LINES = {
    "12": "line 2 has 2 cells: use one of 16, 36, 81",
    "1234" * 9: "line 2 has 36 cells, those before it 16",
    "5...............": "line 2: '5' is no cell: use 1 to 4",
    "11..............": "line 2 has no solution: change a given",
    "1234............": "line 2 has several solutions: give more cells",
}


def good_line() -> tuple[str, np.ndarray]:
    grid = grids.random_grids(4, 1, 0)
    found = puzzles.make_puzzles(grid, [6], np.random.default_rng(0))
    row = np.where(found.given, found.ids + 1, 0)[0]
    return "".join(map(str, row)).replace("0", "."), grid[0]


def test_text_is_read_and_solved(tmp_path: Path):
    line, grid = good_line()
    (tmp_path / "p.txt").write_text(f"{line}\n\n{line.replace('.', '0')}\n")
    found = puzzles.load_puzzles(tmp_path / "p.txt")
    assert (found.ids == grid).all()
    assert found.given.sum(axis=1).tolist() == [6, 6]


@pytest.mark.parametrize("text", LINES)
def test_bad_lines_are_named(tmp_path: Path, text):
    (tmp_path / "p.txt").write_text(f"{good_line()[0]}\n{text}\n")
    with pytest.raises(InputError) as error:
        puzzles.load_puzzles(tmp_path / "p.txt")
    assert LINES[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        puzzles.load_puzzles(tmp_path / "none.npz")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no puzzle"):
        puzzles.load_puzzles(tmp_path / "empty.txt")
    (tmp_path / "full.txt").write_text("1234341221434321")
    with pytest.raises(InputError, match="no free cell"):
        puzzles.load_puzzles(tmp_path / "full.txt")
    _, grid = good_line()
    given = np.arange(16)[None] < 14
    np.savez(tmp_path / "wrong.npz", ids=((grid + given) % 4)[None][0], given=given)
    with pytest.raises(InputError, match="solution"):
        puzzles.load_puzzles(tmp_path / "wrong.npz")
    np.savez(tmp_path / "ids.npz", ids=grid[None])
    with pytest.raises(InputError, match="holds no `ids` and `given`"):
        puzzles.load_puzzles(tmp_path / "ids.npz")


@pytest.mark.parametrize("flag", ["--size=5", "--givens=0", "--givens=x", "--train=0"])
def test_bad_flags_are_refused_in_one_line(tmp_path: Path, flag):
    command = [sys.executable, make_data.__file__, f"--out={tmp_path / 'data'}", flag]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert flag.partition("=")[0].strip("-") in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()
