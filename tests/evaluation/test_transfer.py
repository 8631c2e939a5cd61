"""The coordinate check: flat under CompleteP, growing without it or with a rule of it broken."""

import json
import subprocess
import sys

import numpy as np
import pytest

from gidd_jax.evaluation import transfer
from gidd_jax.evaluation.reports import load_transfer, write_report
from gidd_jax.evaluation.transfer import Sizes
from gidd_jax.training import optimizer
from gidd_jax.views.transfer_picture import transfer_picture


def made(parametrization, by_width, by_depth=0.0, start_by_depth=0.0):
    """Sizes of all networks that are powers of width and depth, 3 and 5 in the smallest."""
    sizes = []
    for width, depth in transfer.networks():
        by = (width / 64) ** by_width * (depth / 2) ** by_depth
        start = (width / 64) ** by_width * (depth / 2) ** start_by_depth
        sizes.append(
            Sizes(parametrization, width, depth, [1.0, 3 * start], [1.0, 3 * by], 0.0, 5 * by)
        )
    return sizes


def test_networks_share_the_smallest():
    assert transfer.networks() == [
        (64, 2), (128, 2), (256, 2), (512, 2), (64, 4), (64, 8), (64, 16)
    ]  # fmt: skip


def test_growths_are_those_of_the_figures():
    found = transfer.growths(made("standard", 1.0, by_depth=0.5, start_by_depth=-1.0))
    assert [(one.axis, one.part, one.word) for one in found] == [
        ("width", "block", "grows"),
        ("width", "block_change", "grows"),
        ("width", "logits_change", "grows"),
        ("depth", "block", "falls"),
        ("depth", "block_change", "grows"),
        ("depth", "logits_change", "grows"),
    ]
    np.testing.assert_allclose([one.ratio for one in found], [8, 8, 8, 1 / 8, 8**0.5, 8**0.5])
    assert not transfer.transfers(found)


@pytest.mark.parametrize(
    ("by_width", "by_depth", "start", "keeps"),
    [
        (0.3, -0.3, -0.5, True),  # a factor of 1.9; activations at the start may fall
        (0.3, 0.0, 0.5, False),  # but not grow
        (0.4, 0.0, 0.0, False),
        (0.0, 0.4, 0.0, False),
        (-0.4, 0.0, 0.0, False),  # changes may not even fall: a larger network learns less
    ],
)
def test_a_rate_keeps_where_changes_are_flat(by_width, by_depth, start, keeps):
    assert (
        transfer.transfers(transfer.growths(made("completep", by_width, by_depth, start))) == keeps
    )


def test_flat_is_of_all_networks_not_of_the_two_ends():
    sizes = made("completep", 0.0)
    sizes[1] = sizes[1]._replace(logits_change=11.0)
    found = {one.part: one for one in transfer.growths(sizes) if one.axis == "width"}
    assert (found["logits_change"].ratio, found["logits_change"].spread) == (1.0, 2.2)
    assert found["logits_change"].word != "flat"


@pytest.fixture(scope="module")
def changes():
    """Changes of last block and logits by four updates, of width 64 and of 256."""

    def of(name, width):
        one = transfer.measure(name, width, 2, num_updates=4)
        assert (len(one.blocks), len(one.block_changes)) == (2, 2)
        return np.array([one.block_changes[-1], one.logits_change])

    found = {name: (of(name, 64), of(name, 256)) for name in transfer.RATES}
    with pytest.MonkeyPatch.context() as patch:
        groups = optimizer.completep_groups
        patch.setattr(  # a matrix moves by the same whatever the width
            optimizer, "completep_groups", lambda settings, width: groups(settings, 64)
        )
        found["broken"] = (found["completep"][0], of("completep", 256))
    return {name: wide / narrow for name, (narrow, wide) in found.items()}


def test_changes_are_flat_under_completep_alone(changes):
    assert np.all(np.abs(np.log2(changes["completep"])) < 0.6)
    assert changes["standard"][0] > 8
    assert changes["broken"][0] > 3


def test_the_picture_shows_what_was_measured(call_plots, tmp_path):
    sizes = made("completep", 0.0) + made("standard", 1.0)
    report = json.loads(json.dumps(transfer.report(sizes)))
    lines = list(transfer.verdict(report))
    assert lines[0] == "completep: the learning rate keeps"
    assert "standard: the learning rate does not keep" in lines
    assert "  grows  x 8      with width: change of the logits" in lines
    assert transfer.line(sizes[3]).split() == ["completep", "512", "2", "3", "3", "0", "5"]
    axes = transfer_picture(report).axes
    assert len(axes) == 6
    widths, values = axes[2].lines[1].get_data()
    np.testing.assert_allclose(widths, [64, 128, 256, 512])
    np.testing.assert_allclose(values, [3, 6, 12, 24])
    file = tmp_path / "transfer.json"
    write_report(file, report)
    assert load_transfer(str(file)) == report
    call_plots(transfer=file, out=tmp_path)
    assert {"transfer.png", "transfer.svg"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--transfer", "--sampler"), "--transfer stands alone"),
        (("--transfer", "--process=masked"), "--transfer stands alone"),
        (("--transfer", "--out=sizes.png"), "--out must end in .json"),
        (("--out=sizes.json",), "--out belongs to --sampler and --transfer"),
    ],
)
def test_bad_flags_are_one_line(arguments, message):
    command = [sys.executable, "-m", "gidd_jax.check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
