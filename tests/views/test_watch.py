"""Replays in the terminal."""

import io

import numpy as np
import pytest
from rich.console import Console
from small_traces import DOT, END, EVIL, MASKED, THE, make_trace, small_trace

from benchmarks import replay as benchmark
from gidd_jax.errors import InputError
from gidd_jax.sampling.trace import Trace, play
from gidd_jax.views.watch import MASK, check_terminal, watch, written


@pytest.fixture(scope="module")
def trace() -> Trace:
    return small_trace()


def test_the_terminal_plays_every_call_within_ten_seconds(trace):
    slept, output = [], io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, height=30)
    watch(trace, console, sleep=slept.append)
    assert slept == [2.0] * 5
    for call in range(5):
        assert f"call {call} / 4" in output.getvalue()
    assert "sample 1" in output.getvalue()
    assert "\x1b[2J" not in output.getvalue()  # what a token says


def test_a_narrow_terminal_shows_one_sample_and_skips_calls_of_long_traces():
    trace, slept, output = benchmark.large_trace(), [], io.StringIO()
    watch(trace, Console(file=output, force_terminal=True, width=80, height=4), slept.append)
    assert len(slept) == 129  # every other call, and the last
    assert sum(slept) == pytest.approx(10)
    assert "call 256 / 256" in output.getvalue()
    assert "sample 1" not in output.getvalue()


def test_the_terminal_is_left_by_an_interrupt(trace):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    watch(trace, Console(file=io.StringIO(), force_terminal=True, width=80), interrupt)


def test_texts_in_the_terminal(trace):
    played = play(trace.changes, 0)
    assert written(trace, 0, played, 0).plain == f"<end> the{4 * MASK}."
    assert written(trace, 0, played, 3).plain == "<end> the<b>&amp;“. the"
    text = written(trace, 0, played, 4)
    assert text.plain == f"<end> the<b>&amp;{EVIL}“ the"
    marks = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert marks["<b>&amp;"] == "red strike"
    assert marks[EVIL] == "not bold green"
    assert marks[" the"] == "not bold"  # of a call before
    other = written(trace, 1, play(trace.changes, 1), 4)
    assert other.plain.endswith(" the�<b>&amp; a\\x1b[2J")
    assert [str(span.style) for span in other.spans][1:4] == ["cyan", "not bold", "italic yellow"]


def test_confidence_in_the_terminal():
    probs = np.array([[[0, 0, 0.05, 0.3, 0.9]]])
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs).astype(np.float32)
    frames = [[[END, THE, DOT, DOT, DOT]]] * 40  # so that the first call is long ago
    trace = make_trace([[END, THE, MASKED, MASKED, MASKED]], frames, np.tile(log_probs, (40, 1, 1)))
    styles = [str(span.style) for span in written(trace, 0, play(trace.changes, 0), 40).spans]
    assert styles == ["italic yellow", "cyan", "dim", "not bold", "bold"]


def test_only_a_terminal_can_be_watched():
    with pytest.raises(InputError, match="--watch needs a terminal"):
        check_terminal(Console(file=io.StringIO()))
