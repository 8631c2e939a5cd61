"""Evaluating on what is no prose: exported models without a frame, arrays beside texts."""

import numpy as np
import pytest
from tiny_checkpoint import tiny_model, write_checkpoint

from gidd_jax.data.preparation import prepare
from gidd_jax.evaluation.corpora import open_corpora, zero_shot_settings
from gidd_jax.evaluation.likelihoods import score_corpus
from gidd_jax.evaluation.reports import finite
from gidd_jax.inference.gidd import Gidd
from gidd_jax.sampling.options import EstimatorOptions

L = 8
UNFRAMED = {"data.frame": "none", "model.max_seq_len": L}


def opened(model, checkpoint, *paths):
    changes = {"max_documents": None, "text_key": None, "txt_documents": "line"}
    return open_corpora(model, str(checkpoint), ",".join(map(str, paths)), None, **changes)


def figures(model, corpus, **options):
    common = {"batch_size": 8, "seed": 0, "num_resamples": 10, "label": ""}
    return finite(score_corpus(model, corpus, EstimatorOptions(**options), **common)[0])


def test_an_exported_model_without_a_frame_is_scored_on_arrays(tmp_path):
    ids = np.random.default_rng(0).integers(0, 3, (4, L))
    np.save(tmp_path / "rows.npy", ids)
    trained = tiny_model(tmp_path, **UNFRAMED, **{"data.tokenizer": "ids:3"})
    trained.save_pretrained(tmp_path / "out")
    model = Gidd.from_pretrained(tmp_path / "out")
    ((_, _, corpus),) = opened(model, tmp_path / "out", tmp_path / "rows.npy")
    np.testing.assert_array_equal([corpus.ids[i] for i in range(4)], ids)
    found = figures(model, corpus, num_samples_t=1)
    assert (found["tokens"], found["bytes"]) == (4 * L, 0)
    assert found["bits_per_byte"] is None
    assert found["notes"]["bits_per_byte"] == "the scored tokens stand for no byte of text"


def test_an_exported_model_without_a_frame_is_scored_on_texts(tmp_path):
    """The figures of its run, which says how rows are cut."""
    (tmp_path / "dna.txt").write_text("GATTACAGATT\nACAGATTACAGAT\nTACA\n")
    (tmp_path / "dna.chars").write_text("ACGT")
    changes = UNFRAMED | {"data.tokenizer": f"chars:{tmp_path / 'dna.chars'}"}
    write_checkpoint(tmp_path / "run", tmp_path, **changes).save_pretrained(tmp_path / "out")
    found = []
    for folder in ("run", "out"):
        model = Gidd.from_pretrained(tmp_path / folder)
        ((_, _, corpus),) = opened(model, tmp_path / folder, tmp_path / "dna.txt")
        assert [len(corpus.ids[i]) for i in range(len(corpus.ids))] == [L] * 4
        found.append(figures(model, corpus, num_samples_t=1) | {"seconds": 0})
    assert found[0] == found[1]


def test_without_a_run_rows_are_cut_as_the_model_says_and_shards_as_they_are(tmp_path):
    for row_mode, expected in (
        ("none", ("none", "crop")),
        ("packed", ("ends", "packed")),
        ("padded", ("ends", "crop")),
        ("crop", ("ends", "crop")),
    ):
        found = zero_shot_settings(None, "embedded", row_mode)
        assert (found.frame, found.mode) == expected
    (tmp_path / "text.txt").write_text("1 2 3 0 1 2 3 0\n" * 4)
    for mode in ("padded", "none"):
        prepare(
            str(tmp_path / "text.txt"),
            "ids:4",
            tmp_path / mode,
            seq_len=L,
            mode=mode,
            validation="last:1",
            text_key="text",
            txt_documents="line",
            num_workers=1,
            shard_size=10,
        )
        assert zero_shot_settings(None, str(tmp_path / mode), "packed").row_mode == mode


@pytest.mark.parametrize(
    "options",
    [{"num_samples_t": 1}, {"estimator": "importance", "path_steps": 2, "num_paths": 1}],
    ids=["bound", "importance"],
)
def test_a_mixture_of_texts_and_arrays_has_no_bits_per_byte(tmp_path, options):
    """The nats of the arrays would stand above the bytes of the texts alone."""
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 3, (4, L)))
    (tmp_path / "text.txt").write_text("0 1 2 0 1 2 0 1\n" * 8)
    model = tiny_model(tmp_path, **UNFRAMED, **{"data.tokenizer": "ids:3"})
    path = f"1:{tmp_path / 'rows.npy'},1:{tmp_path / 'text.txt'}"
    run = {"data.tokenizer": "ids:3", "data.path": path, "data.validation": "last:2"}
    write_checkpoint(tmp_path / "run", tmp_path, **UNFRAMED, **run)
    ((_, _, corpus),) = opened(model, tmp_path / "run")
    assert len(corpus.ids) == 4
    found = figures(model, corpus, **options)
    (found,) = found.get("quantities", [found])[:1]
    assert found["bits_per_byte"] is None
    assert found["notes"]["bits_per_byte"] == (
        "some of the scored rows are arrays of ids, which stand for no byte of text"
    )
