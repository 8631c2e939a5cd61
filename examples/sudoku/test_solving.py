"""What is measured of answers, against models whose answers are planted; tables and commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import compare
import grids
import numpy as np
import puzzles
import pytest
import solve
import solving
import tables

from gidd_jax.errors import InputError
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.sampling.trace import Trace, changes_between

COUNT, MASK = 10, 4


@pytest.fixture(scope="module")
def some() -> puzzles.Puzzles:
    """Ten puzzles of size 4 at 8 and at 6 givens."""
    found = grids.random_grids(4, COUNT, seed=0)
    return puzzles.make_puzzles(found, (8, 6), np.random.default_rng(0))


def trace_of(frames: np.ndarray, given: np.ndarray) -> Trace:
    """The trace of ids [C + 1, N, L], from the start on."""
    changes = changes_between(frames[0], frames[1:], np.zeros(frames[1:].shape, np.float32))
    count, length = given.shape
    ids, lengths = np.arange(MASK + 1, dtype=np.int32), np.full(count, length, np.int32)
    texts = [str(row.tolist()) for row in frames[-1]]
    return Trace(changes, given, lengths, texts, ids, list("01234"), MASK, ids[:0], "f")


class Planted:
    """A model that first gets the first two free cells of each puzzle wrong, then rewrites them.

    Of even puzzles it mends the first of the two, of odd ones it changes it to another wrong symbol
    and breaks a right one, the last. Its self-correction mends everything.
    """

    def __init__(self, some: puzzles.Puzzles, process=None):
        self.process = process or HybridProcess(MASK + 1, MASK, 0.2)
        self.tokenizer, self.max_seq_len = SimpleNamespace(mask_id=MASK), 16
        self.some, self.asked = some, []

    def infill(self, rows, *, batch_size, seed, trace, options):
        self.asked.append(rows)
        given = rows >= 0
        truth = self.some.ids[[self._find(row) for row in rows]]
        first, each = truth.copy(), np.arange(len(rows))
        free = [np.flatnonzero(row < 0) for row in rows]
        one, two, last = (np.array([places[i] for places in free]) for i in (0, 1, -1))
        first[each, one] = (truth[each, one] + 1) % 4
        first[each, two] = (truth[each, two] + 1) % 4
        final, odd = first.copy(), each % 2 == 1
        final[each, one] = (truth[each, one] + np.where(odd, 2, 0)) % 4
        final[each[odd], last[odd]] = (truth[each[odd], last[odd]] + 1) % 4
        start = np.where(given, truth, MASK)
        half = np.where(np.arange(16) < 8, first, start)
        again = first.copy()
        again[each, two] = MASK  # a cell that is masked again keeps its first answer
        frames = np.stack([start, half, first, again, final]).astype(np.int32)
        return SimpleNamespace(ids=final, network_calls=8, trace=trace_of(frames, given))

    def generate(self, count, *, batch_size, seed, options):
        ids = grids.random_grids(4, count, seed=0)
        ids[: count // 4, 0] = (ids[: count // 4, 0] + 1) % 4
        return SimpleNamespace(ids=ids, network_calls=30)

    def correct(self, rows, *, batch_size, seed, options):
        self.asked.append(rows)
        if rows.free.all():
            return SimpleNamespace(ids=grids.random_grids(4, len(rows.ids), 0), network_calls=5)
        truth = self.some.ids[[self._find(np.where(r.free, -1, r.ids)) for r in _each(rows)]]
        return SimpleNamespace(ids=truth, network_calls=12)

    def _find(self, row: np.ndarray) -> int:
        fits = (np.where(self.some.given, self.some.ids, -1) == row).all(axis=1)
        return int(np.flatnonzero(fits)[0])


def _each(rows):
    return [SimpleNamespace(ids=i, free=f) for i, f in zip(rows.ids, rows.free, strict=True)]


def test_puzzles_and_mending_are_counted(some):
    model = Planted(some)
    rows, mending = solving.puzzle_figures(model, "m", SamplerOptions(), some, 5, seed=0)
    assert [row["givens"] for row in rows] == [8, 6]
    for row in rows:
        assert (row["puzzles"], row["solved"], row["corrected_solved"]) == (COUNT, 0.0, 1.0)
        assert row["cells_wrong"] == (1 + 3) / 2
        assert row["corrected_cells_wrong"] == 0
        assert (row["calls"], row["correction_calls"]) == (4, 6)  # of two batches
    drawing, correcting = mending
    # Of two wrong cells a puzzle the first is changed; half of those are right then.
    assert drawing["mended"] == solving.WHILE_DRAWING
    assert (drawing["wrong"], drawing["touch"], drawing["recover"]) == (4 * COUNT, 0.5, 0.25)
    free = int((~some.given).sum())
    assert drawing["damage"] == pytest.approx(COUNT / (free - 4 * COUNT))
    assert correcting["mended"] == solving.SELF_CORRECT
    assert [correcting[name] for name in ("touch", "recover", "damage")] == [1, 1, 0]
    assert drawing["touch_interval"] is not None
    # What the model was shown are the givens alone.
    shown = np.concatenate([asked for asked in model.asked if isinstance(asked, np.ndarray)])
    assert (shown == np.where(some.given, some.ids, -1)).all()


def test_puzzles_of_one_grid_are_resampled_together(some):
    """Twice the puzzles of each grid: the rates stay, and so do their intervals."""
    twice = puzzles.Puzzles(*(np.concatenate([leaf, leaf]) for leaf in some))
    once, again = (
        solving.puzzle_figures(Planted(part), "m", SamplerOptions(), part, 5, seed=0)[1][0]
        for part in (some, twice)
    )
    for name in ("touch", "recover", "damage"):
        assert again[name] == once[name]
        assert again[f"{name}_interval"] == pytest.approx(once[f"{name}_interval"], abs=1e-9)


def test_where_all_is_noise_there_is_no_first_answer(some):
    uniform = LogSnrProcess(MASK + 1, MASK, shift=1000.0)
    _, mending = solving.puzzle_figures(
        Planted(some, uniform), "m", SamplerOptions(), some, 5, seed=0
    )
    assert [one["mended"] for one in mending] == [solving.SELF_CORRECT]


def test_grids_without_givens_are_counted(some):
    found = solving.grid_figures(Planted(some), "m", SamplerOptions(), 40, 16, seed=0)
    assert (found["valid"], found["corrected_valid"]) == (0.75, 1.0)
    assert found["calls"] == 10  # of three batches
    assert found["valid_interval"] == pytest.approx((0.5981, 0.8581), abs=1e-4)


def test_wilson_has_a_width_at_both_ends():
    """Values of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    expected = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}
    expected |= {(0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (hits, count), interval in expected.items():
        assert solving.wilson(hits, count) == pytest.approx(interval, abs=1e-4)
    assert solving.wilson(20, 20)[1] == 1.0


def test_the_most_rewritten_puzzles_are_played(some):
    samples = Planted(some).infill(
        np.where(some.given, some.ids, -1), batch_size=5, seed=0, trace=True, options=None
    )
    found = solving.most_rewritten(samples, some, 3)
    assert found.texts == [samples.trace.texts[n] for n in (1, 3, 5)]  # odd: two cells rewritten
    assert solving.first_answers(found).tolist() == (
        solving.first_answers(samples.trace)[[1, 3, 5]].tolist()
    )
    assert found.token_texts == ["1", "2", "3", "4", ""]
    assert np.bincount(found.changes.sample, minlength=3).tolist() == [
        int((samples.trace.changes.sample == n).sum()) for n in (1, 3, 5)
    ]


def test_methods_are_those_that_the_process_has(some):
    masked = Planted(some, MaskedProcess(MASK + 1, MASK))
    names = list(solving.methods_of(masked, None, 32))
    assert "remdm_cap" in names
    assert not any("edit_above" in name for name in names)
    with pytest.raises(InputError, match="edit_above needs a process with noise"):
        solving.methods_of(masked, "entropy_bound:edit_above=0.5", 32)
    found = solving.methods_of(masked, "ancestral,first_hitting", 32)  # the latter has no steps
    assert [options.num_steps for options in found.values()] == [32, SamplerOptions.num_steps]
    with pytest.raises(InputError, match="given by --num_steps"):
        solving.methods_of(masked, "adaptive:num_steps=3", 32)


def test_the_five_processes_of_the_study_have_names():
    hybrid = [HybridProcess(MASK + 1, MASK, share) for share in (0.0, 0.1, 0.2)]
    others = LogSnrProcess(MASK + 1, MASK, shift=1000.0), MaskedProcess(MASK + 1, MASK)
    names = [solving.process_name(process) for process in (*hybrid, *others)]
    assert names == [
        "Hybrid p_uniform=0",
        "Hybrid p_uniform=0.1",
        "Hybrid p_uniform=0.2",
        "LogSnr shift=1000",
        "Masked",
    ]


def test_puzzles_are_chosen_by_givens(some):
    found = solving.chosen(some, [6], 4)
    assert found.given.sum(axis=1).tolist() == [6] * 4
    assert len(solving.chosen(some, None, None).ids) == 2 * COUNT
    with pytest.raises(InputError, match=r"--givens=7: .* use some of 8, 6"):
        solving.chosen(some, [7], None)


def test_models_of_other_rows_are_refused(some):
    model = Planted(some)
    solving.check_model(model, "run", grids.layout(4))
    with pytest.raises(InputError, match="--config=sudoku:6"):
        solving.check_model(model, "run", grids.layout(6))
    model.process = None
    with pytest.raises(InputError, match="autoregressive"):
        solving.check_model(model, "run", grids.layout(4))


BAD = {
    "no puzzle": (["--puzzles=none.npz"], "no such file"),
    "several solutions": (["--puzzles=many.txt"], "line 1 has several solutions"),
    "no solution": (["--puzzles=zero.txt"], "line 1 has no solution"),
    "out": (["--puzzles=many.txt", "--out=a.txt"], "--out must end in .json"),
    "givens": (["--puzzles=good.txt", "--givens=x"], "--givens=x: give numbers"),
    "missing givens": (["--puzzles=good.txt", "--givens=5"], "--givens=5: no puzzle has so many"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tmp_path: Path, some, case):
    good = np.where(some.given, some.ids + 1, 0)[0]
    (tmp_path / "good.txt").write_text("".join(map(str, good)))
    (tmp_path / "many.txt").write_text("1234" + "." * 12)
    (tmp_path / "zero.txt").write_text("11" + "." * 14)
    flags, message = BAD[case]
    command = [sys.executable, solve.__file__, "--checkpoint=none", *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def write_report(path: Path, process: str, valid: float, solved: float) -> None:
    """A report of solve.py with one method."""
    interval = [0.0, 1.0]
    shares = {"valid": valid, "corrected_valid": 2 * valid}
    grid = {"method": "ancestral", "grids": 9, "calls": 8, "correction_calls": 4, **shares}
    puzzle = {"method": "ancestral", "givens": 20, "solved": solved, "corrected_solved": 1.0}
    mending = {"method": "ancestral", "mended": "self_correct", "wrong": 7}
    mending |= {"touch": 0.5, "recover": None, "damage": 0.25}
    for one in (grid, puzzle, mending):
        names = [n for n in one if n in ("valid", "solved", "touch", "recover", "damage")]
        one |= {f"{name}_interval": interval for name in names}
    parts = {"grids": [grid], "solved": [puzzle], "mending": [mending]}
    path.write_text(json.dumps({"process": process, "size": 6, **parts}))


def test_runs_are_compared_over_seeds(tmp_path: Path):
    for seed, (valid, solved) in enumerate([(0.1, 0.5), (0.3, 0.7)]):
        write_report(tmp_path / f"a{seed}.json", "A", valid, solved)
    write_report(tmp_path / "b.json", "B", 0.2, 0.25)
    text = compare.compared([tmp_path / name for name in ("a0.json", "a1.json", "b.json")])
    lines = [line.split() for line in text.splitlines()]
    assert ["A", "ancestral", "2", "20.0", "+-", "14.1", "40.0", "+-", "28.3"] in lines
    assert ["B", "ancestral", "1", "20.0", "40.0"] in lines
    assert ["A", "ancestral", "20", "60.0", "+-", "14.1", "100.0", "+-", "0.0"] in lines
    assert [
        "A",
        "ancestral",
        "self_correct",
        "50.0",
        "+-",
        "0.0",
        "-",
        "25.0",
        "+-",
        "0.0",
    ] in lines


def test_what_is_no_report_is_refused(tmp_path: Path):
    (tmp_path / "other.json").write_text('{"loss": 1}')
    with pytest.raises(InputError, match=r"other\.json is no report of solve\.py"):
        compare.compared([tmp_path / "other.json"])
    with pytest.raises(InputError, match="give some"):
        compare.compared([])


def test_shares_are_written_with_intervals():
    assert tables.share({"a": 0.5, "a_interval": (0.4, 0.625)}, "a") == "50.0 % (40.0 to 62.5)"
    assert tables.share({"a": None, "a_interval": None}, "a") == "-"
    assert tables.share({"a": 0.5, "a_interval": None}, "a") == "50.0 %"


@pytest.mark.slow
def test_from_grids_to_tables(tmp_path: Path):
    """Data, a short run, tables and a replay, as the commands of README.md."""
    here, env = Path(solve.__file__).parent, {**os.environ, "JAX_PLATFORMS": "cpu"}

    def run(*command: str) -> str:
        result = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, env=env
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    run(f"{here / 'make_data.py'}", "--size=4", "--train=500", "--test=4", "--out=data")
    data = [f"--config.data.path={tmp_path / 'data' / 'train.npz'}"]
    held_out = tmp_path / "data" / "validation.npz"
    data += [f"--config.data.validation=path:{held_out}", "--config.train.num_steps=60"]
    run("-m", "gidd_jax.train", "--config=sudoku:4", "--workdir=run", *data)
    (tmp_path / "mine.txt").write_text("1.3.341221434321\n")
    methods = "--methods=adaptive,entropy_bound:epsilon=0:edit_above=0.5"
    flags = ["--checkpoint=run", methods, "--num_grids=8", "--batch_size=8"]
    solver = str(here / "solve.py")
    said = run(
        solver, *flags, "--puzzles=data/test.npz", "--out=a.json", "--replay=a.html", "--givens=8,6"
    )
    assert "wrote a.json" in said
    report = json.loads((tmp_path / "a.json").read_text())
    assert [one["givens"] for one in report["solved"]] == [8, 6, 8, 6]
    for one in report["grids"] + report["solved"]:
        assert 1 <= one["calls"] <= 33
    for one in report["solved"]:
        assert 0 <= one["cells_wrong"] <= 16 - one["givens"]
        assert one["corrected_cells_wrong"] <= 16 - one["givens"]  # givens stay
    ways = [(one["method"], one["mended"]) for one in report["mending"]]
    assert len(ways) == len(set(ways)) == 4
    assert '"columns":4,"box":[2,2]' in (tmp_path / "a.html").read_text()
    assert "mending" in run(str(here / "compare.py"), "--reports=a.json,a.json")
    assert "puzzles" in run(solver, *flags[:1], "--methods=ancestral", "--puzzles=mine.txt")
