"""Measure how smoothly a large replay plays in Chromium: 16 samples of 512 tokens in 256 calls.

Examples:
  python -m benchmarks.replay
  python -m benchmarks.replay --browser=google-chrome

Opens the page headless, plays it from the first call to the last at the speed that it starts with,
and then seeks to every call in turn. Prints the seconds until the page can be used, the time from
frame to frame while it plays, and the time of a seek with its layout. Exit code 1 where one frame
in a hundred takes more than 50 ms, which is what people see as stutter.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError, RunError
from gidd_jax.sampling.trace import Changes, Trace
from gidd_jax.views.replay_page import replay_page

flags = CommandFlags()
BROWSER = flags.DEFINE_string("browser", "chromium", "Program to open the page with.")
SAMPLES, LENGTH, CALLS = 16, 512, 256
STUTTER_MS = 50.0
LONGEST_S = 120
REPORT = re.compile("REPORT(.*)END")

DRIVER = """
<script>
(() => {
  const report = {ready: performance.now(), frames: [], seeks: []};
  const finish = () => {
    for (let call = 0; call <= last; call++) {
      const start = performance.now();
      show(call);
      document.body.offsetHeight;  // waits for the layout
      report.seeks.push(performance.now() - start);
    }
    console.log("REPORT" + JSON.stringify(report) + "END");
  };
  let before = null;
  const frame = now => {
    if (before !== null) report.frames.push(now - before);
    before = now;
    if (document.getElementById("play").textContent === "Pause") requestAnimationFrame(frame);
    else finish();
  };
  addEventListener("load", () => { seek(0); setPlaying(true); requestAnimationFrame(frame); });
})();
</script>
"""


def main(argv: list[str]) -> None:
    del argv
    browser = shutil.which(BROWSER.value)
    if browser is None:
        raise InputError(f"--browser={BROWSER.value}: there is no such program")
    report = play(browser)
    for name, words in (("frames", "from frame to frame"), ("seeks", "a seek with its layout")):
        times = np.array(report[name])
        print(
            f"{words}: median {np.median(times):.1f} ms, "
            f"99 % within {np.quantile(times, 0.99):.1f} ms, longest {times.max():.1f} ms"
        )
    print(f"ready after {report['ready'] / 1000:.2f} s")
    if np.quantile(report["frames"], 0.99) > STUTTER_MS:
        sys.exit(1)


def large_trace() -> Trace:
    """Return a trace of random tokens with about three changes a token, as hybrid noise makes."""
    rng = np.random.default_rng(0)
    count = 3 * SAMPLES * LENGTH
    shape = (SAMPLES, CALLS, LENGTH)
    place = np.sort(rng.integers(0, np.prod(shape), count))
    sample, call, position = np.unravel_index(place, shape)
    columns = (sample, call + 1, position, rng.integers(0, 4096, count))
    changes = Changes(
        np.full((SAMPLES, LENGTH), 1, np.int32),
        np.full(SAMPLES, CALLS, np.int32),
        *(column.astype(np.int32) for column in columns),
        np.log(rng.random(count)).astype(np.float32),
    )
    return Trace(
        changes=changes,
        given=np.zeros((SAMPLES, LENGTH), bool),
        lengths=np.full(SAMPLES, LENGTH, np.int32),
        texts=["word " * 400] * SAMPLES,
        token_ids=np.arange(4096, dtype=np.int32),
        token_texts=[f" word{n}" for n in range(4096)],
        mask_id=1,
        special_ids=np.int32([0]),
        tokenizer="f",
    )


def play(browser: str) -> dict:
    """Return `ready`, `frames` and `seeks` of the page in a browser, in ms."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder) / "replay.html"
        page.write_text(replay_page(large_trace(), "t").replace("</body>", DRIVER + "</body>"))
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder}/profile",
            "--enable-logging=stderr",
            page.as_uri(),
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            timer = threading.Timer(LONGEST_S, process.kill)
            timer.start()
            try:
                found = next(filter(None, map(REPORT.search, process.stderr)), None)
            finally:
                timer.cancel()
                process.kill()
    if found is None:
        raise RunError(f"the page did not play to its end within {LONGEST_S} s")
    return json.loads(found[1])


if __name__ == "__main__":
    run(main, flags)
