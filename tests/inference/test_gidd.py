"""The Python API: devices, batches, prompts and gaps of mixed lengths, results and bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import tiny_model, write_checkpoint

from gidd_jax import Gidd
from gidd_jax.data.texts import read_texts
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.evaluation.detection import judge_text
from gidd_jax.inference.prompts import whole_texts
from gidd_jax.inference.samples import load_ids, save_samples
from gidd_jax.sampling.correction import CorrectionOptions
from gidd_jax.sampling.options import SamplerOptions, SuspicionOptions

MADE_WITH = ("tokenizer", "sampling_precision")
PROMPTS = ["It", "a truth univ", "[MASK]", "single"]  # one token a byte; the context is 16


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


def assert_rows_equal(got, row: int, alone, length: int) -> None:
    np.testing.assert_array_equal(got.ids[row, :length], alone.ids[0, :length])
    np.testing.assert_array_equal(got.drawn_at[row, :length], alone.drawn_at[0, :length])
    np.testing.assert_allclose(got.log_probs[row, :length], alone.log_probs[0, :length], atol=1e-4)
    assert got.texts[row] == alone.texts[0]


@pytest.mark.parametrize("name", ["model", "autoregressive"])
def test_one_device_draws_what_eight_draw(name, request, monkeypatch):
    model = request.getfixturevalue(name)
    options = SamplerOptions(num_steps=4) if name == "model" else SamplerOptions()
    eight = model.generate(11, batch_size=16, length=12, options=options)
    assert eight.ids.shape == (11, 12)
    assert eight.network_calls <= 11
    monkeypatch.setattr("jax.local_devices", lambda: jax.devices()[:1])
    one = model.generate(11, batch_size=3, length=12, options=options)  # another batch, too
    np.testing.assert_array_equal(one.ids, eight.ids)
    np.testing.assert_allclose(one.log_probs, eight.log_probs, atol=1e-4)
    assert one.texts == eight.texts
    assert len(np.unique(eight.ids, axis=0)) == 11
    assert not np.isin(eight.ids, [model.tokenizer.mask_id]).any()
    assert eight.ids.max() < model.tokenizer.vocab_size


def test_rows_that_fill_up_a_batch_cause_no_calls(model, monkeypatch):
    eight = model.generate(1, length=4, num_steps=150)
    monkeypatch.setattr("jax.local_devices", lambda: jax.devices()[:1])
    assert eight.network_calls == model.generate(1, length=4, num_steps=150).network_calls < 40


@pytest.mark.parametrize("name", ["model", "autoregressive"])
def test_prompts_of_a_mixed_batch_are_continued_as_they_are_alone(name, request):
    model = request.getfixturevalue(name)
    changes = {"num_steps": 3, "top_k": 50} if name == "model" else {"top_k": 50}
    got = model.generate(prompts=PROMPTS, new_tokens=3, seed=5, **changes)
    sizes = [1 + len(prompt) for prompt in PROMPTS]
    assert got.ids.shape == (4, 1 + 12 + 3)
    for row, (prompt, size) in enumerate(zip(PROMPTS, sizes, strict=True)):
        assert got.ids[row, 0] == model.tokenizer.bos_id
        np.testing.assert_array_equal(got.ids[row, 1:size], model.tokenizer.encode([prompt])[0])
        assert got.texts[row].startswith(prompt)
        np.testing.assert_array_equal(got.drawn_at[row, :size], 0)
        assert np.all(got.drawn_at[row, size : size + 1] > 0)
        np.testing.assert_array_equal(got.ids[row, size + 3 :], model.tokenizer.pad_id)
    alone = model.generate(prompts=PROMPTS[:1], new_tokens=3, seed=5, **changes)
    assert alone.ids.shape == (1, 1 + 2 + 3)
    assert_rows_equal(got, 0, alone, 6)


def test_gaps_are_filled_and_the_rest_stays(model):
    texts = [["a ", 3, " of ", 2], [1, "universally"], ["single ", 2]]
    got = model.infill(texts, num_steps=3, method="adaptive")
    ids, encode = got.ids, lambda text: model.tokenizer.encode([text])[0]
    np.testing.assert_array_equal(ids[0, 1:3], encode("a "))
    np.testing.assert_array_equal(ids[0, 6:10], encode(" of "))
    np.testing.assert_array_equal(ids[1, 2:13], encode("universally"))
    free = np.zeros(ids.shape, bool)
    free[0, [3, 4, 5, 10, 11]], free[1, 1], free[2, 8:10] = True, True, True
    assert np.all(got.drawn_at[free] > 0)
    assert not np.any(got.drawn_at[~free])
    assert not np.any(ids == model.tokenizer.mask_id)
    alone = model.infill(texts[:1], num_steps=3, method="adaptive")
    assert_rows_equal(got, 0, alone, 12)


def test_corrections_of_texts_and_of_ids(model):
    texts = ["It is a truth", "men"]
    options = CorrectionOptions(num_steps=5, tokens_per_step=2)
    got = model.correct(texts, options=options)
    assert got.ids.shape == (2, 14)
    assert np.all(got.ids[:, 0] == model.tokenizer.bos_id)
    assert np.all(got.ids[1, 4:] == model.tokenizer.pad_id)
    assert 1 <= got.network_calls <= 5
    assert got.network_calls == got.num_steps.max()
    given = model.tokenizer.encode(texts)
    changes = [np.sum(got.ids[i, 1 : 1 + len(ids)] != ids) for i, ids in enumerate(given)]
    np.testing.assert_array_equal(got.num_changes, changes)
    alone = model.correct(texts[1:], options=options, seed=0)
    assert alone.ids.shape == (1, 4)  # another number, another key: only the shape is the same
    whole = model.correct(got.ids, options=options, temperature=0.0)
    assert whole.ids.shape == got.ids.shape
    assert np.all(whole.final_accuracy >= whole.initial_accuracy)


def test_corrections_change_the_free_tokens_of_rows_alone(model, folder):
    texts = ["It is a truth", "men"]
    whole = model.correct(texts, score="suspicion", threshold=0.0, num_steps=3, temperature=1.0)
    assert whole.num_changes.min() >= 1
    assert not np.any(whole.converged)  # all tokens are more suspicious than that
    rows = whole_texts(model.tokenizer, texts, model.max_seq_len)
    rows.free[:, 3:] = False
    got = model.correct(rows, score="suspicion", threshold=0.0, num_steps=3, temperature=1.0)
    assert np.all(got.num_changes >= 1)
    np.testing.assert_array_equal((got.ids != rows.ids) & ~rows.free, False)
    endless = model.correct(rows, ends=False, num_steps=1)
    ended = model.correct(rows, num_steps=1)
    assert endless.ids.shape == ended.ids.shape == rows.ids.shape
    with pytest.raises(InputError, match="use score 'proposal'"):
        tiny_model(folder, "mdlm").correct(texts, score="suspicion")


def test_what_a_tokenizer_replaces_stays_as_it_was_given(model, folder, tmp_path):
    """A tokenizer that writes small letters only; where nothing is changed the text is the same."""
    spec = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Lowercase"}
    config = (folder / "tokenizer" / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(config)
    tokenizer = load_tokenizer(tmp_path)
    lower = dataclasses.replace(model, tokenizer=tokenizer)
    text = "It IS a Truth"
    (before,) = tokenizer.encode([text])
    assert tokenizer.decode(before) != text
    got = lower.correct([text], num_steps=1, tokens_per_step=1, temperature=5.0)
    after = got.ids[0, 1 : 1 + len(text)]
    (changed,) = np.flatnonzero(after != before)
    new = tokenizer.decode(after[[changed]], skip_special_tokens=True)
    assert got.texts == [text[:changed] + new + text[changed + 1 :]]
    found = lower.suspicion([text, before, "A"], method="leave_one_out")
    assert found.texts == [text, text.lower(), "A"]
    judged = judge_text(lower, text, SuspicionOptions(method="leave_one_out"), 4)
    assert judged.tokens == list(text)


def test_samples_file_is_read_back_without_pickle(model, tmp_path):
    samples = model.generate(2, num_steps=2, length=5)
    path = tmp_path / "new" / "samples.npz"
    save_samples(path, samples, model.tokenizer)
    with np.load(path, allow_pickle=False) as file:
        assert set(file) == {*samples._fields, "texts_ends", *MADE_WITH} - {"trace"}
        assert str(file["sampling_precision"]).startswith("float32")
        np.testing.assert_array_equal(file["log_probs"], samples.log_probs)
    assert read_texts(path, "--samples").texts == samples.texts
    np.testing.assert_array_equal(load_ids(path, model.tokenizer), samples.ids)
    assert [file.name for file in path.parent.iterdir()] == ["samples.npz"]
    other = dataclasses.replace(model.tokenizer, pad_id=7)
    with pytest.raises(InputError, match="made with another tokenizer"):
        load_ids(path, other)
    for content in (b"", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is no file of samples"):
            load_ids(path, model.tokenizer)
    np.savez(path, texts=np.array(["a"]))
    with pytest.raises(InputError, match="holds no token ids"):
        load_ids(path, model.tokenizer)


def test_a_checkpoint_gives_the_model_that_was_saved(folder, tmp_path):
    saved = write_checkpoint(tmp_path / "run", folder, "gidd")
    loaded = Gidd.from_pretrained(tmp_path / "run")
    assert loaded.process == saved.process
    assert loaded.tokenizer.fingerprint == saved.tokenizer.fingerprint
    ours, theirs = (m.generate(2, num_steps=2, length=6) for m in (loaded, saved))
    np.testing.assert_array_equal(ours.ids, theirs.ids)


def test_damaged_parameters_are_noticed(model):
    params = jax.tree.map(lambda a: a * jnp.nan, model.params)
    with pytest.raises(InputError, match="not a number"):
        dataclasses.replace(model, params=params).generate(2, num_steps=2, length=6)
    with pytest.raises(InputError, match="not a number"):
        dataclasses.replace(model, params=params).correct(["It is a truth"], num_steps=2)
    with pytest.raises(InputError, match="not a number"):
        dataclasses.replace(model, params=params).is_greedy(["It is"])  # and comes to an end


def test_damaged_autoregressive_parameters_are_noticed(autoregressive):
    params = jax.tree.map(lambda a: a * jnp.nan, autoregressive.params)
    with pytest.raises(InputError, match="not a number"):
        dataclasses.replace(autoregressive, params=params).is_greedy(["It is"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(0), "num_samples must be at least 1: 0"),
        (lambda m: m.generate(2, length=17), r"length must lie in \[1, 16\], the context: 17"),
        (lambda m: m.generate(2, batch_size=0), "batch_size must be at least 1: 0"),
        (lambda m: m.generate(2, num_step=3), "unknown option num_step: did you mean num_steps"),
        (lambda m: m.generate(2, method="remdm_cap"), "needs a process whose only noise is the"),
        (lambda m: m.generate(2, prompts=["a"]), "give num_samples or prompts"),
        (lambda m: m.generate(new_tokens=3), "new_tokens must be at least 1, and needs prompts"),
        (lambda m: m.generate(prompts=[]), "prompts is empty"),
        (lambda m: m.generate(prompts="It was"), "prompts must be a list of texts"),
        (lambda m: m.generate(prompts=["a", ""]), "prompt 2 is empty"),
        (
            lambda m: m.generate(prompts=["a" * 15]),
            "prompt 1 has 15 tokens.* exceeds the length 16",
        ),
        (lambda m: m.generate(prompts=["a"], new_tokens=15), "exceeds the length 16"),
        (lambda m: m.infill(["It was"]), "text 1 has nothing to fill in"),
        (lambda m: m.infill([["It was"]]), "text 1 has nothing to fill in"),
        (lambda m: m.infill([["It", 0]]), "a piece is a text or a number above 0: 0"),
        (lambda m: m.infill([["It", 14]]), "text 1 has 17 tokens.* the longest possible is 16"),
        (lambda m: m.correct([""]), "text 1 has 0 tokens"),
        (lambda m: m.correct(["a" * 16]), "text 1 has 16 tokens"),
        (lambda m: m.correct(np.zeros((1, 17), int)), "sequences of 17 tokens exceed the context"),
        (
            lambda m: m.correct(np.zeros(4, int)),
            r"texts are int64 \[4\]: must be texts",
        ),
        (lambda m: m.correct(np.zeros((1, 4))), r"texts are float64 \[1, 4\]: must be texts"),
        (lambda m: m.correct(np.full((2, 4), -1)), "text 1 holds -1: ids are 0 to "),
        (
            lambda m: m.correct(np.full((2, 4), m.tokenizer.mask_id)),
            "text 1 holds 258: ids are 0 to 257",
        ),
        (
            lambda m: m.infill(np.array([[-1, 3], [-1, m.tokenizer.mask_id]])),
            "text 2 holds 258: ids are 0 to 257, or -1 for what",
        ),
        (lambda m: m.correct(["a"], patience=-1), "patience must be at least 0"),
    ],
)
def test_bad_input_is_refused(model, call, message):
    with pytest.raises(InputError, match=message):
        call(model)


def test_autoregressive_models_neither_fill_nor_correct(autoregressive):
    for call in (
        lambda: autoregressive.infill([["a", 2]]),
        lambda: autoregressive.correct(["a"]),
        lambda: autoregressive.generate(2, method="psi"),
    ):
        with pytest.raises(InputError, match="autoregressive"):
            call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda model, text: model.generate(prompts=["a", text]), "prompt 2"),
        (lambda model, text: model.infill([["a", 1, text]]), "text 1, piece 3"),
        (lambda model, text: model.correct(["a", text]), "text 2"),
        (lambda model, text: model.suspicion(["a", text]), "text 2"),
        (lambda model, text: model.log_likelihood(["a", text]), "text 2"),
        (lambda model, text: model.log_likelihood(["a"], prompts=[text]), "prompt 1"),
        (lambda model, text: model.is_greedy([text]), "text 1"),
    ],
)
@pytest.mark.parametrize("text", ["\ud800", "b\udcff"])
def test_a_text_that_has_no_utf8_is_named(model, call, name, text):
    with pytest.raises(InputError, match=f"^{name} is no UTF-8 text: "):
        call(model, text)
