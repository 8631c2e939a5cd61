"""Traces: changes there and back, files, what tokens write, samples that a trace leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import tiny_model
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from gidd_jax.data.tokenizer import Tokenizer, load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.inference.gidd import Gidd
from gidd_jax.inference.samples import Samples, load_ids, save_samples
from gidd_jax.process import HybridProcess
from gidd_jax.sampling.correction import Proposals, self_correct
from gidd_jax.sampling.options import CorrectionOptions
from gidd_jax.sampling.trace import (
    Changes,
    changes_between,
    changes_in_order,
    changes_of_correction,
    join_changes,
    load_trace,
    make_trace,
    play,
    save_trace,
    shown,
    written_by,
)

# Calls of a batch: the steps, and one more to fill the masks that six steps of one token leave.
METHODS = [({"method": "ancestral"}, 6), ({"method": "mode_seeking", "tokens_per_step": 1}, 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Corpus and tokenizer."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def model(folder) -> Gidd:
    return tiny_model(folder, "gidd")


@pytest.fixture(scope="module")
def autoregressive(folder) -> Gidd:
    return tiny_model(folder, "ar")


def random_frames(calls: int, batch: int, length: int, seed: int = 0):
    """Ids before and after each call, log-probs that change where the ids do."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 9, (batch, length), np.int32)
    ids, log_probs = [start], [np.zeros(start.shape, np.float32)]
    for _ in range(calls):
        change = rng.random(start.shape) < 0.3
        ids.append(np.where(change, rng.integers(0, 9, start.shape, np.int32), ids[-1]))
        fresh = -rng.random(start.shape).astype(np.float32)
        log_probs.append(np.where(ids[-1] != ids[-2], fresh, log_probs[-1]))
    return start, np.stack(ids[1:]), np.stack(log_probs[1:])


def assert_changes_equal(got: Changes, want: Changes) -> None:
    for name, a, b in zip(Changes._fields, got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype, name


# Changes.


def test_frames_become_changes_and_frames_again():
    start, ids, log_probs = random_frames(calls=7, batch=3, length=5)
    changes = changes_between(start, ids, log_probs)
    assert 20 < len(changes.sample) < 7 * 3 * 5
    for row in range(3):
        played = play(changes, row)
        np.testing.assert_array_equal(played.ids, [start[row], *ids[:, row]])
        np.testing.assert_array_equal(played.log_probs, [0 * log_probs[0, row], *log_probs[:, row]])


def test_changes_are_sorted_and_say_what_changed_where():
    start = np.array([[1, 1], [2, 2]], np.int32)
    ids = np.array([[[1, 3], [2, 2]], [[4, 3], [5, 2]]], np.int32)
    log_probs = np.array([[[0, -0.5], [0, 0]], [[-1, -0.5], [-2, 0]]], np.float32)
    got = changes_between(start, ids, log_probs)
    rows = np.stack([got.sample, got.call, got.position, got.token], axis=1).tolist()
    assert rows == [[0, 1, 1, 3], [0, 2, 0, 4], [1, 2, 0, 5]]
    np.testing.assert_array_equal(got.log_prob, np.float32([-0.5, -1, -2]))
    np.testing.assert_array_equal(got.num_calls, [2, 2])


def test_batches_are_joined_without_their_padding():
    start, ids, log_probs = random_frames(calls=4, batch=5, length=6)
    whole = changes_between(start, ids, log_probs)
    padded = [0, 1, 2, 3, 4, 4]  # two batches of three, the last row twice
    parts = [
        changes_between(start[rows], ids[:, rows], log_probs[:, rows])
        for rows in (padded[:3], padded[3:])
    ]
    assert_changes_equal(join_changes(parts, 5), whole)


def test_sequences_from_left_to_right():
    ids = np.array([[0, 5, 6, 7], [0, 8, 0, 1]], np.int32)
    drawn_at = np.array([[0, 0, 2, 3], [0, 1, 2, 0]], np.int32)
    log_probs = np.float32([[0, 0, -1, -2], [0, -3, -4, 0]])
    changes = changes_in_order(ids, log_probs, drawn_at, num_calls=3, mask_id=2)
    want = [[0, 5, 2, 2], [0, 5, 2, 2], [0, 5, 6, 2], [0, 5, 6, 7]]
    np.testing.assert_array_equal(play(changes, 0).ids, want)
    np.testing.assert_array_equal(
        play(changes, 1).ids[[0, 1, 3]], [[0, 2, 2, 1], [0, 8, 2, 1], ids[1]]
    )
    np.testing.assert_array_equal(play(changes, 1).log_probs[3], log_probs[1])


# Samples.


@pytest.mark.parametrize(("options", "calls"), METHODS, ids=["ancestral", "mode_seeking"])
def test_a_trace_ends_at_the_samples_and_changes_nothing(model, options, calls):
    arguments = {"num_samples": 11, "batch_size": 8, "length": 12, "num_steps": 6, **options}
    samples, plain = model.generate(**arguments, trace=True), model.generate(**arguments)
    assert plain.trace is None
    np.testing.assert_array_equal(samples.ids, plain.ids)
    np.testing.assert_array_equal(samples.log_probs, plain.log_probs)
    np.testing.assert_array_equal(samples.drawn_at, plain.drawn_at)
    assert samples.texts == samples.trace.texts == plain.texts

    changes = samples.trace.changes
    assert samples.network_calls == plain.network_calls == 2 * calls  # two batches
    assert changes.num_calls.tolist() == [calls] * 11
    for row in range(11):
        played = play(changes, row)
        np.testing.assert_array_equal(played.ids[-1], samples.ids[row])
        np.testing.assert_array_equal(played.log_probs[-1], samples.log_probs[row])
        last = [np.flatnonzero(np.diff(column)) for column in played.ids.T]
        drawn_at = [steps[-1] + 1 if len(steps) else 0 for steps in last]
        np.testing.assert_array_equal(drawn_at, samples.drawn_at[row])


def test_a_trace_starts_at_the_prior_and_keeps_what_is_given(model):
    trace = model.infill([["It", 3], ["a truth", 3]], num_steps=4, trace=True).trace
    assert trace is not None
    mask, pad = model.tokenizer.mask_id, model.tokenizer.pad_id
    it = [model.tokenizer.bos_id, *model.tokenizer.encode(["It"])[0]]
    np.testing.assert_array_equal(trace.changes.start[0], [*it, mask, mask, mask, *[pad] * 5])
    np.testing.assert_array_equal(trace.lengths, [6, 11])
    np.testing.assert_array_equal(
        ~trace.given, [[3 <= n < 6 for n in range(11)], [n >= 8 for n in range(11)]]
    )
    assert not trace.given[trace.changes.sample, trace.changes.position].any()


def test_an_autoregressive_text_grows_from_left_to_right(autoregressive):
    samples = autoregressive.generate(prompts=["It", "men w"], new_tokens=4, trace=True)
    changes = samples.trace.changes
    assert changes.num_calls.tolist() == [samples.network_calls] * 2
    for row, first in enumerate((3, 6)):
        played = play(changes, row)
        np.testing.assert_array_equal(played.ids[-1], samples.ids[row])
        masked = np.sum(played.ids == autoregressive.tokenizer.mask_id, axis=1)
        assert masked[first - 1] == np.sum(samples.drawn_at[row] > 0)
        np.testing.assert_array_equal(np.diff(masked)[first - 1 :][: masked[0]], -1)


# Corrections.


def test_a_trace_of_corrections_ends_at_them_and_changes_nothing(model):
    arguments = {"texts": ["It is a truth", "men"], "num_steps": 5, "tokens_per_step": 2}
    corrected, plain = model.correct(**arguments, trace=True), model.correct(**arguments)
    assert plain.trace is None
    np.testing.assert_array_equal(corrected.ids, plain.ids)
    trace = corrected.trace
    assert trace.texts == corrected.texts == plain.texts
    assert trace.given.all()
    np.testing.assert_array_equal(trace.changes.num_calls, corrected.num_steps)
    for row, text in enumerate(arguments["texts"]):
        played = play(trace.changes, row)
        ids = model.tokenizer.encode([text])[0]
        np.testing.assert_array_equal(played.ids[0, 1 : 1 + len(ids)], ids)
        np.testing.assert_array_equal(played.ids[-1], corrected.ids[row])
        assert np.all(np.sum(np.diff(played.ids, axis=0) != 0, axis=1) <= 2)
    assert len(trace.changes.sample) >= corrected.num_changes.sum() > 0


def test_a_correction_is_noted_with_its_probability():
    process = HybridProcess(vocab_size=5, mask_id=4, p_uniform=0.2)
    logits = jnp.array([[0.0, 3.0, 1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 4.0, 0.0]])[None]
    given, first_choice = jnp.array([[0, 0], [1, 0], [1, 3]]), jnp.array([1, 3])
    correction = self_correct(
        process,
        lambda z, t: jnp.broadcast_to(logits, (3, 2, 5)),
        CorrectionOptions(num_steps=9),
        given,
        jnp.ones((3, 2), bool),
        Proposals(
            lambda *_: jnp.broadcast_to(first_choice, (3, 2)), lambda weights, tokens: tokens
        ),
        trace=True,
    )
    changes = changes_of_correction(correction)
    rows = np.stack([changes.sample, changes.call, changes.position, changes.token], axis=1)
    # At temperature 0.1 both are certain; the first position wins a tie.
    assert rows.tolist() == [[0, 1, 0, 1], [0, 2, 1, 3], [1, 1, 1, 3]]
    assert changes.num_calls.tolist() == [3, 2, 1]
    log_probs = jax.nn.log_softmax(logits[0, :, :4])  # nobody draws the mask
    want = [log_probs[0, 1], log_probs[1, 3], log_probs[1, 3]]
    np.testing.assert_allclose(changes.log_prob, want, rtol=1e-6)


# What tokens write.


def test_tokens_write_what_they_add_to_a_text():
    tokenizer = load_tokenizer("embedded")
    (ids,) = tokenizer.encode(["“It is a truth,” é"])
    assert "".join(shown(written_by(tokenizer, ids))) == "“It is a truth,” é"
    parts = written_by(tokenizer, ids)
    assert parts[:4] == ["\udce2", "\udc80", "\udc9c", "It"]  # the bytes of a quotation mark
    assert shown(parts)[:5] == ["“", "", "", "It", " is"]
    assert written_by(tokenizer, np.array([tokenizer.mask_id])) == ["[MASK]"]


@pytest.mark.parametrize(
    ("decoder", "vocabulary", "want"),
    [
        (decoders.WordPiece(), ["a", "the", "##se", "."], [" a", " the", "se", "."]),
        (
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()]),
            ["a", "▁the", "se", "<0xE2>"],
            ["a", " the", "se", "\udce2"],
        ),
    ],
)
def test_blanks_of_other_kinds_of_tokenizers(decoder, vocabulary, want):
    backend = Backend(models.WordPiece({token: i for i, token in enumerate(vocabulary)}))
    backend.decoder = decoder
    tokenizer = Tokenizer(backend, None, 1, 1, 2, "test")
    assert written_by(tokenizer, np.arange(4)) == want


def test_incomplete_characters_are_shown_as_such():
    assert shown(["a\udce2", "\udc80", "b", "\udcc3", "\udca9é", ""]) == [
        "a�",
        "�",
        "b",
        "é",
        "é",
        "",
    ]


# Files.


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def traced(tokenizer) -> Samples:
    """Three samples of ten tokens in four calls."""
    start, ids, log_probs = random_frames(calls=4, batch=3, length=10)
    drawn_at = np.zeros_like(start)
    changes, texts = changes_between(start, ids, log_probs), ["a", "b</script>", "é"]
    trace = make_trace(changes, start == 0, np.full(3, 10), texts, tokenizer)
    return Samples(ids[-1], texts, log_probs[-1], drawn_at, 4, np.full(len(ids[-1]), 4), trace)


def test_a_file_gives_the_trace_back(tokenizer, traced, tmp_path):
    trace = traced.trace._replace(token_texts=["\udce2", *traced.trace.token_texts[1:]])
    save_trace(tmp_path / "a" / "trace.npz", trace)
    got = load_trace(tmp_path / "a" / "trace.npz")
    assert_changes_equal(got.changes, trace.changes)
    assert got.texts == trace.texts
    assert got.token_texts == trace.token_texts
    assert (got.mask_id, got.tokenizer) == (tokenizer.mask_id, tokenizer.fingerprint)
    for name in ("given", "lengths", "token_ids", "special_ids"):
        np.testing.assert_array_equal(getattr(got, name), getattr(trace, name))
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["trace.npz"]


def test_samples_are_saved_without_their_trace(tokenizer, traced, tmp_path):
    save_samples(tmp_path / "samples.npz", traced, tokenizer)
    np.testing.assert_array_equal(load_ids(tmp_path / "samples.npz", tokenizer), traced.ids)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert "trace" not in file


def test_what_is_no_trace_is_refused_in_one_line(tokenizer, traced, tmp_path):
    path = tmp_path / "trace.npz"
    with pytest.raises(InputError, match=r"no trace .*: write one with"):
        load_trace(path)
    path.write_text("text")
    with pytest.raises(InputError, match="is no trace"):
        load_trace(path)
    save_samples(path, traced, tokenizer)
    with pytest.raises(InputError, match="is no trace, it lacks call, given"):
        load_trace(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position", 10),
        ("sample", 3),
        ("token", 99999),
        ("call", 5),
        ("call", 0),
        ("log_prob", np.nan),
    ],
)
def test_changes_that_point_nowhere_are_refused(traced, tmp_path, name, value):
    column = getattr(traced.trace.changes, name).copy()
    column[-1] = value
    changes = traced.trace.changes._replace(**{name: column})
    save_trace(tmp_path / "trace.npz", traced.trace._replace(changes=changes))
    with pytest.raises(InputError, match="damaged trace: its parts do not fit"):
        load_trace(tmp_path / "trace.npz")


def test_a_smaller_part_does_not_fit(traced, tmp_path):
    for name in ("given", "lengths", "texts", "token_texts"):
        part = traced.trace._replace(**{name: getattr(traced.trace, name)[:-1]})
        save_trace(tmp_path / "trace.npz", part)
        with pytest.raises(InputError, match="damaged trace"):
            load_trace(tmp_path / "trace.npz")
