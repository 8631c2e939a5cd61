"""Rows at inference are framed as in training, and the network is told the time that fits them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import tiny_model, write_checkpoint

from gidd_jax import likelihood
from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.inference import programs
from gidd_jax.inference.framing import framed, unframed, widened
from gidd_jax.inference.gidd import Gidd
from gidd_jax.inference.prompts import Rows
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess
from gidd_jax.sampling.times import noise_share, row_times

CONTEXT = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of padded rows, told one time a row."""
    trained = tiny_model(tmp_path_factory.mktemp("data"), "gidd")
    return dataclasses.replace(trained, row_mode="padded")


def test_short_rows_end_and_are_padded_where_the_model_was_trained_so(model):
    pad, eos = model.tokenizer.pad_id, model.tokenizer.eos_id
    rows = Rows(
        np.array([[5, 6, 7, pad], [5, 6, 7, 8]]),
        np.array([[False, True, True, False], [False, False, True, True]]),
        np.array([3, 4]),
    )
    whole = framed(rows, model.tokenizer, "padded", 6)
    np.testing.assert_array_equal(whole.ids, [[5, 6, 7, eos, pad, pad], [5, 6, 7, 8, eos, pad]])
    np.testing.assert_array_equal(whole.lengths, [6, 6])  # the network sees it all
    np.testing.assert_array_equal(whole.free[:, :4], rows.free)
    assert not whole.free[:, 4:].any()
    np.testing.assert_array_equal(unframed(whole.ids, rows, model.tokenizer), rows.ids)
    cropped = framed(rows, model.tokenizer, "crop", 6, ends=False)
    np.testing.assert_array_equal(cropped.ids[0], [5, 6, 7, pad, pad, pad])
    packed = widened(framed(rows, model.tokenizer, "packed", 512), model.tokenizer, 16)
    assert packed.ids.shape == (2, 16)
    np.testing.assert_array_equal(packed.lengths, rows.lengths)  # padding that nothing sees
    full = framed(rows, model.tokenizer, "padded", 4)
    np.testing.assert_array_equal(full.ids, [[5, 6, 7, eos], [5, 6, 7, 8]])


def test_the_mode_of_a_run_and_of_an_export_is_that_of_its_training(tmp_path, model):
    (tmp_path / "inputs").mkdir()
    write_checkpoint(tmp_path / "run", tmp_path / "inputs")
    assert Gidd.from_pretrained(tmp_path / "run").row_mode == "padded"
    model.save_pretrained(tmp_path / "exported")
    assert Gidd.from_pretrained(tmp_path / "exported").row_mode == "padded"
    packed = dataclasses.replace(model, row_mode="packed")
    packed.save_pretrained(tmp_path / "packed")
    assert "row_mode" not in (tmp_path / "packed" / "config.json").read_text()
    assert Gidd.from_pretrained(tmp_path / "packed").row_mode == "packed"


def test_log_likelihoods_are_those_of_the_framed_row_at_the_time_that_fits(model):
    """By hand: the row of training, each draw told the time of its share of noise."""
    got = model.log_likelihood(["men"], prompts=["ab"], num_samples_t=4)
    ids = np.full((1, CONTEXT), model.tokenizer.pad_id)
    ids[0, :7] = [*got.ids[0, :6], model.tokenizer.eos_id]
    free = np.zeros((1, CONTEXT), bool)
    free[0, 3:6] = True

    def network(z, times):
        t = row_times(model.process, times)
        return model.network.apply({"params": model.params}, z, t)

    keys = row_keys(jax.random.key(0), jnp.arange(1))
    want = likelihood.log_likelihood(
        model.process, network, keys, jnp.asarray(ids), jnp.asarray(free), num_samples_t=4
    )
    np.testing.assert_allclose(got.by_token[0], want[0, :6], rtol=2e-4, atol=1e-5)


def test_what_was_added_is_not_returned(model):
    made = model.infill([["ab", 3, "c"]], num_steps=4)
    assert made.ids.shape == (1, 7)
    np.testing.assert_array_equal(made.ids[0, 1:3], model.tokenizer.encode(["ab"])[0])
    corrected = model.correct(["men", "a"], num_steps=2)
    assert corrected.ids.shape == (2, 4)
    assert corrected.ids[1, 2] == model.tokenizer.pad_id
    judged = model.suspicion(["men", "a"])
    assert judged.wrong.shape == (2, 4)
    assert judged.wrong[1, 2] == 0


# The time that the network is told.

PROCESSES = [
    HybridProcess(11, 10, 0.2),
    MaskedProcess(11, 10),
    LogSnrProcess(11, 10, shift=1000.0),
    LogSnrProcess(11, 10),
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_a_row_is_told_the_time_of_its_share_of_noise(process):
    t = jnp.float32(0.6)
    times = jnp.where(jnp.arange(8)[None] < jnp.array([[0], [6], [8]]), 0.0, t)
    within = jnp.arange(8)[None] < jnp.array([[8], [8], [8]])
    told = row_times(process, times, within)
    assert told[0] == t  # to the last bit, where nothing is given
    want = (1 - process.alpha(t)) * 0.25
    np.testing.assert_allclose(1 - process.alpha(told[1]), want, rtol=1e-3)
    assert told[2] == jnp.float32(process.t_min)  # nothing is noise
    # Positions beyond the row do not count.
    shorter = row_times(process, times, jnp.arange(8)[None] < jnp.array([[8], [7], [8]]))
    np.testing.assert_allclose(
        noise_share(process, shorter[1]), noise_share(process, t) / 7, rtol=1e-3
    )


def test_a_model_trained_with_times_of_positions_is_told_them(model):
    told = []

    class Noting:
        position_times = True

        def apply(self, params, z, t, lengths, method=None):
            told.append(t.shape)
            return model.network.apply(params, z, t, lengths, method=method)

    batch = programs.Batch(
        model.params, jnp.zeros(1), jnp.ones((2, 8), jnp.int32), jnp.ones((2, 8), bool), None
    )
    logits = programs.denoiser(Noting(), model.process, batch)
    logits(batch.ids, jnp.full((2, 8), 0.3))
    logits(batch.ids, jnp.full(2, 0.3))
    assert told == [(2, 8), (2,)]


MANY = (
    {"num_steps": 3},
    {"method": "first_hitting"},
    {"method": "entropy_bound", "num_steps": 3},
    {"num_steps": 1, "block_length": 32},
)


@pytest.mark.parametrize("options", MANY, ids=str)
@pytest.mark.parametrize(("row_mode", "more"), [("padded", {}), ("packed", {"new_tokens": 4})])
def test_ten_prompts_of_three_to_twelve_tokens_compile_once(tmp_path, row_mode, more, options):
    """Also where the rows, or what follows the prompts, lie about a power of two."""
    one = tiny_model(tmp_path, "gidd", **{"model.max_seq_len": 140})
    process = MaskedProcess(one.process.vocab_size, one.process.mask_id)
    one = dataclasses.replace(one, row_mode=row_mode, process=process)
    before = programs.diffusion._cache_size()
    for length in range(2, 12):  # and the token that begins a text
        made = one.generate(prompts=["abcdefghijkl"[:length]], **options, **more)
        assert made.ids.shape == (1, length + 1 + more.get("new_tokens", 139 - length))
    assert programs.diffusion._cache_size() - before == 1


def test_guidance_without_a_prompt_is_refused(model):
    with pytest.raises(InputError, match="guidance weighs prompts"):
        model.generate(1, guidance=2.0, num_steps=2)
    with pytest.raises(InputError, match="guidance weighs prompts: give some text"):
        model.infill([[5], [3]], guidance=2.0, num_steps=2)  # the token that begins a text is none
    assert model.generate(prompts=["ab"], guidance=2.0, num_steps=2).network_calls % 2 == 0


UNFRAMED = {"data.tokenizer": "ids:5", "data.frame": "none", "model.max_seq_len": 8}


def test_rows_without_a_frame_begin_with_the_first_token_and_fill_the_context(tmp_path):
    model = tiny_model(tmp_path, **UNFRAMED)
    drawn = model.generate(2, num_steps=3)
    assert drawn.ids.shape == (2, 8)
    assert drawn.ids.max() < 5
    assert drawn.texts == [" ".join(map(str, row)) for row in drawn.ids]
    prompt = model.generate(prompts=["3 1 4"], num_steps=3).ids[0]
    np.testing.assert_array_equal(prompt[:3], [3, 1, 4])
    pieces = model.infill([["3 1", 4, "0 2"]], num_steps=3, seed=2)
    as_ids = np.array([[3, 1, -1, -1, -1, -1, 0, 2]])
    np.testing.assert_array_equal(model.infill(as_ids, num_steps=3, seed=2).ids, pieces.ids)
    np.testing.assert_array_equal(pieces.ids[0, [0, 1, 6, 7]], [3, 1, 0, 2])
    judged = model.suspicion(["3 1 4 1 0 2 2 3"])
    assert judged.judged.all()
    assert model.correct(["3 1 4 1 0 2 2 3"], num_steps=2).ids.shape == (1, 8)
    whole = model.log_likelihood(["3 1 4 1 0 2 2 3"])
    assert whole.num_tokens[0] == 8
    rest = model.log_likelihood(["1 0 2 2 3"], prompts=["3 1 4"])
    np.testing.assert_array_equal(rest.by_token[0, :3], 0)
    assert rest.num_tokens[0] == 5
    guided = model.generate(prompts=["3 1 4"], num_steps=3, guidance=2.0).ids
    assert guided.shape == (1, 8)  # the first token weighs, too


def test_rows_of_another_length_than_the_context_are_refused(tmp_path):
    model = tiny_model(tmp_path, **UNFRAMED)
    alone = "a model of rows without a frame .* knows rows of 8 tokens alone"
    for call in (
        lambda: model.generate(1, length=6),
        lambda: model.generate(prompts=["3 1"], new_tokens=2),
        lambda: model.infill([["3 1", 3]]),
        lambda: model.correct(["3 1 4"]),
        lambda: model.suspicion(["3 1 4"]),
        lambda: model.log_likelihood(["3 1 4"]),
    ):
        with pytest.raises(InputError, match=f"row 1 has [1-7] tokens: {alone}"):
            call()
    for ids, message in (
        (np.zeros((1, 8), int), "text 1 has nothing to fill in: put -1"),
        (np.full((1, 8), 7) - 8 * (np.arange(8) < 2), "text 1 holds 7: ids are 0 to 4, or -1"),
        (np.zeros(8, int), r"texts are int64 \[8\]: must be lists of pieces, or ids"),
    ):
        with pytest.raises(InputError, match=message):
            model.infill(ids)


def test_an_exported_model_keeps_its_rows_without_a_frame(tmp_path):
    model = tiny_model(tmp_path, **UNFRAMED)
    model.save_pretrained(tmp_path / "exported")
    again = Gidd.from_pretrained(tmp_path / "exported")
    assert again.row_mode == model.row_mode == "none"
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    np.testing.assert_array_equal(
        again.generate(1, num_steps=2).ids, model.generate(1, num_steps=2).ids
    )
