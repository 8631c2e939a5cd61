"""Blocks through the whole model: mixed prompts, ends, windows beyond the context."""

import dataclasses

import numpy as np
import pytest
from tiny_checkpoint import tiny_model

from gidd_jax.errors import InputError
from gidd_jax.inference import programs
from gidd_jax.inference.onward import continued, seed_of
from gidd_jax.inference.samples import Samples

BLOCK, CONTEXT = 4, 16
PROMPTS = ["a", "it is a truth", "men"]


@pytest.fixture(scope="module", params=[0, BLOCK], ids=["rows", "blocks"])
def model(request, tmp_path_factory):
    changes = {"model.name": "gidd", "model.max_seq_len": CONTEXT, "data.mode": "packed"}
    changes["train.block_length"] = request.param
    return tiny_model(tmp_path_factory.mktemp("model"), **changes)


def test_prompts_of_several_lengths_in_one_batch_are_those_of_many(model):
    options = {"num_steps": 3, "block_length": BLOCK, "seed": 3}
    together = model.generate(prompts=PROMPTS, **options)
    alone = model.generate(prompts=PROMPTS, **options, batch_size=1)
    np.testing.assert_array_equal(together.ids, alone.ids)
    for row, prompt in zip(together.ids, PROMPTS, strict=True):
        ids = model.tokenizer.encode([prompt])[0]
        np.testing.assert_array_equal(row[1 : 1 + len(ids)], ids)
    assert not np.any(together.ids == model.tokenizer.mask_id)


def test_prompts_of_all_lengths_are_one_program(tmp_path):
    """They leave 62, 30 and 4 tokens to generate, of a context of 64."""
    changes = {"model.name": "gidd", "model.max_seq_len": 64, "train.block_length": BLOCK}
    model = tiny_model(tmp_path, **changes, **{"data.mode": "packed"})
    before = programs.diffusion._cache_size()
    calls = [
        model.generate(prompts=["a" * length], num_steps=1).stopped_at[0] for length in (1, 33, 59)
    ]
    assert programs.diffusion._cache_size() - before == 1
    assert calls == [16, 8, 1]  # one a block; a prompt ends within its first


def test_windows_go_on_beyond_the_context(model):
    options = {"num_steps": 2, "block_length": BLOCK, "seed": 1}
    found = model.generate(prompts=PROMPTS, new_tokens=40, **options)
    starts = [1 + len(ids) for ids in model.tokenizer.encode(PROMPTS)]
    assert found.ids.shape == (3, max(starts) + 40)
    for row, drawn_at, start in zip(found.ids, found.drawn_at, starts, strict=True):
        new = row[start : start + 40]
        assert not np.any(np.isin(new, (model.tokenizer.mask_id, model.tokenizer.pad_id)))
        assert np.all(row[start + 40 :] == model.tokenizer.pad_id)
        assert np.all(drawn_at[:start] == 0)
    # The first window is what fits into the context, as it would be alone.
    within = model.generate(prompts=PROMPTS[:1], **options)
    np.testing.assert_array_equal(found.ids[0, :CONTEXT], within.ids[0, :CONTEXT])
    # Windows draw by keys of their own.
    assert not np.array_equal(found.ids[0, 8:16], found.ids[0, 16:24])


def test_each_window_begins_with_the_last_half_of_what_is_before_it(model):
    """By a stand-in that draws the number of the window and the place in it."""
    seen = []

    def draw(rows, window):
        seen.append([row[:n].tolist() for row, n in zip(rows.ids, rows.lengths, strict=True)])
        place = np.arange(rows.ids.shape[1])[None]
        ids = np.where(rows.free, 100 + 16 * window + place, rows.ids)
        zeros = np.zeros(ids.shape, np.float32)
        drawn_at = np.where(rows.free, 2, 0)
        return Samples(ids, [""], zeros - rows.free, drawn_at, 3, np.full(len(ids), 2))

    found = continued(
        draw,
        model.tokenizer,
        [[5, 6, 7]],
        CONTEXT,
        22,
        begin=False,
        end_id=None,
        block_length=BLOCK,
    )
    first = [5, 6, 7, *range(103, 116)]
    second = [*range(116 + 8, 116 + 16)]
    assert seen[1][0][:8] == first[8:]
    assert found.ids[0].tolist() == [*first, *second, 132 + 8]
    assert found.drawn_at[0].tolist() == [0] * 3 + [2] * 13 + [4] * 8 + [6]
    assert (found.network_calls, found.stopped_at[0]) == (9, 6)
    assert seed_of(7, 0) == 7
    assert len({seed_of(7, window) for window in range(500)}) == 500


def test_prompts_that_fill_the_context_are_refused_and_a_length_is_kept(model):
    options = {"num_steps": 2, "block_length": BLOCK, "new_tokens": 40}
    with pytest.raises(InputError, match="prompt 2 has 60 tokens"):
        model.generate(prompts=["a", list(range(60))], **options)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        model.generate(prompts=[""], **options)
    with pytest.raises(InputError, match="exceeds the length 12"):
        model.generate(prompts=PROMPTS[:1], length=12, **options)
    if not model.network.block_length:
        with pytest.raises(InputError, match="at most half of it, 8"):
            model.generate(prompts=PROMPTS, **options | {"block_length": 9})


def test_gaps_in_blocks_far_apart_are_filled(model):
    ids = np.full((1, CONTEXT), 9)
    ids[0, [1, 14]] = -1
    found = model.infill(ids, num_steps=2, block_length=BLOCK).ids
    assert np.all(found[0, [1, 14]] >= 0)
    assert not np.any(found == model.tokenizer.mask_id)


def ending(model):
    """The model with an end token that is probable, or almost not, wherever it may stand."""
    kernel = model.params["output"]["kernel"]
    kernel = kernel.at[:, model.tokenizer.eos_id].multiply(6.0)
    return dataclasses.replace(model, params=model.params | {"output": {"kernel": kernel}})


def test_a_text_ends_with_its_end_token(model):
    model, has_end = ending(model), 0
    options = {"num_steps": 2, "block_length": BLOCK, "seed": 1, "new_tokens": 200}
    found = model.generate(prompts=PROMPTS, stop_at_end=True, **options)
    for row, ids in zip(found.ids, model.tokenizer.encode(PROMPTS), strict=True):
        new = row[1 + len(ids) :]
        ends = np.flatnonzero(new == model.tokenizer.eos_id)
        if len(ends):
            has_end += 1
            assert np.all(new[ends[0] + 1 :] == model.tokenizer.pad_id)
    assert has_end


def test_what_follows_the_end_is_padding_in_all_that_is_returned(model):
    model = ending(model)
    options = {"num_steps": 2, "block_length": BLOCK, "seed": 1, "trace": True}
    found = model.generate(prompts=PROMPTS * 8, stop_at_end=True, **options)
    starts = [1 + len(ids) for ids in model.tokenizer.encode(PROMPTS * 8)]
    is_end = (found.ids == model.tokenizer.eos_id) & (
        np.arange(CONTEXT) >= np.array(starts)[:, None]
    )
    is_after = np.cumsum(is_end, axis=-1) - is_end > 0
    assert 4 <= is_end.any(axis=-1).sum() <= 23  # of 24 texts some have an end, others none
    assert np.any(is_after)
    assert np.all(found.ids[is_after] == model.tokenizer.pad_id)
    assert not np.any(found.log_probs[is_after])
    assert not np.any(found.drawn_at[is_after])


def test_without_blocks_the_context_is_the_end(model):
    if model.network.block_length:
        with pytest.raises(InputError, match="trained by blocks of 4"):
            model.generate(prompts=PROMPTS, new_tokens=40, block_length=5)
    else:
        with pytest.raises(InputError, match="exceeds the length 16"):
            model.generate(prompts=PROMPTS, new_tokens=40)
