"""Evaluating checkpoints: rows of corpora, figures against direct sums."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import tiny_model
from tiny_run import SENTENCE, tiny_settings, write_corpus

from gidd_jax import likelihood
from gidd_jax.data.pipeline import validation_batches
from gidd_jax.data.preparation import prepare
from gidd_jax.errors import InputError
from gidd_jax.evaluation import corpora, scoring
from gidd_jax.evaluation.reports import finite
from gidd_jax.evaluation.tables import bounds_table
from gidd_jax.inference.gidd import Gidd


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder of the tiny run's corpus and tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    tiny_settings(folder)
    return folder


@pytest.fixture(scope="module")
def model(data) -> Gidd:
    model = tiny_model(data)
    return dataclasses.replace(model, params=jax.tree.map(lambda a: a / 3, model.params))


@pytest.fixture(scope="module")
def baseline(data) -> Gidd:
    return tiny_model(data, "ar")


def rows_of(corpus) -> list[list[int]]:
    return [np.asarray(corpus.ids[i]).tolist() for i in range(len(corpus.documents))]


def score(model, corpus, **changes):
    options = {"num_samples_t": 2, "batch_size": 8, "seed": 0, "label": ""} | changes
    return scoring.score_rows(model, corpus, **options)


def test_own_rows_are_those_of_training(data, model):
    """Every mode: the same rows and bytes as the validation during training."""
    for mode in ("padded", "crop", "packed"):
        settings = tiny_settings(data, **{"data.mode": mode}).data
        corpus = corpora.open_rows(settings, "validation", model, is_own=True)
        batches = validation_batches(settings, model.tokenizer, 16, 4)
        theirs = [
            row[keep] for b in batches for row, keep in zip(b["tokens"], b["mask"], strict=True)
        ]
        assert sorted(rows_of(corpus)) == sorted(r.tolist() for r in theirs if len(r))
        assert corpus.num_bytes.sum() == batches.num_bytes
        assert corpus.num_documents == 4


def test_zero_shot_windows_drop_nothing(data, model):
    """All documents, whole, even for a run that trains on their beginnings alone."""
    run = tiny_settings(data).data
    settings = corpora.zero_shot_settings(run, str(data / "corpus.txt"))
    assert (run.mode, settings.mode) == ("padded", "crop")
    corpus = corpora.open_rows(settings, "validation", model, is_own=False)
    assert corpus.num_documents == 24
    rows = rows_of(corpus)
    for number, document in enumerate(model.tokenizer.encode([SENTENCE.format(3, 21)]), start=3):
        framed = [0, *document, 0]
        own = [row for row, n in zip(rows, corpus.documents, strict=True) if n == number]
        assert [i for row in own[:-1] for i in row] == framed[: 16 * (len(own) - 1)]
        assert own[-1] == framed[-16:]
    packed = dataclasses.replace(run, mode="packed")
    assert corpora.zero_shot_settings(packed, "embedded").mode == "packed"
    assert corpora.zero_shot_settings(None, "embedded").mode == "crop"


@pytest.fixture(scope="module")
def shard_folder(data, tmp_path_factory) -> Path:
    """Shards of other texts than the corpus."""
    folder = tmp_path_factory.mktemp("shards")
    prepare(
        str(write_corpus(folder, "other.txt", lines=40)),
        str(data / "tokenizer"),
        folder / "out",
        seq_len=16,
        mode="padded",
        validation="last:9",
        text_key="text",
        txt_documents="line",
        num_workers=1,
        shard_size=50,
    )
    return folder / "out"


def open_parts(data, shard_folder, model, **options) -> list[corpora.CorpusRows]:
    """The rows of a mixture of two texts and shards, and of the texts and the shards alone."""
    corpus = data / "corpus.txt"
    texts = f"0.5:{corpus},0.2:{write_corpus(shard_folder.parent, 'more.txt', 30)}"
    mixture = f"0.3:{shard_folder},{texts}"
    return [
        corpora.open_rows(
            dataclasses.replace(tiny_settings(data).data, path=str(path)),
            "validation",
            model,
            is_own=True,
            **options,
        )
        for path in (mixture, texts, shard_folder)
    ]


def test_rows_of_a_mixture_with_shards(data, model, shard_folder):
    mixed, *alone = open_parts(data, shard_folder, model)
    assert [part.num_documents for part in alone] == [8, 9]
    assert mixed.num_documents == 17
    assert len(mixed.ids) == 17
    assert rows_of(mixed) == [row for part in alone for row in rows_of(part)]
    np.testing.assert_array_equal(mixed.documents, np.arange(17))
    np.testing.assert_array_equal(mixed.num_bytes, np.concatenate([p.num_bytes for p in alone]))
    for count in (1, 5, 16):
        some = open_parts(data, shard_folder, model, max_documents=count)[0]
        assert some.num_documents == len(some.ids) == count
        np.testing.assert_array_equal(some.documents, np.arange(count))
        kept = np.sort(np.random.default_rng(0).permutation(17)[:count])
        assert rows_of(some) == [rows_of(mixed)[i] for i in kept]
    settings = tiny_settings(data, **{"data.path": f"1:{shard_folder},1:{data / 'corpus.txt'}"})
    with pytest.raises(InputError, match=r"of the shards in .*out only the validation split"):
        corpora.open_rows(settings.data, "train", model, is_own=True)


def test_figures_of_a_mixture_are_those_of_its_parts(data, baseline, shard_folder):
    """Weighted by tokens and by bytes; the baseline is exact, and draws nothing."""
    parts = open_parts(data, shard_folder, baseline)
    mixed, *alone = [
        scoring.corpus_figures(None, part, score(baseline, part), num_resamples=10, seed=0)
        for part in parts
    ]
    for key in ("tokens", "bytes", "rows", "documents"):
        assert mixed[key] == sum(part[key] for part in alone)
    nats = sum(part["nelbo"] * part["tokens"] for part in alone)
    assert mixed["nelbo"] == pytest.approx(nats / mixed["tokens"], rel=1e-6)
    bits = sum(part["bits_per_byte"] * part["bytes"] for part in alone)
    assert mixed["bits_per_byte"] == pytest.approx(bits / mixed["bytes"], rel=1e-6)
    assert alone[0]["nelbo"] != pytest.approx(alone[1]["nelbo"], rel=1e-4)


@pytest.mark.parametrize("mode", ["packed", "crop"])
def test_rows_of_shards_are_not_counted_as_documents(data, baseline, tmp_path, mode):
    """Of one document many rows are cut, and nothing in the shards says which."""
    prepare(
        str(write_corpus(tmp_path, "corpus.txt", lines=40)),
        str(data / "tokenizer"),
        tmp_path / "out",
        seq_len=16,
        mode=mode,
        validation="last:1",
        text_key="text",
        txt_documents="line",
        num_workers=1,
        shard_size=50,
    )
    settings = tiny_settings(data, **{"data.path": str(tmp_path / "out"), "data.mode": mode}).data
    corpus = corpora.open_rows(settings, "validation", baseline, is_own=True)
    found = scoring.corpus_figures(None, corpus, score(baseline, corpus), num_resamples=10, seed=0)
    assert (found["documents"], found["rows"]) == (None, 6)
    assert found["notes"]["documents"].endswith("the bootstrap is over rows")
    assert found["nelbo_standard_error"] > 0
    line = bounds_table([finite({"data": "shards", **found})]).splitlines()[1]
    assert line.split()[:3] == ["shards", "exact", "-"]
    mixed = dataclasses.replace(settings, path=f"1:{tmp_path / 'out'},1:{tmp_path / 'corpus.txt'}")
    assert corpora.open_rows(mixed, "validation", baseline, is_own=True).num_documents is None


def test_documents_of_packed_rows(data, model):
    """A row belongs to the document that its first token belongs to."""
    settings = tiny_settings(data, **{"data.mode": "packed"}).data
    corpus = corpora.open_rows(settings, "validation", model, is_own=True)
    texts = model.tokenizer.encode([SENTENCE.format(i, 7 * i) for i in range(20, 24)])
    starts = np.cumsum([0, *(len(ids) + 1 for ids in texts)])  # one separator after each
    begins = np.minimum(np.arange(len(corpus.documents)) * 16, starts[-1] - 16)
    np.testing.assert_array_equal(
        corpus.documents, np.searchsorted(starts, begins, side="right") - 1
    )


def test_a_sample_of_documents_is_fixed(data, model):
    settings = corpora.zero_shot_settings(tiny_settings(data).data, str(data / "corpus.txt"))

    def sample(count):
        corpus = corpora.open_rows(settings, "validation", model, is_own=False, max_documents=count)
        assert corpus.num_documents == min(count, 24)
        return {tuple(row) for row in rows_of(corpus)}

    assert sample(5) == sample(5)
    assert sample(5) < sample(12) < sample(99)


def test_bytes_of_what_is_scored(data, model, baseline):
    """The first token of a row is not scored by the baseline: its bytes do not count."""
    settings = dataclasses.replace(
        corpora.zero_shot_settings(None, str(data / "corpus.txt")), txt_documents="line"
    )
    counts = [corpora.open_rows(settings, "validation", m, is_own=False) for m in (model, baseline)]
    rows = rows_of(counts[0])
    for corpus, first in zip(counts, (0, 1), strict=True):
        expected = [sum(i != 0 for i in row[first:]) for row in rows]  # id 0 begins and ends texts
        np.testing.assert_array_equal(corpus.num_bytes, expected)


def test_the_mesh_that_splits_a_batch_is_current(data, model, monkeypatch):
    """A TPU's kernel would be refused without: the compiler cannot split it."""
    found = []

    def noted(*arrays, **static):
        found.append((jax.sharding.get_abstract_mesh().size, len(arrays[2].sharding.device_set)))
        raise InterruptedError

    monkeypatch.setattr(scoring, "_score", noted)
    corpus = corpora.open_rows(tiny_settings(data).data, "train", model, is_own=True)
    with pytest.raises(InterruptedError):
        score(model, corpus)
    assert found == [(8, 8)]


def test_scores_do_not_depend_on_batches(data, model):
    corpus = corpora.open_rows(tiny_settings(data).data, "train", model, is_own=True)
    whole = score(model, corpus, batch_size=64)
    parts = score(model, corpus, batch_size=8)
    assert (whole.batch_size, parts.batch_size) == (24, 8)  # 20 rows on 8 devices
    for name, a, b in zip(whole.bounds._fields, whole.bounds, parts.bounds, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, err_msg=name)
    np.testing.assert_array_equal(whole.times, parts.times)
    other = score(model, corpus, batch_size=64, seed=1)
    assert not np.any(np.isclose(other.bounds.middle, whole.bounds.middle, rtol=1e-4))


def test_figures_are_sums_over_tokens(data, model):
    """Against the bound by token from the network, at the same times; rows of unequal length."""
    settings = corpora.zero_shot_settings(tiny_settings(data).data, str(data / "corpus.txt"))
    corpus = corpora.open_rows(settings, "validation", model, is_own=False, max_documents=6)
    scores = score(model, corpus, num_samples_t=64, batch_size=32)
    figures = scoring.corpus_figures(model.process, corpus, scores, num_resamples=500, seed=0)
    rows = rows_of(corpus)
    assert figures["tokens"] == sum(map(len, rows))
    assert figures["rows"] == len(rows)
    x = np.stack(
        [np.pad(r, (0, 16 - len(r)), constant_values=model.tokenizer.pad_id) for r in rows]
    )
    mask = np.arange(16) < np.array([len(r) for r in rows])[:, None]

    @jax.jit
    def other(key):
        return likelihood.nelbo(
            model.process,
            lambda z_t, t: model.network.apply({"params": model.params}, z_t, t),
            key,
            jnp.asarray(x, jnp.int32),
            num_samples_t=64,
        )

    terms = [np.where(mask, v, 0).sum() / mask.sum() for v in other(jax.random.key(9))]
    names = ("reconstruction", "middle", "prior")
    # two estimates of the same bound, each of thousands of draws
    assert figures["middle"] == pytest.approx(terms[1], rel=0.05)
    assert figures["prior"] == pytest.approx(terms[2], rel=1e-5)
    assert figures["nelbo"] == pytest.approx(sum(figures[n] for n in names), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(np.exp(figures["nelbo"]))
    nats = figures["nelbo"] * figures["tokens"]
    assert figures["bits_per_byte"] == pytest.approx(nats / figures["bytes"] / np.log(2))
    assert figures["original"]["elbo"] == pytest.approx(figures["middle"], rel=0.3)
    # documents, not rows, are resampled: their sums, by hand
    by_document = [scores.bounds.total[corpus.documents == d].sum() for d in range(6)]
    sizes = np.bincount(corpus.documents, [len(row) for row in rows])
    residual = np.array(by_document) - figures["nelbo"] * sizes
    error = residual.std() / np.mean(sizes) / np.sqrt(6)
    assert figures["nelbo_standard_error"] == pytest.approx(error, rel=0.15)
    profile = figures["profile"]
    assert sum(profile["tokens"]) == 64 * figures["tokens"]
    span = profile["edges"][-1] - profile["edges"][0]
    assert np.mean(profile["integrand"]) * span == pytest.approx(figures["middle"], rel=0.02)
    json.dumps(figures, allow_nan=False)


def test_standard_error_covers_repetitions(data, model):
    """Over seeds the figure varies by less than the error of documents and draws together."""
    settings = tiny_settings(data).data
    corpus = corpora.open_rows(settings, "train", model, is_own=True)
    values, errors = [], []
    for seed in range(12):
        figures = scoring.corpus_figures(
            model.process, corpus, score(model, corpus, seed=seed), num_resamples=200, seed=seed
        )
        values.append(figures["nelbo"])
        errors.append(figures["nelbo_standard_error"])
    assert np.std(values) < 1.5 * np.mean(errors)


def test_the_baseline_is_exact(data, baseline):
    corpus = corpora.open_rows(tiny_settings(data, "ar").data, "train", baseline, is_own=True)
    scores = score(baseline, corpus)
    figures = scoring.corpus_figures(None, corpus, scores, num_resamples=100, seed=0)
    rows = rows_of(corpus)
    x = np.stack([np.pad(row, (0, 16 - len(row))) for row in rows])
    logits = jax.jit(baseline.network.apply)({"params": baseline.params}, jnp.asarray(x))
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    nats = -sum(log_probs[i, np.arange(len(r) - 1), r[1:]].sum() for i, r in enumerate(rows))
    tokens = sum(len(row) - 1 for row in rows)
    assert figures["tokens"] == tokens
    assert figures["nelbo"] == pytest.approx(nats / tokens, rel=1e-5)
    assert not {"middle", "original", "profile"} & set(figures)
    again = scoring.corpus_figures(
        None, corpus, score(baseline, corpus, seed=5, batch_size=3), num_resamples=100, seed=0
    )
    assert again["nelbo"] == pytest.approx(figures["nelbo"], rel=1e-6)


def test_one_document_has_no_error(data, model):
    settings = tiny_settings(data, **{"data.validation": "last:1"}).data
    corpus = corpora.open_rows(settings, "validation", model, is_own=True)
    figures = scoring.corpus_figures(
        model.process, corpus, score(model, corpus), num_resamples=100, seed=0
    )
    assert figures["nelbo_standard_error"] is None
    assert figures["perplexity_interval"] is None
    assert figures["notes"] == {
        "documents": "one alone is scored: no figure has an error or an interval"
    }


def test_damaged_parameters_are_an_error(data, model):
    broken = dataclasses.replace(model, params=jax.tree.map(lambda a: a * np.nan, model.params))
    corpus = corpora.open_rows(tiny_settings(data).data, "validation", model, is_own=True)
    with pytest.raises(InputError, match="not a number"):
        scoring.corpus_figures(
            model.process, corpus, score(broken, corpus), num_resamples=100, seed=0
        )


def empty_texts(folder: Path, count: int = 3) -> Path:
    file = folder / "empty.jsonl"
    file.write_text('{"text": ""}\n' * count)
    return file


@pytest.mark.filterwarnings("error")
def test_texts_of_no_byte_have_no_bits_per_byte(tmp_path, data, model):
    settings = corpora.zero_shot_settings(tiny_settings(data).data, str(empty_texts(tmp_path)))
    corpus = corpora.open_rows(settings, "validation", model, is_own=False)
    assert rows_of(corpus) == [[0, 0]] * 3
    figures = finite(
        scoring.corpus_figures(
            model.process, corpus, score(model, corpus), num_resamples=20, seed=0
        )
    )
    assert (figures["tokens"], figures["bytes"]) == (6, 0)
    assert figures["bits_per_byte"] is None
    assert figures["bits_per_byte_standard_error"] is None
    assert figures["nelbo"] > 0
    assert figures["notes"] == {"bits_per_byte": "the scored tokens stand for no byte of text"}


def test_no_token_to_score_is_found_before_scoring(tmp_path, data, baseline):
    """An autoregressive model does not score the first token of a row, here the only one."""
    settings = corpora.zero_shot_settings(tiny_settings(data).data, str(empty_texts(tmp_path, 1)))
    packed = dataclasses.replace(settings, mode="packed")
    with pytest.raises(InputError, match=r"empty\.jsonl' has no token to score"):
        corpora.open_rows(packed, "validation", baseline, is_own=False)


@pytest.mark.filterwarnings("error")
def test_a_bound_that_the_data_makes_infinite_blames_no_parameters(data, model):
    corpus = corpora.open_rows(tiny_settings(data).data, "validation", model, is_own=True)
    scores = score(model, corpus)
    worst = scores.bounds.reconstruction.copy()

    def figures(nats: float) -> dict:
        worst[0] = nats
        bounds = scores.bounds._replace(reconstruction=worst)
        found = scoring.corpus_figures(
            model.process, corpus, scores._replace(bounds=bounds), num_resamples=20, seed=0
        )
        return finite(found)

    infinite = figures(np.inf)
    for name in ("nelbo", "perplexity", "bits_per_byte", "reconstruction"):
        assert infinite[name] is None
    assert "tokens to which the model gives no probability" in infinite["notes"]["nelbo"]
    huge = figures(1e30)
    assert huge["nelbo"] == pytest.approx(1e30 / huge["tokens"])
    assert huge["perplexity"] is None
    assert huge["notes"]["perplexity"].endswith("is too large for a number")
    json.dumps([infinite, huge], allow_nan=False)


def test_unknown_corpora_and_splits(data, model):
    settings = tiny_settings(data).data
    with pytest.raises(InputError, match="has the splits train and validation"):
        corpora.open_rows(settings, "test", model, is_own=True)
    with pytest.raises(InputError, match="does not exist"):
        corpora.open_rows(
            dataclasses.replace(settings, path="nowhere/"), "validation", model, is_own=False
        )
    (data / "blank.txt").write_text("\n\n")
    with pytest.raises(InputError, match="holds no text"):
        corpora.open_rows(
            dataclasses.replace(settings, path=str(data / "blank.txt")), "", model, is_own=False
        )
    assert corpora.run_data_settings(data) is None
