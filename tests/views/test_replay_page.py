"""Replays: the page as data, as HTML and in a real browser where there is one; the command."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from small_traces import (
    B9C,
    B80,
    BOLD,
    DOT,
    E2,
    END,
    EVIL,
    EVIL_ID,
    MASKED,
    THE,
    TOKENS,
    small_trace,
)

from benchmarks import replay as benchmark
from gidd_jax.errors import InputError
from gidd_jax.sampling.trace import Trace, play, save_trace, shown
from gidd_jax.views.replay_page import Grid, page_data, parse_grid, replay_page, write_replay

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def trace() -> Trace:
    return small_trace()


# The page.


class Page(HTMLParser):
    """The tags of a page, and the content of its element with id=trace."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.trace, self.title, self._inside = "", "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [values[name] for name in ("src", "href") if name in values]
        self._inside = "trace" if values.get("id") == "trace" else tag

    def handle_data(self, data):
        if self._inside in ("trace", "title"):
            setattr(self, self._inside, getattr(self, self._inside) + data)

    def handle_endtag(self, tag):
        self._inside = ""


def test_no_text_becomes_markup(trace):
    page = replay_page(trace, f"{{{{trace}}}} {EVIL} &amp;")
    assert page.count("</script>") == 2  # the data and the program
    parsed = Page(page)
    assert parsed.tags.count("script") == 2
    assert parsed.tags.count("main") == parsed.tags.count("title") == 1
    assert "img" not in parsed.tags
    assert parsed.title == f"{{{{trace}}}} {EVIL} &amp;"
    data = json.loads(parsed.trace)
    assert data["tokens"] == TOKENS
    assert data["samples"][1]["text"] == f"{EVIL} text 1"


def test_nothing_is_fetched(trace):
    page = replay_page(trace, "title")
    assert Page(page).links == []
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(|innerHTML|outerHTML|document\.write", page)


def test_the_page_holds_the_changes(trace):
    data = page_data(trace)
    first, second = data["samples"]
    assert (data["mask"], data["special"]) == (MASKED, [END])
    assert first["start"] == [END, THE, MASKED, MASKED, MASKED, MASKED, DOT]
    assert first["given"] == [1]
    assert first["counts"] == [1, 3, 2, 1]
    assert first["positions"] == [2, 2, 3, 5, 4, 6, 2]
    assert first["tokens"] == [EVIL_ID, BOLD, E2, B9C, B80, THE, EVIL_ID]
    assert first["percents"] == [25] * 7
    assert second["counts"] == [1, 2, 2, 1]


def test_ids_become_indices_and_padding_is_left_out(trace):
    moved = trace.changes._replace(start=10 * trace.changes.start, token=10 * trace.changes.token)
    wide = trace._replace(
        changes=moved,
        token_ids=10 * trace.token_ids,
        mask_id=10 * MASKED,
        special_ids=np.int32([10 * END, 777]),
        lengths=np.int32([7, 7]),
    )
    assert page_data(wide) == page_data(trace)
    short = page_data(trace._replace(lengths=np.int32([7, 6])))["samples"][1]["start"]
    assert short == [END, DOT, DOT, THE, MASKED, BOLD]


def test_tokens_stand_in_a_grid_where_asked_for(trace):
    assert {"columns", "box"} & page_data(trace).keys() == set()
    data = page_data(trace, Grid(4, (2, 2)))
    assert (data["columns"], data["box"]) == (4, (2, 2))
    assert json.loads(Page(replay_page(trace, "t", Grid(4))).trace)["box"] is None
    assert data | page_data(trace) == data


def test_grids_are_parsed():
    assert parse_grid(9, "3x3") == Grid(9, (3, 3))
    assert parse_grid(6, None) == Grid(6)
    for box in ("3", "0x3", "3x7", "3x3x3", "x"):
        with pytest.raises(InputError, match=f"--box={box}: must be ROWSxCOLUMNS"):
            parse_grid(6, box)


def test_large_traces_make_small_files(tmp_path):
    """16 samples of 512 tokens in 256 calls."""
    trace = benchmark.large_trace()
    write_replay(tmp_path / "a" / "replay.html", trace, "large")
    save_trace(tmp_path / "trace.npz", trace)
    assert (tmp_path / "a" / "replay.html").stat().st_size < 600_000
    assert (tmp_path / "trace.npz").stat().st_size < 400_000
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["replay.html"]


# In a browser: a script goes through the page as a person would, and reports what is there. Time
# is the browser's virtual time, which paints no frames: timers stand for them.

DRIVER = """
<script>
(async () => {
  window.requestAnimationFrame = frame => setTimeout(() => frame(performance.now()), 16);
  const report = {errors: []}, wait = ms => new Promise(done => setTimeout(done, ms));
  addEventListener("error", event => report.errors.push(String(event.message)));
  const all = query => [...document.querySelectorAll(query)];
  const press = (key, more) => document.body.dispatchEvent(
    new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true, ...more}));
  const counter = () => document.getElementById("counter").textContent;
  const each = (query, read) => all(".text").map(p => [...p.querySelectorAll(query)].map(read));
  const texts = () => each("span", cell => cell.textContent);
  const strikes = () => each("s", strike => strike.textContent);
  const look = () => JSON.stringify([counter(), all(".counts").map(c => c.textContent),
    each(".text > *", n => [n.nodeName, n.textContent, n.className, n.style.background])]);
  const slider = document.getElementById("slider"), play = document.getElementById("play");
  const last = Number(slider.max);
  report.start = [counter(), play.textContent, all("article").length];

  report.texts = [];
  const pages = [];
  for (let call = 0; call <= last; call++) {
    report.texts.push(texts());
    pages.push(look());
    press("ArrowRight");
  }
  report.kinds = each("span", cell => cell.className)[1];
  report.counts = all(".counts").map(c => c.textContent);
  report.again = [];
  for (const call of [2, 0, 4, 1, 3]) {
    slider.value = call;
    slider.dispatchEvent(new Event("input"));
    report.again.push(look() === pages[call]);
  }
  press("End");
  const end = counter();
  press("ArrowLeft", {shiftKey: true});
  report.keys = [end, counter()];
  press("End"); report.strikes = strikes();
  press("k"); report.kept = strikes(); press("k");

  const background = () => getComputedStyle(document.body).backgroundColor;
  report.themes = [background()];
  for (let n = 0; n < 2; n++) { press("d"); report.themes.push(background()); }

  const clipboard = {writeText: async text => { report.copied = text; }};
  Object.defineProperty(navigator, "clipboard", {value: clipboard});
  all(".copy")[1].click();
  await wait(10);
  const cell = all(".text")[0].querySelectorAll("span")[2];
  cell.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  report.history = cell.title.split("\\n");

  press("Home"); press(" ");
  report.playing = play.textContent;
  for (let n = 0; n < 200 && counter() === `call 0 / ${last}`; n++) await wait(50);
  play.click();
  const paused = counter();
  await wait(5000);
  report.paused = [paused, counter(), play.textContent];
  press("+"); press("+"); press(" ");
  for (let n = 0; n < 400 && play.textContent === "Pause"; n++) await wait(50);
  report.played = [counter(), play.textContent];

  report.hit = [typeof hit, all("img").length];
  const node = document.createElement("pre");
  node.id = "report";
  node.textContent = JSON.stringify(report).replace(/[<>&\\ud800-\\udfff]/g,
    c => "\\\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  document.body.append(node);
})();
</script>
"""


def browse(browser: str, page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            "--enable-logging=stderr",
            "--virtual-time-budget=60000",
            *flags,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


@pytest.fixture(scope="module")
def report(browser, trace, tmp_path_factory) -> dict:
    """What the driver saw, in a browser that prefers dark pages."""
    folder = tmp_path_factory.mktemp("browser")
    page = folder / "replay.html"
    page.write_text(replay_page(trace, "title").replace("</body>", DRIVER + "</body>"), "utf-8")
    dark = "--blink-settings=preferredColorScheme=0"
    result = browse(browser, page, folder / "profile", dark)
    assert "CONSOLE" not in result.stderr
    found = re.search(r'<pre id="report">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(found[1])


def test_the_browser_shows_every_call(report, trace):
    assert report["errors"] == []
    assert report["start"] == ["call 0 / 4", "Play", 2]
    for sample in range(2):
        for call, ids in enumerate(play(trace.changes, sample).ids):
            texts = shown([TOKENS[token] for token in ids])
            want = ["" if token == MASKED else text for token, text in zip(ids, texts, strict=True)]
            assert report["texts"][call][sample] == want, (sample, call)
    assert report["texts"][3][0][3:6] == ["“", "", ""]  # three tokens, one character


def test_the_browser_tells_kinds_of_tokens_and_counts_changes(report):
    # END, given, drawn, noise, drawn in the last call, noise, drawn
    assert report["kinds"] == ["special", "given", "token", "noise", "token new", "noise", "token"]
    assert report["counts"] == [
        "0 masks · 1 noise replaced · 2 corrected",
        "0 masks · 1 noise replaced · 2 corrected",
    ]


def test_the_browser_seeks_to_the_same_from_either_side(report):
    assert report["again"] == [True] * 5
    assert report["keys"] == ["call 4 / 4", "call 0 / 4"]


def test_the_browser_strikes_through_what_was_replaced(report):
    assert report["strikes"] == [["<b>&amp;"], []]  # only what the last call replaced
    assert report["kept"] == [["<b>&amp;", "."], [" the"]]


def test_the_browser_breaks_rows_and_keeps_strikes_beside_their_tokens(browser, trace, tmp_path):
    """Rows of four, the second with three tokens; lines after two rows and columns."""
    report = """<script>
    document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "End", bubbles: true}));
    document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "k", bubbles: true}));
    const first = document.querySelector(".text"), node = document.createElement("pre");
    node.id = "report";
    node.textContent = JSON.stringify([getComputedStyle(first).display,
      [...first.children].map(slot => [slot.className, slot.querySelector("s")?.textContent ?? "",
        slot.offsetTop === first.children[0].offsetTop])]).replace(/[<>&]/g, "?");
    document.body.append(node);
    </script>"""
    page = tmp_path / "grid.html"
    text = replay_page(trace, "title", Grid(4, (1, 2))).replace("</body>", report + "</body>")
    page.write_text(text, "utf-8")
    result = browse(browser, page, tmp_path / "profile")
    found = re.search(r'<pre id="report">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stdout[-2000:] + result.stderr[-2000:]
    display, slots = json.loads(found[1])
    assert display == "grid"
    assert [is_first_row for *_, is_first_row in slots] == [True] * 4 + [False] * 3
    assert [strike for _, strike, _ in slots] == ["", "", "?b??amp;", "", "", "", "."]
    assert [names for names, *_ in slots] == [
        "slot top left rule-below",
        "slot top rule-below rule-right",
        "slot top rule-below",
        "slot top rule-below",
        "slot left",
        "slot rule-right",
        "slot",
    ]


def test_the_browser_plays_and_pauses(report):
    assert report["playing"] == "Pause"
    assert report["paused"] == ["call 1 / 4", "call 1 / 4", "Play"]
    assert report["played"] == ["call 4 / 4", "Play"]


def test_the_browser_copies_and_tells_the_history_of_a_token(report):
    assert report["copied"] == f"{EVIL} text 1"
    assert report["history"] == [
        "mask at first",
        f"call 1: {json.dumps(EVIL)}, 25 %",
        'call 2: "<b>&amp;", 25 %',
        f"call 4: {json.dumps(EVIL)}, 25 %",
    ]


def test_the_browser_runs_no_text(report):
    assert report["hit"] == ["undefined", 0]


def test_the_page_is_dark_where_dark_is_preferred_and_turns_light(report):
    assert report["themes"] == ["rgb(20, 20, 22)", "rgb(246, 246, 243)", "rgb(20, 20, 22)"]


# In the terminal.


@pytest.mark.slow
def test_the_benchmark_plays_every_frame_of_a_large_trace(browser):
    report = benchmark.play(browser)
    assert len(report["seeks"]) == 257
    assert len(report["frames"]) > 100


# The command.


def test_the_command_writes_the_page_of_a_trace(trace, tmp_path):
    save_trace(tmp_path / "trace.npz", trace)

    def replay(*flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "gidd_jax.replay", f"--trace={tmp_path / 'trace.npz'}", *flags],
            capture_output=True,
            text=True,
            check=False,
        )

    result = replay(f"--out={tmp_path / 'replay.html'}")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "replay.html").read_text("utf-8")
    assert page == replay_page(trace, str(tmp_path / "trace.npz"))
    result = replay(f"--out={tmp_path / 'grid.html'}", "--columns=4", "--box=2x2")
    assert result.returncode == 0, result.stderr
    data = json.loads(Page((tmp_path / "grid.html").read_text("utf-8")).trace)
    assert (data["columns"], data["box"]) == (4, [2, 2])
    for flags, message in (
        ([], "say what to do with the trace: --out=replay.html, --watch or both"),
        (["--out=page.htm"], "--out must end in .html"),
        (["--watch"], "--watch needs a terminal"),
        (["--watch", "--columns=3"], "--columns and --box are for the page"),
        (["--out=page.html", "--box=3x3"], "--box needs --columns"),
        (["--out=page.html", "--columns=0"], "--columns=0"),
    ):
        result = replay(*flags)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
