"""What is said of samplers in words, and the command that says it."""

import json
import subprocess
import sys

import pytest
from fresh_command import fresh_command

from gidd_jax.errors import InputError
from gidd_jax.evaluation import sampler_laws
from gidd_jax.evaluation.sampler_laws import Law, verdict
from gidd_jax.evaluation.subjects import find_subject
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess
from gidd_jax.sampling.options import SamplerOptions


def run_command(*arguments):
    command = [sys.executable, "-m", "gidd_jax.check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def laws(*distances):
    return [Law(5 * 4**n, 5, d, 5, 0.0, 0.0) for n, d in enumerate(distances)]


@pytest.mark.parametrize(
    ("distances", "words"),
    [
        ((0.122, 0.032, 0.015), "samples the model"),
        ((0.5, 0.2, 0.055), "samples the model"),  # still far, and falling as 1/N
        ((0.55, 0.55, 0.55), "floor 0.55"),
        ((0.3, 0.15, 0.1), "floor 0.10"),
        ((0.17, 0.77, 0.83), "seeks the mode"),
        ((0.38, 0.49, 0.49), "floor 0.49"),
        ((0.012,), "samples the model"),
        ((0.2,), "floor 0.20"),
    ],
)
def test_words_follow_the_figures(distances, words):
    assert verdict(laws(*distances), floor=0.012) == words


def test_methods_are_read_with_their_options():
    found = sampler_laws.parse_methods("ancestral, entropy_bound:epsilon=0.5:stop_after=2")
    assert found == {
        "ancestral": SamplerOptions(),
        "entropy_bound:epsilon=0.5:stop_after=2": SamplerOptions(
            method="entropy_bound", epsilon=0.5, stop_after=2
        ),
    }
    (left,) = sampler_laws.parse_methods("remdm_cap:fill_masks=False").values()
    assert left.fill_masks is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--methods is empty"),
        ("euler", "unknown method 'euler'"),
        ("psi:0.9", "'0.9' must be KEY=VALUE, as in psi:KEY=VALUE"),
        ("psi:kapa=0.9", "unknown option kapa"),
        ("psi:kappa=high", "kappa=high: must be a number"),
        ("ancestral:fill_masks=0", "fill_masks=0: must be true or false"),
        ("gibbs:sweeps=1.5", "sweeps=1.5: must be an integer"),
        ("psi:num_steps=7", "psi:num_steps=7: num_steps is 5, 20, 80 in turn: leave it out"),
        ("psi:kappa=0.5:kappa=0.6", "kappa is there twice"),
        ("psi:method=ancestral", "method is there twice"),
        ("psi:guidance=2", "guidance weighs prompts, and rows here have none: leave it out"),
        ("entropy_bound:epsilon=-1", "epsilon must not be negative"),
        ("entropy_bound:edit_above=0", r"edit_above must lie in \(0, 1\]"),
    ],
)
def test_methods_that_are_none_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        sampler_laws.parse_methods(text)


def test_only_what_can_sample_the_process_is_measured_and_only_samplers_must_sample():
    masks, hybrid = MaskedProcess(4, 3), HybridProcess(4, 3, 0.2)
    uniform = LogSnrProcess(4, 3, shift=1000.0)
    by_masks, by_uniform = (sampler_laws.legal_methods(p).split(",") for p in (masks, uniform))
    assert "first_hitting" in by_masks
    assert "entropy_bound:edit_above=0.5" not in by_masks
    assert "confidence" not in by_uniform
    assert "entropy_bound:edit_above=0.5" in by_uniform
    confidence = SamplerOptions(method="confidence")
    assert sampler_laws.claims_to_sample(masks, "row", confidence)
    assert sampler_laws.claims_to_sample(hybrid, "position", confidence)
    assert not sampler_laws.claims_to_sample(hybrid, "row", confidence)
    assert not sampler_laws.claims_to_sample(masks, "row", SamplerOptions(temperature=0.5))


def test_a_sampler_that_must_sample_and_does_not_fails_the_command(monkeypatch, capsys):
    """A method with a floor, said to sample: the exit code is 1, and the last line names it."""
    monkeypatch.setattr(sampler_laws, "SHORT_ROWS", 2_000)
    monkeypatch.setattr(sampler_laws, "LONG_ROWS", 50)
    monkeypatch.setattr(sampler_laws, "claims_to_sample", lambda *_: True)
    subject = find_subject("masked", None, allow_code=False, config=None)
    check = fresh_command("check", "--sampler", "--methods=first_hitting,confidence:order=drawn")
    assert check.measure_samplers(subject, None) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "FAIL  confidence:order=drawn must sample the model, and does not"
    assert sum(line.startswith("FAIL") for line in lines) == 1


def test_the_command_prints_a_line_for_each(tmp_path):
    out = tmp_path / "laws.json"
    arguments = ("--sampler", "--process=masked", f"--out={out}")
    done = run_command(*arguments, "--methods=first_hitting,confidence:order=drawn")
    assert done.returncode == 0, done.stderr
    assert "first_hitting" in done.stdout
    assert "samples the model" in done.stdout
    report = json.loads(out.read_text())
    assert report["methods"]["confidence:order=drawn"]["verdict"].startswith("floor 0.")
    assert report["methods"]["first_hitting"]["laws"][0]["total_variation"] < 1.5 * report["floor"]
    assert abs(report["bounds"]["full"] - report["bounds"]["entropy"]) < 0.5


def test_a_process_of_ones_own_that_cannot_be_measured_is_one_line(tmp_path):
    """It is made as small as the chains are before anything is measured."""
    (tmp_path / "own.py").write_text(
        "from gidd_jax.process import HybridProcess\n"
        "class Own(HybridProcess):\n"
        "    def __init__(self, vocab_size, mask_id):\n"
        "        super().__init__(vocab_size, mask_id, 0.3)\n"
    )
    flags = ("--sampler", f"--process={tmp_path}/own.py:Own", "--methods=first_hitting")
    done = run_command(*flags)
    assert done.returncode == 2
    assert "needs a process whose only noise is the mask" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods=ancestral",), "--methods and --told belong to --sampler"),
        (("--told=row",), "--methods and --told belong to --sampler"),
        (("--sampler", "--methods=first_hitting"), "needs a process whose only noise is the mask"),
        (("--sampler", "--out=laws.txt"), "--out must end in .json"),
    ],
)
def test_bad_flags_are_one_line(arguments, message):
    done = run_command("--process=hybrid:p_uniform=0.2", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
