"""Kill -9 at random moments, again and again: `make torture`."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import (
    assert_same_arrays,
    environment,
    figures_by_step,
    saved_arrays,
    steps_on_disk,
    tiny_config,
)

ROUNDS = 20
EVERY = 3  # steps between checkpoints
CHANGES = {
    "train.num_steps": 400,
    "checkpoint.every": EVERY,
    "data.mode": "crop",
    "optimizer.ema_decay": 0.9,
}


def start(folder: Path, workdir: Path) -> subprocess.Popen[bytes]:
    flags = [f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
    return subprocess.Popen(
        [sys.executable, "-m", "gidd_jax.train", *flags],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("ab"),
    )


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """No kill loses more than the steps since the last checkpoint, or changes a number."""
    values = tiny_config(tmp_path, **CHANGES).to_json()
    (tmp_path / "config.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({values!r}))\n"
    )
    assert start(tmp_path, tmp_path / "whole").wait() == 0
    workdir, rng, seen = tmp_path / "killed", random.Random(0), []
    for _ in range(ROUNDS):
        running = start(tmp_path, workdir)
        # Half of the kills at any time, importing included; half soon after a step was reported.
        metrics = workdir / "metrics.jsonl"
        before, since = metrics.stat().st_size if metrics.exists() else 0, time.monotonic()
        if rng.random() < 0.5:
            while running.poll() is None and time.monotonic() - since < 60:
                if metrics.exists() and metrics.stat().st_size > before:
                    break
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(0, 10))
        running.kill()
        running.wait()
        saved = steps_on_disk(workdir) if (workdir / "checkpoints").is_dir() else []
        reported = max(figures_by_step(workdir), default=0) if metrics.exists() else 0
        last = saved[-1] if saved else 0
        # A save is asynchronous: the one before it is complete when it starts.
        assert reported - last <= 2 * EVERY, (reported, saved)
        assert not seen or last >= seen[-1], "a complete checkpoint was lost"
        seen.append(last)
    assert start(tmp_path, workdir).wait() == 0
    print(f"{ROUNDS} kills; newest checkpoint after each: {seen}")
    assert_same_arrays(saved_arrays(workdir), saved_arrays(tmp_path / "whole"))
    assert figures_by_step(workdir) == figures_by_step(tmp_path / "whole")
