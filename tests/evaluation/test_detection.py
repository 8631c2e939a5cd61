"""Marked texts, and figures of error detection: by hand and against scipy, pages, the command."""

import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from tiny_checkpoint import tiny_model, write_checkpoint

from gidd_jax import Gidd
from gidd_jax.errors import InputError
from gidd_jax.evaluation.corpora import CorpusRows
from gidd_jax.evaluation.detection import (
    JudgedText,
    auroc,
    auroc_estimate,
    calibration_of,
    detection_figures,
    judge_text,
    windows,
)
from gidd_jax.evaluation.planting import judged_rows, ordinary_ids, planted
from gidd_jax.evaluation.reports import finite
from gidd_jax.inference.samples import Suspicions
from gidd_jax.sampling.options import SuspicionOptions
from gidd_jax.views.marked import marked_page, percent, print_marked, suspicious

EVIL = '</mark><script>hit=1</script><img src="x" onerror=hit=1>'
JUDGED = JudgedText(
    ["It", " is", EVIL, " \x1b[2J", "\n", ""],
    np.float32([0.001, 0.2, 0.9, 0.6, 0.95, 0.5]),
    ["A", "\x1b", EVIL, ".", "\n", "a"],
    np.float32([0.0005, 0.1, 0.5, 0.25, 0.9, 0.4]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def model(folder) -> Gidd:
    return tiny_model(folder)


# Figures.


def test_auroc_is_that_of_the_rank_sum():
    rng = np.random.default_rng(0)
    wrong = rng.random(300) < 0.2
    scores = np.round(rng.normal(size=300) + wrong, 1)  # with ties
    pairs = stats.mannwhitneyu(scores[wrong], scores[~wrong]).statistic
    expected = pairs / (wrong.sum() * (~wrong).sum())
    np.testing.assert_allclose(auroc(scores, wrong), expected, rtol=1e-12)
    weights = rng.integers(0, 4, 300)
    repeated = auroc(np.repeat(scores, weights), np.repeat(wrong, weights))
    np.testing.assert_allclose(auroc(scores, wrong, weights), repeated, rtol=1e-12)
    assert auroc(np.array([0.1, 0.2, 0.2, 0.4]), np.array([False, True, False, True])) == 0.875
    assert np.isnan(auroc(scores, np.zeros(300, bool)))


def test_auroc_interval_covers_and_knows_documents():
    """Of 40 samples nearly all intervals hold the truth; tokens of one document are no evidence."""
    rng = np.random.default_rng(1)
    truth = stats.norm.cdf(1 / np.sqrt(2))
    held = 0
    for seed in range(40):
        wrong = rng.random(200) < 0.3
        scores = rng.normal(size=200) + wrong
        estimate = auroc_estimate(scores, wrong, np.arange(200), 200, seed)
        held += estimate.interval[0] <= truth <= estimate.interval[1]
    assert held >= 34
    copies = auroc_estimate(
        np.repeat(scores, 9), np.repeat(wrong, 9), np.repeat(np.arange(200), 9), 200, 39
    )
    np.testing.assert_allclose(copies.standard_error, estimate.standard_error, rtol=1e-9)
    assert auroc_estimate(scores, wrong, np.zeros(200, int), 200, 0).interval is None


def test_calibration_by_hand():
    scores = np.float32([0.05, 0.15, 0.95, 1.0, 0.25])
    wrong = np.array([False, True, True, True, False])
    got = calibration_of(scores, wrong, num_bins=5)
    np.testing.assert_array_equal(got.tokens, [2, 1, 2])
    np.testing.assert_allclose(got.suspicion, [0.1, 0.25, 0.975], rtol=1e-6)
    np.testing.assert_allclose(got.share_wrong, [0.5, 0, 1])
    np.testing.assert_allclose(got.error, (2 * 0.4 + 0.25 + 2 * 0.025) / 5, rtol=1e-6)
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    assert calibration_of(p, rng.random(20_000) < p).error < 0.02


def oracle_suspicion(clean: np.ndarray, score_of_wrong: float, proposal: int):
    """A stand-in for Gidd.suspicion that sees the original."""

    def suspicion(rows, *, batch_size, ends, options):
        assert not ends  # rows of a corpus hold what ends their texts
        wrong = np.where(rows.ids != clean, score_of_wrong, 0.125) * rows.free
        proposals = np.full(clean.shape, proposal)
        return Suspicions(rows.ids, [], rows.free, wrong, proposals, 0.5 * wrong, 1)

    return suspicion


def test_figures_of_a_detector_that_knows(model, monkeypatch):
    encoded = model.tokenizer.encode(["men want", "a wife", "truth"])
    rows = [np.concatenate([[0], ids, [0]]) for ids in encoded]
    corpus = CorpusRows(rows, np.array([0, 1, 1]), np.zeros(3), 2)
    clean = judged_rows(corpus, ordinary_ids(model), model.tokenizer.pad_id)
    np.testing.assert_array_equal(clean.free.sum(-1), [8, 6, 5])  # not the 0 at both ends
    a = int(model.tokenizer.encode(["a"])[0][0])
    monkeypatch.setattr(Gidd, "suspicion", staticmethod(oracle_suspicion(clean.ids, 0.875, a)))
    options = {"batch_size": 4, "num_resamples": 50, "seed": 0}
    got = detection_figures(model, corpus, 0.5, SuspicionOptions(), **options)
    json.dumps(got, allow_nan=False)
    assert (got["tokens"], got["auroc"], got["auroc_interval"]) == (19, 1.0, (1.0, 1.0))
    np.testing.assert_allclose(got["calibration_error"], 0.125)
    wrong = planted(clean, ordinary_ids(model), 0.5, 0).rows.ids != clean.ids
    np.testing.assert_allclose(got["share_wrong"], wrong.sum() / 19)
    np.testing.assert_allclose(got["restored"], np.mean(clean.ids[wrong] == a))


@pytest.mark.parametrize(
    ("share", "count", "null"), [(1e-9, 0, ["auroc", "restored"]), (1 - 1e-9, 19, ["auroc"])]
)
def test_shares_that_leave_no_wrong_or_no_right_token(model, share, count, null):
    ids = model.tokenizer.encode(["one line.", "two lines."])
    corpus = CorpusRows(ids, np.arange(2), np.zeros(2), 2)
    got = finite(
        detection_figures(
            model, corpus, share, SuspicionOptions(), batch_size=4, num_resamples=9, seed=0
        )
    )
    assert got["share_wrong"] == count / 19
    assert [name for name, value in got.items() if value is None] == [
        "auroc",
        "auroc_standard_error",
        "auroc_interval",
        *null[1:],
    ]
    note = f"{count} of 19 tokens are wrong: take another share, or more text"
    assert got["notes"] == dict.fromkeys(null, note)


# Long texts.


@pytest.mark.parametrize("num_tokens", [1, 6, 7, 8, 9, 25])
def test_windows_judge_every_token_near_their_middle(num_tokens):
    size = 7
    starts, owner = windows(num_tokens, size)
    position = np.arange(num_tokens)
    at = position - starts[owner]
    assert np.all((at >= 0) & (at < size))
    assert np.all(np.diff(owner) >= 0)
    inside = (position[:, None] >= starts) & (position[:, None] < starts + size)
    distance = np.where(inside, np.abs(position[:, None] + 0.5 - starts - size / 2), np.inf)
    chosen = np.take_along_axis(distance, owner[:, None], 1)[:, 0]
    np.testing.assert_array_equal(chosen, distance.min(-1))
    assert len(starts) == (1 if num_tokens <= size else len(np.unique(starts)))


def test_a_long_text_is_judged_token_by_token(model):
    text = "It is a truth universally acknowledged, that “men” want."
    got = judge_text(model, text, SuspicionOptions(), batch_size=4)
    ids = model.tokenizer.encode([text])[0]
    assert len(got.tokens) == len(got.wrong) == len(got.proposals) == len(ids) > 40
    assert "".join(got.tokens) == text
    assert np.all((got.wrong > 0) & (got.proposal_probs > 0))
    starts, owner = windows(len(ids), 15)
    for i in (0, 21, len(ids) - 1):
        start = starts[owner[i]]
        alone = model.suspicion([ids[start : start + 15]])
        np.testing.assert_allclose(got.wrong[i], alone.wrong[0, 1 + i - start], rtol=1e-4)
    with pytest.raises(InputError, match="the text is empty"):
        judge_text(model, "", SuspicionOptions(), batch_size=4)


def test_a_short_text_is_judged_as_one_that_ends(model):
    """With the token that ends it and padding, as in training; a text of ids alike."""
    assert model.row_mode == "padded"
    got = judge_text(model, "men", SuspicionOptions(), batch_size=4)
    alone = model.suspicion(["men"])
    np.testing.assert_array_equal(got.wrong, alone.wrong[0, 1:])
    np.testing.assert_array_equal(got.proposal_probs, alone.proposal_probs[0, 1:])
    endless = model.suspicion(["men"], ends=False)
    assert np.abs(endless.wrong - alone.wrong).max() > 1e-4
    # A row of a corpus ends where it says so.
    row = np.append(alone.ids[0], model.tokenizer.eos_id)
    rows = judged_rows(
        CorpusRows([row], np.zeros(1), np.zeros(1), 1), ordinary_ids(model), model.tokenizer.pad_id
    )
    ended = model.suspicion(rows, ends=False)
    np.testing.assert_array_equal(ended.wrong[0, 1:4], alone.wrong[0, 1:])


# What is shown.


class Page(HTMLParser):
    """Tags, and the text of the element with class=text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.marks: list[dict] = []
        self.text, self._inside = "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside |= ("class", "text") in attrs
        if tag == "mark" and self._inside:
            self.marks.append(dict(attrs))

    def handle_endtag(self, tag):
        self._inside &= tag != "div"

    def handle_data(self, data):
        self.text += data if self._inside else ""


def test_pages_hold_texts_as_texts():
    page = marked_page(JUDGED, 0.5, f"{EVIL} title")
    parsed = Page(page)
    assert not {"script", "img"} & {*parsed.tags}
    assert parsed.text == f"It is{EVIL} \\x1b[2J↵\n∅"
    assert [mark["id"] for mark in parsed.marks] == ["t2", "t3", "t4", "t5", "t6"]
    assert [mark.get("class") for mark in parsed.marks] == [None, *["sure"] * 4]
    assert parsed.marks[1]["title"] == f"wrong: 90%; rather “{EVIL}” (50%)"
    assert parsed.marks[1]["style"] == "--p:0.90"
    assert "4 of 6 tokens are wrong with probability 0.5 or more; 3.2 wrong ones" in page
    assert page.index('href="#t5"') < page.index('href="#t3"') < page.index('href="#t4"')
    assert 'href="#t2"' not in page
    assert "prefers-color-scheme: dark" in page
    assert "{{" not in page
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page


@pytest.mark.parametrize("kind", ["colours", "no colour", "no terminal"])
def test_marks_in_the_terminal(kind, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if kind == "no colour":
        monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    terminal = {"force_terminal": kind != "no terminal", "color_system": "auto", "width": 40}
    monkeypatch.setenv("TERM", "xterm-256color")
    print_marked(JUDGED, 0.5, Console(file=stream, **terminal))
    shown = stream.getvalue()
    assert "\x1b[2J" not in shown
    assert "4 of 6 tokens are wrong" in shown
    assert "  95%  token 5: “↵”, rather “↵” (90%)\n  90%  token 3: " in shown
    if kind == "colours":
        assert "\x1b[1;37;41m \\x1b[2J\x1b[0m" in shown
        assert "[ \\x1b[2J 60%]" not in shown
    else:
        assert "41m" not in shown
        assert f"It is[{EVIL} 90%][ \\x1b[2J 60%]" in shown


def test_lists_are_short_and_percentages_honest():
    wrong = np.linspace(1, 0, 200, dtype=np.float32)
    many = JudgedText(["a"] * 200, wrong, ["b"] * 200, wrong)
    assert suspicious(many, 0.9) == list(range(20))
    assert len(suspicious(many, 0.0)) == 50
    assert [percent(p) for p in (0, 0.004, 0.5, 0.994, 0.999, 1)] == [
        "0%",
        "<1%",
        "50%",
        "99%",
        ">99%",
        "100%",
    ]


# The command.


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, folder) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    write_checkpoint(workdir, folder)
    return workdir


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gidd_jax.highlight", *flags],
        capture_output=True,
        text=True,
        check=False,
        env={"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "HOME": "/nonexistent"},
    )


def test_the_command_marks_a_text(run_folder, model, tmp_path):
    file, page = tmp_path / "text.txt", tmp_path / "new" / "page.html"
    file.write_text("a single man\n</script>", "utf-8")
    done = command(
        f"--checkpoint={run_folder}", f"--text={file}", f"--out={page}", "--threshold=0.2"
    )
    assert done.returncode == 0, done.stderr
    judged = judge_text(model, file.read_text("utf-8"), SuspicionOptions(), 16)
    title = f"{file} judged by {run_folder}"
    assert page.read_text("utf-8") == marked_page(judged, 0.2, title)
    stream = io.StringIO()
    print_marked(judged, 0.2, Console(file=stream))
    assert done.stdout == f"{stream.getvalue()}wrote {page}\n"


def test_the_command_measures(run_folder, tmp_path):
    out = tmp_path / "found.json"
    done = command(
        f"--checkpoint={run_folder}",
        "--evaluate",
        "--corruption=0.2,0.5,1e-9",  # the last leaves nothing wrong: the others are kept
        "--bootstrap=20",
        f"--out={out}",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [one["corruption"] for one in report["figures"]] == [0.2, 0.5, 1e-9]
    assert report["documents"] == report["rows"] == 4
    assert (report["method"], report["t"]) == ("one_pass", 0.01)
    nothing, lines = report["figures"].pop(), done.stdout.splitlines()[2:]
    assert (nothing["auroc"], nothing["auroc_interval"], nothing["restored"]) == (None, None, None)
    assert lines[2].split()[4::2] == ["-", "-"]
    assert lines[3] == f"corruption 1e-09: auroc: {nothing['notes']['auroc']}"
    for one, line in zip(report["figures"], lines[:2], strict=True):
        low, high = one["auroc_interval"]
        assert 0 <= low <= one["auroc"] <= high <= 1
        assert sum(one["calibration"]["tokens"]) == one["tokens"]
        assert line.split()[:2] == [f"{one['corruption']:g}", str(one["tokens"])]
        assert f"{one['auroc']:.4f} ({low:.4f} to {high:.4f})" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "say what to do: --text=FILE marks a text, --evaluate measures"),
        (("--text=missing.txt",), "--text: no such file: missing.txt"),
        (("--text=a.txt", "--seed=1"), "--seed has no effect with --text: it belongs to --evalua"),
        (("--evaluate", "--corruption=0.1,2"), "--corruption must be numbers between 0 and 1"),
        (("--text=a.txt", "--t=1"), "t must lie in (0, 1): 1.0"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    done = command("--checkpoint=nowhere", *flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
