"""Reports: what is not finite becomes null with a note, and no figure has hundreds of digits."""

import json
import math

import numpy as np
import pytest

from gidd_jax.errors import InputError
from gidd_jax.evaluation.reports import finite, labels, table, write_csv, write_report, written
from gidd_jax.evaluation.tables import comparisons_table
from gidd_jax.evaluation.text_metrics import ratio_estimate
from gidd_jax.likelihood import perplexity


def test_what_is_not_finite_is_null_with_a_note(tmp_path):
    report = {
        "good": 1.5,
        "bits": math.nan,
        "interval": (0.5, math.inf),
        "name": "nan",
        "none": None,
        "corpora": [{"bound": math.inf, "tokens": 3, "notes": {"bound": "known cause"}}],
    }
    expected = {
        "good": 1.5,
        "bits": None,
        "interval": [0.5, None],
        "name": "nan",
        "none": None,
        "corpora": [{"bound": None, "tokens": 3, "notes": {"bound": "known cause"}}],
        "notes": {"bits": "not a finite number: nan", "interval": "not a finite number: inf"},
    }
    assert finite(report) == expected
    assert finite(expected) == expected
    write_report(tmp_path / "new" / "report.json", report)
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == expected


def test_figures_as_people_read_them():
    assert written(12.34567, 4) == "12.3457"
    assert written(1e300, 2) == "1e+300"
    assert [written(value, 2) for value in (None, math.nan, math.inf)] == ["-"] * 3
    assert [written(value, 2, "+") for value in (0.5, -0.5, 2e6)] == ["+0.50", "-0.50", "+2e+06"]


def test_a_comparison_without_a_difference_has_a_dash():
    """As where one of two models gives no probability to a token: all is scored by then."""
    none = {"difference": math.nan, "difference_standard_error": None, "share_better": 0.5}
    results = [
        {"data": "a", "against": none | {"difference_interval": None}},
        {"data": "b", "against": none | {"difference_interval": (math.nan, math.nan)}},
        {"data": "c", "against": none | {"difference": 1.5, "difference_interval": (-0.5, 2.5)}},
    ]
    shown = comparisons_table([finite(result) for result in results], "OTHER").splitlines()[2:]
    assert [line.split() for line in shown] == [
        ["a", "-", "-", "-", "50%"],
        ["b", "-", "-", "-", "50%"],
        ["c", "+1.5000", "-", "-0.5000", "to", "+2.5000", "50%"],
    ]


def test_labels_tell_paths_apart():
    assert labels(["x/a", "x/b.json"]) == ["a", "b"]
    three = ["x/run.v1", "y/run.v1", "y/run.v2"]
    assert labels([f"runs/{path}" for path in three]) == three
    with pytest.raises(InputError, match="name each only once"):
        labels(["x/a", "x/../x/a", "x/a"])


def test_tables_and_csv_hold_every_cell(tmp_path):
    lines = [["name", "n", "figure"], ["a", "10", "-"]]
    assert table(lines, num_names=1).splitlines() == ["name   n  figure", "a     10       -"]
    assert table(lines).splitlines()[1] == "   a  10       -"
    write_csv(tmp_path / "new" / "a.csv", [{"text": 0, "bits": 1.5}, {"text": 'a,"b', "more": 2}])
    assert (tmp_path / "new" / "a.csv").read_text() == 'text,bits,more\n0,1.5,\n"a,""b",,2\n'


def test_a_perplexity_beyond_floats_is_infinite():
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(709.0) == math.exp(709.0)
    assert perplexity(710.0) == perplexity(math.inf) == math.inf


@pytest.mark.filterwarnings("error")
def test_a_ratio_to_nothing_has_no_error():
    found = ratio_estimate(np.ones(3), np.zeros(3), 50, seed=0)
    assert math.isnan(found.value)
    assert found[1:] == (None, None)
    infinite = ratio_estimate(np.array([1.0, math.inf]), np.ones(2), 50, seed=0)
    assert infinite == (math.inf, None, None)
    same = ratio_estimate(np.full(4, 2.0), np.ones(4), 50, seed=0)
    assert same == (2.0, 0.0, (2.0, 2.0))
