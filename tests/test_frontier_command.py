"""gidd_jax.frontier: every point once, kept, and drawn."""

import csv
import json
import subprocess
import sys

import pytest
from fresh_command import fresh_command
from tiny_checkpoint import write_checkpoint
from tiny_run import tiny_settings

from gidd_jax.errors import InputError
from gidd_jax.evaluation import frontier
from gidd_jax.evaluation.sampler_laws import parse_methods
from gidd_jax.inference.gidd import Gidd


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_settings(folder)
    write_checkpoint(folder / "run", folder)
    write_checkpoint(folder / "scorer", folder, "ar")
    return folder


def flags(runs, workdir, *more):
    common = (f"--checkpoint={runs}/run", f"--scorer={runs}/scorer", f"--workdir={workdir}")
    return (*common, "--num_samples=3", "--bootstrap=20", *more)


def test_points_are_all_combinations_and_those_without_steps_once():
    methods = parse_methods("ancestral,first_hitting,entropy_bound:epsilon=0.5")
    points = frontier.plan_points(methods, [0.8, 1.0], [4, 8])
    assert [point.name for point in points][:3] == [
        "ancestral+temperature=0.8+num_steps=4",
        "ancestral+temperature=0.8+num_steps=8",
        "ancestral+temperature=1+num_steps=4",
    ]
    assert len(points) == 4 + 2 + 4
    assert points[-1].options.epsilon == 0.5
    assert points[-1].options.num_steps == 8


def test_a_frontier_is_drawn_and_goes_on_where_it_stopped(runs, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "frontier"
    given = flags(runs, workdir, "--methods=ancestral,entropy_bound:epsilon=0.5", "--steps=2,4")
    fresh_command("frontier", *given).main([])
    assert capsys.readouterr().out.count("entropy_bound:epsilon=0.5") == 2
    lines = list(csv.DictReader((workdir / "frontier.csv").open()))
    assert len(lines) == 4
    files = sorted((workdir / "points").iterdir())
    one = json.loads(files[0].read_text())
    assert float(lines[0]["gen_ppl"]) == pytest.approx(one["gen_ppl"])
    assert (workdir / "frontier.png").stat().st_size > 10_000

    files[1].unlink()
    drawn = []
    generate = Gidd.generate

    def noted(self, *arguments, **options):
        drawn.append(options["options"])
        return generate(self, *arguments, **options)

    monkeypatch.setattr(Gidd, "generate", noted)
    before = (workdir / "frontier.csv").read_bytes()
    fresh_command("frontier", *given).main([])
    assert len(drawn) == 1
    assert (workdir / "frontier.csv").read_bytes() == before
    with pytest.raises(InputError, match="was made with"):
        fresh_command("frontier", *given, "--seed=1").main([])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--temperatures=hot", "--temperatures=hot: give numbers"),
        ("--temperatures=", "--temperatures is empty: give numbers"),
        ("--steps=", "--steps is empty: give numbers"),
        ("--methods=psi:temperature=0.5", "temperature is given by --temperatures: leave it out"),
        ("--methods=psi:num_steps=7", "num_steps is given by --steps: leave it out"),
        ("--methods=psi:guidance=2", "guidance weighs prompts, and rows here have none"),
        ("--methods=euler", "unknown method 'euler'"),
        ("--methods=first_hitting", "needs a process whose only noise is the mask"),
        ("--steps=0", "num_steps must be at least 1"),
    ],
)
def test_bad_flags_are_one_line(runs, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        fresh_command("frontier", *flags(runs, tmp_path / "out", more)).main([])
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_in_one_line(runs, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gidd_jax.frontier", *flags(runs, tmp_path, "--steps=many")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
