"""The benchmarks' arithmetic, tables and exit code."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import blocks, collectives, comparison, inputs, measure, preparing, step
from benchmarks.plan import (
    COMPILED,
    EAGER,
    OURS,
    ROUNDS,
    TWIN,
    Case,
    Ceilings,
    Check,
    Found,
    measurement,
    median,
    ratio_checks,
)
from benchmarks.plots import plot
from benchmarks.tables import (
    BEGIN,
    END,
    check_table,
    columns_of,
    growth_words,
    markdown,
    newest_lines,
    replace_marked,
    seconds_words,
)
from gidd_jax.data.corpus import list_files
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.training.metrics import flops_per_token

VOCAB = 256
SUITES = {
    name: importlib.import_module(f"benchmarks.{name}")
    for name in ("loss", "noising", "step", "sampler", "data")
}
CEILINGS = Ceilings(matmul=1e11, copy=1e10)


class FakeWorker:
    """A worker whose times are made up: each variant takes `seconds`, the n-th run n % more."""

    def __init__(self, seconds, peaks, log):
        self.seconds, self.peaks, self.log, self.runs = seconds, peaks, log, 0

    def ask(self, request, *arguments):
        self.log.append((request, *arguments[-1:]))
        if request == "make":
            return {"compile_seconds": 2.0, "xla_temp_bytes": 3_000_000}
        if request == "time":
            self.runs += 1
            (variant,) = arguments
            return self.seconds[variant] * (1 + 0.01 * self.runs), self.peaks[variant]
        return None


class FakeSides(comparison.Sides):
    def __init__(self, vs_torch=True):
        super().__init__(vs_torch)
        self.log = []
        peaks = {OURS: 10_000_000, EAGER: 900_000_000, COMPILED: 400_000_000}
        self.worker = FakeWorker({OURS: 1.0, EAGER: 4.0, COMPILED: 2.0}, peaks, self.log)

    def of(self, variant, virtual_devices=1):
        return self.worker


def suite_line(suite="loss", vs_torch=True):
    machine = {"cpu": "A processor", "device": "cpu", "cores": 2, "versions": {"jax": "1.2"}}
    return comparison.run_suite(suite, "cpu", "float32", FakeSides(vs_torch), CEILINGS, machine)


def case(**changes):
    fields = {"kind": "loss", "name": "a", "shape": {"n": 4}, "tokens": 500}
    return Case(**{**fields, "flops": 2e10, "bytes_moved": 1e9, **changes})


def measured(variant, seconds, peak, name="a", **changes):
    return measurement(case(name=name, **changes), variant, [seconds] * 3, peak, {}, CEILINGS)


def test_measurement():
    one = measurement(case(), OURS, [0.9, 0.4, 0.5, 7.0, 0.3], 12, {"f": 1}, CEILINGS)
    assert one.seconds == 0.5
    assert one.tokens_per_second == 1000
    assert one.matmul_fraction == pytest.approx(0.4)  # 4e10 of 1e11 FLOP/s
    assert one.copy_fraction == pytest.approx(0.2)  # 2e9 of 1e10 bytes/s
    assert one.roofline_fraction == pytest.approx(0.4)
    assert median([3.0, 1.0, 2.0, 10.0]) == 2.5


def test_ratios_and_checks():
    found = Found([measured(OURS, 0.5, 100), measured(EAGER, 2.0, 900), measured(OURS, 1, 1, "b")])
    assert found.speed_up("a", EAGER) == pytest.approx(4.0)
    assert found.memory_share("a", EAGER) == pytest.approx(1 / 9)
    assert found.speed_up("a", COMPILED) is None
    assert found.speed_up("b", EAGER) is None
    checks = ratio_checks(found, "a", {EAGER: 4.5, COMPILED: 1.0}, {EAGER: 1 / 8})
    assert [check.met for check in checks] == [False, None, True]
    assert comparison.exit_code(checks) == 1
    assert comparison.exit_code(checks[1:]) == 0  # what was not measured is not missed
    assert Check("told", 0.3, None).met is None
    assert check_table(checks).splitlines()[1].split()[-3:] == ["4.5", "4", "NO"]


def test_repeats_fill_the_clocks_resolution():
    assert [measure.repeats_for(s) for s in (1.0, 0.011, 1e-4, 0.0)] == [1, 2, 201, 10_000]


def test_machine_description(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nmodel name\t: another\n")
    assert measure.cpu_model(file) == "Some CPU: 3 GHz"
    machine = measure.host()
    assert machine["versions"]["jax"] == jax.__version__
    assert os.uname().nodename not in json.dumps(machine)
    status = "Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n"
    assert measure.status_bytes(status, "VmHWM") == 2 << 20


@pytest.mark.skipif(not os.access(measure.CLEAR, os.W_OK), reason="needs Linux's /proc")
def test_peak_memory_is_that_of_the_run():
    np.ones(64 << 20)  # an earlier peak does not count
    memory = measure.ProcessMemory()
    np.ones(16 << 20)  # 128 MiB
    assert 120 << 20 < memory.peak() < 200 << 20


def test_compiled_facts_and_subject():
    subject = measure.jax_subject(lambda a: a @ a, jnp.ones((64, 64)))
    np.testing.assert_array_equal(subject.run(), np.full((64, 64), 64.0))
    assert subject.facts["xla_argument_bytes"] == 64 * 64 * 4
    assert subject.facts["xla_flops"] == pytest.approx(2 * 64**3, rel=0.05)


def test_collectives_are_counted_as_often_as_loops_run_them():
    text = """HloModule m
%body (p: (f32[2])) -> f32[2] {
  %all-reduce.1 = (f32[2,3]{1,0}, /*index=1*/bf16[]) all-reduce(%a, %b), to_apply=%add
}
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %g = s32[7]{0} all-gather(%p), dimensions={0}
  %w = f32[2] while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %c = pred[4]{0} collective-permute-start(%p)
  %n = f32[100] add(%all-reduce.1, %g)
}
"""
    assert collectives.total_bytes(text) == 28 + 5 * (24 + 2) + 4


def test_a_real_program_sums_over_its_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    a = jax.device_put(jnp.ones((16, 6)), sharding)
    text = jax.jit(lambda a: jnp.sum(a, axis=0)).lower(a).compile().as_text()
    assert collectives.total_bytes(text) == 6 * 4


def test_step_flops_are_those_of_the_package():
    shape = next(c.shape for c in step.cases("cpu", "float32") if c.name == "step_8x512_b4_l512")
    want = flops_per_token(step._settings(shape), shape["vocab_size"])
    assert step.step_flops_per_token(shape) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("suite", SUITES)
def test_targets_are_measured(suite, scale):
    """Each check names a case there is, and compares with a variant that the case has."""
    module = SUITES[suite]
    cases = module.cases(scale, "float32")
    names = [c.name for c in cases]
    assert len(set(names)) == len(names)
    facts = {"losses": [1.0, 2.0], "collective_bytes": 8, "gradient_bytes": 8, "waiting_share": 0.0}
    found = Found(
        [measurement(c, v, [1.0], 10, facts, CEILINGS) for c in cases for v in c.variants]
    )
    checks = module.checks(scale, found)
    assert checks
    assert all(check.measured is not None for check in checks), checks
    assert all(set(c.variants) <= {OURS, *TWIN} for c in cases)
    # Without the twin its targets are not measured, and nothing fails.
    alone = [measurement(c, OURS, [1e-9], 10, facts, CEILINGS) for c in cases]
    assert comparison.exit_code(module.checks(scale, Found(alone))) == 0


def test_scaling_checks():
    def device_case(name, losses, moved):
        facts = {"losses": losses, "collective_bytes": moved, "gradient_bytes": 1000}
        return measurement(case(name=name), OURS, [1.0], None, facts, CEILINGS)

    good = [device_case("one", [3.0, 2.0], 0), device_case("two", [3.0, 2.00001], 1020)]
    assert [c.met for c in step.scaling_checks(Found(good), ["one", "two"])] == [True, True]
    bad = [device_case("one", [3.0, 2.0], 0), device_case("two", [3.0, 2.001], 2000)]
    assert [c.met for c in step.scaling_checks(Found(bad), ["one", "two"])] == [False, False]


def test_a_line_of_results_and_its_tables(tmp_path):
    line = suite_line()
    assert set(line) == {
        "format",
        "suite",
        "scale",
        "dtype",
        "time",
        "machine",
        "ceilings",
        "measurements",
        "checks",
    }
    first = line["measurements"][0]
    assert len(first["all_seconds"]) == ROUNDS >= 5
    assert first["facts"]["compile_seconds"] == 2.0
    assert first["seconds"] == median(first["all_seconds"])
    assert {m["variant"] for m in line["measurements"]} == {OURS, EAGER, COMPILED}
    file = tmp_path / "loss.jsonl"
    comparison.append(file, {**line, "time": "older"})
    comparison.append(file, line)
    comparison.append(file, {**line, "scale": "small", "time": "trial"})
    (newest,) = newest_lines(tmp_path)
    assert newest == line
    assert Check(**newest["checks"][0]).measured == pytest.approx(4.0, rel=0.03)
    tables = markdown([newest])
    assert "### A processor, 2 cores, float32 (jax 1.2)" in tables
    assert "| loss_d256_n4096: speed-up over eager | >= 3.5 |" in tables
    assert "100 GFLOP/s and 10.0 GB/s" in tables
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_marked(document, tables) == f"before\n{BEGIN}\n\n{tables}\n\n{END}\nafter\n"
    assert newest_lines(Path("benchmarks/results"))  # beside which lie estimates, no measurements
    with pytest.raises(InputError, match="has no lines"):
        replace_marked("nothing", tables)
    with pytest.raises(InputError, match="no results"):
        newest_lines(tmp_path / "empty")
    plot(line, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_sides_take_turns():
    sides = FakeSides()
    one = case(variants=(OURS, *TWIN))
    comparison.measure_case("loss", one, sides, CEILINGS)
    times = [
        variant
        for request, variant in (entry for entry in sides.log if len(entry) == 2)
        if request == "time"
    ]
    assert times == [OURS, EAGER, COMPILED] * ROUNDS
    alone = FakeSides(vs_torch=False)
    comparison.measure_case("loss", one, alone, CEILINGS)
    assert ("time", OURS) in alone.log
    assert ("time", EAGER) not in alone.log


def test_words():
    assert [seconds_words(s) for s in (2.0, 0.0123, 4.5e-5, 3e-9)] == [
        "2 s",
        "12.3 ms",
        "45 us",
        "3 ns",
    ]
    row = columns_of(dataclasses.asdict(measured(OURS, 0.5, None)))
    assert row[:5] == ["a", "ours", "500 ms", "1,000", "-"]
    points = [
        dataclasses.asdict(measured(OURS, s, 1, name=str(n), shape={"n": n}, sweep="n"))
        for n, s in ((8, 3.0), (2, 1.0))
    ]
    assert growth_words(points) == ["loss by n x4: x3"]


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", *args],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("module", ["benchmarks.run", "benchmarks.report", "benchmarks.tpu"])
def test_help(module):
    result = command(module, "--help")
    assert result.returncode == 0, result.stderr
    assert "--results" in result.stdout


def test_wrong_words_end_in_one_line(tmp_path):
    wrong = [
        ("benchmarks.run", "--out=results.txt"),
        ("benchmarks.report", f"--results={tmp_path}"),
        ("benchmarks.tpu", "--chips=v9"),
        ("benchmarks.tpu", "--cases=smal"),
    ]
    if importlib.util.find_spec("torch") is None:
        wrong.append(("benchmarks.run", "--vs-torch"))
    for args in wrong:
        result = command(*args)
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_data_suite_reads_what_it_wrote():
    small = SUITES["data"].cases("small", "float32")[0]
    affinity = os.sched_getaffinity(0)
    SUITES["data"].ours(small).run()
    assert os.sched_getaffinity(0) == affinity


def test_prepared_shards_hold_what_the_case_says(tmp_path, monkeypatch):
    (small,) = preparing.cases("small")
    made = [{"tokens": small.tokens - 9, "bytes": preparing.TEXT_BYTES}, {"tokens": 9, "bytes": 0}]
    preparing.check_counts(small, made)
    with pytest.raises(ValueError, match=f"{small.tokens - 9} tokens instead of {small.tokens}"):
        preparing.check_counts(small, made[:1])
    (corpus,) = list_files("embedded")
    texts = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    assert len(texts) == preparing.DOCUMENTS
    assert sum(len(text.encode()) for text in texts) == preparing.TEXT_BYTES
    ids = load_tokenizer("embedded").encode(texts)
    assert sum(len(i) + 1 for i in ids) == preparing.TOKENS  # and an end after each
    monkeypatch.setattr(preparing, "FILE", "none.jsonl")
    with pytest.raises(RuntimeError, match="does not exist"):
        preparing._prepare(small, tmp_path)


def test_memory_that_grows_with_the_texts_is_missed():
    few, many = (c for c in preparing.cases("cpu") if c.shape["processes"] == 2)
    for peak, is_met in ((104, True), (120, False)):
        measured = [
            measurement(one, OURS, [2.0], size, {}, CEILINGS)
            for one, size in ((few, 100), (many, peak))
        ]
        checks = preparing.checks(Found(measured))
        assert checks[-1].met is is_met
        assert comparison.exit_code(checks) == (not is_met)
    speeds = {check.name: check.measured for check in checks}
    assert speeds[f"{few.name}: MB/s"] == pytest.approx(2 * 1.817481 / 2.0)
    assert speeds[f"{few.name}: tokens/s, with the start"] == 437_047


@pytest.mark.skipif(not measure.STATUS.is_file(), reason="needs Linux's /proc")
def test_memory_of_the_processes_that_a_run_starts():
    memory = measure.TreeMemory()
    code = "a = bytearray(b'x') * (64 << 20); import time; time.sleep(0.3)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    subprocess.run([sys.executable, "-c", child], check=True)
    assert 60 << 20 < memory.peak() < 100 << 20


def test_a_case_may_be_timed_less_often():
    sides = FakeSides(vs_torch=False)
    (one,) = comparison.measure_case("data", case(rounds=2), sides, CEILINGS)
    assert len(one.all_seconds) == 2


def test_word_tokenizer():
    tokenizer = inputs.word_tokenizer(VOCAB)
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.mask_id == VOCAB - 1
    assert "w7" in tokenizer.decode(np.array([7, 8]))


def test_blocks_are_drawn_in_every_way_and_compared_with_whole_rows():
    cases = blocks.cases("small", "float32")
    assert [case.kind for case in cases] == list(blocks.KINDS)
    for case in cases:
        ids = blocks.ours(case).run()
        assert ids.shape == (1, 32)
        assert not np.any(np.asarray(ids) == 63)  # no mask is left
    large = blocks.cases("cpu", "float32")
    seconds = {"rows": 10.0, "uncached": 20.0, "prefix": 5.0, "causal": 2.5}
    found = [measurement(c, OURS, [seconds[c.kind]], 1, {}, CEILINGS) for c in large]
    checks = blocks.checks("cpu", Found(found))
    assert [check.measured for check in checks] == [0.5, 2.0, 4.0]
    assert [check.met for check in checks] == [None, None, False]
