"""Sources: exact likelihoods of hidden Markov models, by counting every path and every row."""

import csv
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from ml_collections import ConfigDict

from gidd_jax import sweep
from gidd_jax.cli import config_folder, load_config
from gidd_jax.errors import InputError
from gidd_jax.evaluation import oracle, truth
from gidd_jax.evaluation.truth import Source, SourceSettings
from gidd_jax.inference.gidd import Gidd

VALUES = {"num_tokens": 3, "sharpness": 1.5, "seed": 5, "num_rows": 50, "num_samples": 4}
OTHERS = {"temperature": 1.0, "calls": (2,)}
HIDDEN = SourceSettings(num_states=2, **VALUES, **OTHERS)
CHAIN = SourceSettings(num_states=0, **VALUES, **OTHERS)


def every_row(length: int) -> np.ndarray:
    return np.array(list(itertools.product(range(3), repeat=length)))


def by_paths(source: Source, row: np.ndarray) -> float:
    """p(row) as the sum over every path of states."""
    start, moves = source.chain
    total = 0.0
    for path in itertools.product(range(len(start)), repeat=len(row)):
        p = start[path[0]]
        for a, b in itertools.pairwise(path):
            p *= moves[a, b]
        total += p * np.prod([source.emissions[s, v] for s, v in zip(path, row, strict=True)])
    return total


def test_likelihoods_are_sums_over_paths():
    source = truth.draw_source(HIDDEN)
    rows = every_row(4)
    found = np.exp(truth.log_prob(source, rows))
    np.testing.assert_allclose(found, [by_paths(source, row) for row in rows], rtol=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_a_chain_is_a_source_without_hidden_states():
    source, rows = truth.draw_source(CHAIN), every_row(5)
    np.testing.assert_allclose(
        truth.log_prob(source, rows), oracle.log_prob(source.chain, rows), rtol=1e-12
    )
    np.testing.assert_allclose(
        truth.bigram_law(source, 5), oracle.bigram_law(source.chain, 5), rtol=1e-12
    )


def test_masks_have_no_probability():
    rows = np.array([[0, 1, 3], [0, -1, 2], [0, 1, 2]])
    found = truth.log_prob(truth.draw_source(HIDDEN), rows)
    assert np.isneginf(found).tolist() == [True, True, False]


@pytest.mark.parametrize("settings", [HIDDEN, CHAIN], ids=["hidden", "chain"])
def test_rows_have_the_law_of_the_source(settings):
    source = truth.draw_source(settings)
    drawn, rows = truth.draw_rows(source, 40_000, 4, seed=1), every_row(4)
    law = np.exp(truth.log_prob(source, rows))
    counts = np.bincount(drawn @ (3 ** np.arange(4)[::-1]), minlength=len(rows)) / len(drawn)
    # Twice what as many exact draws differ by on average.
    assert oracle.total_variation(counts, law) < 2 * oracle.noise_floor(law, len(drawn))
    pairs = np.zeros((3, 3))
    for row, p in zip(rows, law, strict=True):
        for a, b in itertools.pairwise(row):
            pairs[a, b] += p / 3
    np.testing.assert_allclose(truth.bigram_law(source, 4), pairs, atol=1e-12)
    assert truth.bigrams(source, drawn) < 0.01
    assert truth.bigrams(source, np.full((10, 4), 3)) == pytest.approx(1.0)  # masks alone


def test_entropies_are_those_of_the_law():
    """Of the chain to the last digit, of the hidden one within its error."""
    for settings, digits in ((CHAIN, 1e-12), (HIDDEN, None)):
        source, rows = truth.draw_source(settings), every_row(5)
        log_p = truth.log_prob(source, rows)
        wanted = -np.sum(np.exp(log_p) * log_p) / 5
        found, error = truth.entropy(source, 5)
        assert abs(found - wanted) <= (digits if digits else 4 * error)
        assert (error > 0) == (settings is HIDDEN)


def test_the_file_of_another_source_is_refused(tmp_path):
    path = tmp_path / "source.npy"
    truth.write_data(CHAIN, 6, path)
    rows = np.load(path)
    assert (rows.shape, rows.dtype) == ((50, 6), np.int32)
    truth.write_data(CHAIN, 6, path)  # the same once more
    with pytest.raises(InputError, match="holds rows of another source: use another --workdir"):
        truth.write_data(HIDDEN, 6, path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_tokens", 1, "source.num_tokens = 1: must be in [2, 4096]"),
        ("calls", (0,), "source.calls = (0,): must be a tuple of numbers of network calls"),
        ("calls", 4, "source.calls = 4: must be a tuple"),
        ("num_tokens", 5000, "source.num_tokens = 5000: must be in [2, 4096]"),
        ("sharpness", 1000.0, "source.sharpness = 1000.0: must be in [0, 20]"),
        ("seeds", 1, "unknown config key source.seeds: did you mean seed"),
    ],
)
def test_illegal_values_are_named(tmp_path, key, value, message):
    shipped = load_config(str(config_folder() / "sweeps" / "chain.py") + ":hidden")
    config = ConfigDict({**shipped, "source": {**shipped.source.to_dict(), key: value}})
    with pytest.raises(InputError) as error:
        truth.open_source(config, tmp_path)
    assert message in str(error.value)


def test_what_the_source_sets_is_no_key_of_the_grid(tmp_path):
    config = load_config(str(config_folder() / "sweeps" / "chain.py"))
    config = ConfigDict({**config, "grid": {"data": {"path": ("a.npy", "b.npy")}}})
    with pytest.raises(InputError, match=r"grid: data\.path is the source's own: leave it out"):
        truth.open_source(config, tmp_path)


class Flag(NamedTuple):
    value: Any


def swept(monkeypatch, workdir: Path, law: str, grid: dict, **changes: Any) -> list[dict[str, Any]]:
    """Run the shipped sweep with changes of its keys; return the lines of its table."""
    config = load_config(str(config_folder() / "sweeps" / "chain.py") + f":{law}")
    for key, value in changes.items():
        section, name = key.split("__")
        part = config.source if section == "source" else config.base[section]
        part[name] = value
    config = ConfigDict({**config, "grid": grid})
    monkeypatch.setattr(sweep, "CONFIG", Flag(config))
    monkeypatch.setattr(sweep, "WORKDIR", Flag(str(workdir)))
    sweep.main(["sweep"])
    with (workdir / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


SMALL = {
    "model__hidden_size": 16,
    "model__num_layers": 1,
    "model__max_seq_len": 8,
    "data__validation": "last:16",
    "train__num_steps": 2,
    "train__batch_size": 8,
    "train__eval_batches": 1,
    "checkpoint__every": 2,
    "source__num_states": 2,
    "source__num_tokens": 4,
    "source__num_rows": 64,
    "source__num_samples": 6,
    "source__calls": (2, 3),
}


def test_a_sweep_on_a_source_is_judged_by_the_truth(tmp_path, monkeypatch, capsys):
    (line,) = swept(monkeypatch, tmp_path, "hidden", {"seed": (3,)}, **SMALL)
    source = truth.draw_source(
        SourceSettings(
            num_states=2,
            num_tokens=4,
            sharpness=1.5,
            seed=0,
            num_rows=64,
            num_samples=6,
            calls=(2, 3),
            temperature=1.0,
        )
    )
    entropy, _ = truth.entropy(source, 8)
    assert float(line["entropy"]) == pytest.approx(entropy, rel=1e-9)
    held_out = np.load(tmp_path / "source.npy")[-16:]
    own = -truth.log_prob(source, held_out).mean() / 8
    # After two steps the network is at the uniform law, log 4 a token, or near it.
    error = float(line["excess_standard_error"])
    assert float(line["excess"]) == pytest.approx(np.log(4) - own, abs=4 * error)
    model = Gidd.from_pretrained(tmp_path / "runs" / "seed=3")
    drawn = model.generate(6, num_steps=3, seed=3, batch_size=128).ids
    surprise = -truth.log_prob(source, drawn).mean() / 8 - entropy
    assert float(line["surprise_3"]) == pytest.approx(surprise, rel=1e-6)
    mended = model.correct(drawn, seed=3, batch_size=128, temperature=1.0).ids
    assert float(line["corrected_bigrams_3"]) == pytest.approx(truth.bigrams(source, mended))
    printed = capsys.readouterr().out
    assert f"entropy of the source: {entropy:.4f} nats per token" in printed
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_excess_of_a_network_of_enough_size_tends_to_0(tmp_path, monkeypatch):
    """The shipped chain, with masks alone and with a fifth of uniform noise."""
    grid = {"process": {"p_uniform": (0.0, 0.2)}, "seed": (0,)}
    lines = swept(monkeypatch, tmp_path, "chain", grid, source__calls=(64,))
    for line in lines:
        excess, error = float(line["excess"]), float(line["excess_standard_error"])
        assert -3 * error < excess < 0.03 + 3 * error
        # What is drawn is as probable as what was learnt from, to the excess and the steps.
        assert abs(float(line["surprise_64"])) < 0.1
