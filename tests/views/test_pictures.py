"""Pictures of runs: the numbers drawn are those measured, the files open, errors are one line."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from tiny_run import tiny_settings

from gidd_jax.checkpoints.workdir import open_workdir
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.process import HybridProcess, MaskedProcess
from gidd_jax.views import pictures

TRAIN = ("loss", "kl", "is_div", "elbo", "learning_rate", "grad_norm", "tokens_per_second")


def write_run(workdir: Path, name: str = "gidd", scale: float = 1.0) -> Path:
    """What a run of four reports and two validations leaves to read."""
    folder = workdir.parent / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    settings = tiny_settings(folder, name)
    open_workdir(workdir, settings, load_tokenizer(settings.data.tokenizer))
    rows = []
    for step in (10, 20, 30, 40):
        values = {f"train/{key}": scale * (i + 1) / step for i, key in enumerate(TRAIN)}
        rows.append({"step": step, **values})
        if step % 20 == 0:
            rows.append({"step": step, "eval/nelbo": 50 / step, "eval/bits_per_byte": 9 / step})
    rows[2]["train/grad_norm"] = None  # was not finite
    lines = [json.dumps(row) + "\n" for row in rows]
    (workdir / "metrics.jsonl").write_text("".join(lines) + '{"step": 5')  # killed while writing
    return workdir


def drawn(axis) -> dict[str, np.ndarray]:
    """The points [N, 2] of each line by its label."""
    return {line.get_label(): np.array(line.get_data(), float).T for line in axis.lines}


def logged(lines, key):
    points = [(line["step"], line[key]) for line in lines if key in line]
    return np.array([(s, np.nan if v is None else v) for s, v in points])


def test_curves_are_the_lines_of_the_metrics_file(tmp_path):
    runs = {
        name: pictures.read_metrics(write_run(tmp_path / name, scale=scale))
        for name, scale in (("a", 1.0), ("b", 3.0))
    }
    figure = pictures.training_curves(runs)
    for axis, (key, title, *_) in zip(figure.axes, pictures.PANELS, strict=True):
        assert axis.get_title() == title
        lines = drawn(axis)
        assert list(lines) == ["a", "b"]
        for name, metrics in runs.items():
            np.testing.assert_array_equal(lines[name], logged(metrics, key))
    assert {key for key, *_ in pictures.PANELS} == {
        *(f"train/{key}" for key in TRAIN),
        "eval/nelbo",
        "eval/bits_per_byte",
    }
    colours = {line.get_color() for line in figure.axes[0].lines}
    styles = {line.get_linestyle() for line in figure.axes[0].lines}
    assert len(colours) == len(styles) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_panel_without_numbers_says_so(tmp_path):
    figure = pictures.training_curves({"a": [{"step": 1, "train/loss": 2.0}]})
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert texts == [[]] + [["not logged"]] * 8


def test_the_loss_picture(tmp_path):
    run = write_run(tmp_path / "run")
    left, right = pictures.loss_picture(run).axes
    metrics = pictures.read_metrics(run)
    (loss,), (bits,) = drawn(left).values(), drawn(right).values()
    np.testing.assert_array_equal(loss, logged(metrics, "train/loss"))
    np.testing.assert_array_equal(bits, logged(metrics, "eval/bits_per_byte"))


def test_schedule_and_weights_of_the_process():
    """By the formulas of the paper (equations 9-11; section 4.4)."""
    vocab_size, p = 11, 0.2
    process = HybridProcess(vocab_size, 10, p)
    left, middle, right = (
        drawn(a) for a in pictures.process_picture(process, "dynamic", 0.0, 1.5).axes
    )
    t = left["signal"][:, 0].astype(np.float64)
    assert (t[0], t[-1]) == pytest.approx((1e-4, 1 - 1e-4), rel=1e-3)
    odds = 2 * p / (1 - p) * np.sqrt(t * (1 - t))
    expected = {"signal": 1 - t, "mask": t, "other tokens": odds}
    for name, values in expected.items():
        np.testing.assert_allclose(left[name][:, 1], values / (1 + odds), rtol=2e-3, atol=1e-6)
    middle_of_t = slice(100, 400)
    rate = (1 / (t * (1 - t)))[middle_of_t]
    np.testing.assert_allclose(middle["z is the mask"][middle_of_t, 1], rate, rtol=1e-4)
    np.testing.assert_allclose(middle["z is another token"][middle_of_t, 1], rate / 2, rtol=1e-4)
    odds_of_x = (odds / (vocab_size - 1))[middle_of_t]
    on_x = rate / 2 * odds_of_x / (1 - t[middle_of_t] + odds_of_x)
    np.testing.assert_allclose(middle["z = x"][middle_of_t, 1], on_x, rtol=1e-4)
    assert set(right["z is the mask"][:, 1]) == {1.5}  # 2, clipped
    assert set(right["z is another token"][:, 1]) == {1.0}
    noise_to_signal = ((t + odds) / (1 - t))[middle_of_t]
    dynamic = 2 * p / (1 - p) / (vocab_size - 1) * np.sqrt(noise_to_signal)
    np.testing.assert_allclose(right["z = x"][middle_of_t, 1], dynamic, rtol=1e-4)


def test_weights_of_zero_are_not_drawn_on_the_logarithmic_axis():
    axis = pictures.process_picture(MaskedProcess(5, 0), "elbo", 0.0, 2.0).axes[1]
    assert np.isnan(drawn(axis)["z = x"][:, 1]).all()
    assert np.isfinite(drawn(axis)["z is the mask"][:, 1]).all()


def test_the_profile_over_t():
    profile = {"edges": [0.0, 0.25, 0.5, 1.0], "integrand": [3.0, None, 1.0], "tokens": [1, 0, 1]}
    figure = pictures.profile_picture({"wiki": profile})
    (stairs,) = figure.axes[0].patches
    values, edges, _ = stairs.get_data()
    np.testing.assert_array_equal(values, [3.0, np.nan, 1.0])
    np.testing.assert_array_equal(edges, profile["edges"])


def report(entropy: float, ppl: float) -> dict:
    return {
        "token_entropy": entropy,
        "token_entropy_interval": [entropy - 0.1, entropy + 0.2],
        "gen_ppl": ppl,
        "gen_ppl_interval": None,
    }


def test_the_frontier_joins_what_nothing_beats():
    reports = {"a": report(5, 90), "b": report(4, 40), "c": report(4.5, 95), "d": report(3, 50)}
    figure = pictures.frontier_picture(reports)
    (axis,) = figure.axes
    points = {container.get_label(): container for container in axis.containers}
    for name, one in reports.items():
        line, _, bars = points[name]
        np.testing.assert_array_equal(line.get_xydata(), [[one["token_entropy"], one["gen_ppl"]]])
        (segment,) = bars[0].get_segments()
        assert list(segment[:, 0]) == pytest.approx(one["token_entropy_interval"])
    np.testing.assert_array_equal(drawn(axis)["frontier"], [[5, 90], [4, 40]])
    assert axis.get_yscale() == "log"


DETECTION = {
    "corruption": 0.1,
    "calibration_error": 0.05,
    "calibration": {"suspicion": [0.1, 0.6], "share_wrong": [0.2, 0.9], "tokens": [50, 5]},
}


def test_the_calibration():
    (axis,) = pictures.calibration_picture([DETECTION]).axes
    points = drawn(axis)["10% replaced (error 0.050)"]
    np.testing.assert_array_equal(points, [[0.1, 0.2], [0.6, 0.9]])


def plot(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gidd_jax.plots", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_writes_files_that_open(tmp_path):
    run, ar = write_run(tmp_path / "run"), write_run(tmp_path / "ar", "ar")
    evaluation = tmp_path / "evaluation.json"
    profile = {"edges": [0.0, 0.5, 1.0], "integrand": [2.0, 1.0], "tokens": [1, 1]}
    corpus = {"data": "wiki", "split": "test", "profile": profile}
    evaluation.write_text(json.dumps({"corpora": [{"data": "exact", "split": "test"}, corpus]}))
    files = []
    for name, one in (("cold", report(4, 40)), ("hot", report(5, 90))):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(one))
    detection = tmp_path / "found.json"
    detection.write_text(json.dumps({"figures": [DETECTION]}))
    result = plot(
        f"--workdir={run}",
        f"--calibration={detection}",
        f"--compare={run},{ar}",
        f"--evaluation={evaluation}",
        f"--frontier={files[0]},{files[1]}",
    )
    assert result.returncode == 0, result.stderr
    out = run / "plots"
    names = ("training", "process", "compare", "profile", "frontier", "calibration")
    written = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {file.name for file in out.iterdir()} == written
    for name in names:
        assert image.imread(out / f"{name}.png").std() > 0.01  # something is drawn
        assert ET.parse(out / f"{name}.svg").getroot().tag.endswith("}svg")
        assert f"wrote {out / name}.svg" in result.stdout


def test_an_autoregressive_run_has_no_process_to_draw(tmp_path):
    assert list(pictures.run_pictures(write_run(tmp_path / "ar", "ar"))) == ["training"]


def test_the_same_figures_make_the_same_files(tmp_path):
    metrics = pictures.read_metrics(write_run(tmp_path / "run"))
    for folder in ("one", "two"):
        pictures.save_figures({"x": pictures.training_curves({"run": metrics})}, tmp_path / folder)
    for kind in ("png", "svg"):
        one, two = (tmp_path / folder / f"x.{kind}" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == 2  # no half files


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to draw: give one or more of --workdir, --compare"),
        ({"compare": "a,b"}, "--out is required without --workdir"),
        ({"workdir": "nowhere"}, "nowhere holds no metrics.jsonl"),
        ({"workdir": "fresh"}, "metrics.jsonl is empty"),
        ({"workdir": "bare"}, "bare holds no config.json"),
        ({"evaluation": "no.json", "out": "o"}, "no such file: no.json"),
        ({"evaluation": "bad.json", "out": "o"}, "bad.json cannot be read as JSON"),
        ({"evaluation": "list.json", "out": "o"}, "list.json is no report"),
        ({"evaluation": "empty.json", "out": "o"}, "empty.json holds no profile over t"),
        ({"frontier": "empty.json", "out": "o"}, "empty.json holds no gen_ppl"),
        ({"calibration": "empty.json", "out": "o"}, "empty.json holds no figures"),
        ({"workdir": "bare", "out": "bad.json"}, "--out=bad.json is a file"),
    ],
)
def test_bad_input_is_named(call_plots, tmp_path, values, message):
    for name, text in {"bad": "{", "list": "[]", "empty": "{}"}.items():
        (tmp_path / f"{name}.json").write_text(text)
    for name, text in {"fresh": "", "bare": '{"step": 1, "train/loss": 2.0}\n'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        call_plots(**values)
    assert not (tmp_path / "o").exists()


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    result = plot(f"--workdir={tmp_path}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
