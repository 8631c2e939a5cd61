"""Sampling token by token: the original's draws, the cache, prompts, the end of a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import chi_square

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.interchange.tensors import llama_format, params_from_torch
from gidd_jax.models.llama import Llama
from gidd_jax.sampling import autoregressive
from gidd_jax.sampling.autoregressive import check_autoregressive, sample_autoregressive
from gidd_jax.sampling.loop import Prompt
from gidd_jax.sampling.options import SamplerOptions

BOS, EOS, PAD = 3, 5, 65
SMALL = {"vocab_size": 67, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}


def keys_of(count: int) -> jax.Array:
    return row_keys(jax.random.key(0), jnp.arange(count))


def begin(rows: int, length: int, first: int = BOS) -> Prompt:
    """Nothing but the first token given."""
    ids = jnp.full((rows, length), first, jnp.int32)
    return Prompt(ids, jnp.broadcast_to(jnp.arange(length) > 0, ids.shape))


@pytest.fixture(scope="module")
def network(golden):
    model = Llama(**SMALL)
    params = params_from_torch(
        golden("c06_llama_state_dict.safetensors"),
        llama_format(Llama(67, 64, 2, 4).shape, False),
        2,
    )

    def decode(ids, cache, position):
        return model.apply({"params": params}, ids, cache, position, method="decode_step")

    def recompute(ids, seen, position):
        """The same without a cache: `seen` holds the tokens so far."""
        seen = jax.lax.dynamic_update_slice_in_dim(seen, ids, position, axis=1)
        logits = model.apply({"params": params}, seen)
        return jax.lax.dynamic_slice_in_dim(logits, position, 1, axis=1), seen

    return model, decode, recompute


@pytest.mark.parametrize("name", ["sampler", "sampler_eos"])
def test_original_uniforms_draw_the_original_tokens(golden, network, monkeypatch, name):
    """With the original's categorical draw in place of ours."""
    data, (model, decode, _) = golden("c06_ar.npz"), network
    uniforms = jnp.asarray(data[f"{name}/uniforms"], jnp.float32)
    uniforms = jnp.pad(uniforms, [(0, 15 - len(uniforms)), (0, 0)])

    def draw(position, probs):
        cumulative = jnp.cumsum(probs, axis=-1).at[..., -1].set(1 + 1e-4)
        return jnp.argmax(cumulative > uniforms[position][:, None, None], axis=-1)

    monkeypatch.setattr(autoregressive, "fold_in", lambda keys, position: position)
    monkeypatch.setattr(autoregressive, "categorical", draw)
    with jax.default_matmul_precision("highest"):
        drawn = sample_autoregressive(
            decode,
            model.init_cache(3, 16),
            SamplerOptions(),
            keys_of(3),
            begin(3, 16),
            eos_id=EOS,
            pad_id=PAD,
            vocab_size=67,
        )
    want = data[f"{name}/tokens"]
    after_eos = np.cumsum(want == EOS, axis=1) - (want == EOS) > 0
    want = np.where(after_eos, PAD, want)  # the original leaves EOS where no row was left
    np.testing.assert_array_equal(drawn.ids, want)
    assert int(drawn.network_calls) == 15


def test_cache_draws_what_recomputation_draws(network):
    model, decode, recompute = network

    @jax.jit
    def run(keys):
        arguments = (SamplerOptions(top_p=0.95), keys, begin(4, 12))
        special = {"eos_id": EOS, "pad_id": PAD, "vocab_size": 67, "excluded_ids": (PAD, 66)}
        cached = sample_autoregressive(decode, model.init_cache(4, 12), *arguments, **special)
        seen = jnp.zeros((4, 12), jnp.int32)
        return cached, sample_autoregressive(recompute, seen, *arguments, **special)

    with jax.default_matmul_precision("highest"):
        cached, again = run(keys_of(4))
    np.testing.assert_array_equal(cached.ids, again.ids)
    np.testing.assert_allclose(cached.log_probs, again.log_probs, atol=1e-5)
    assert len(np.unique(cached.ids)) > 10
    np.testing.assert_array_equal(cached.drawn_at[0], np.arange(12))


# A chain over 5 tokens, of which 3 ends a text and 4 pads it.
CHAIN = np.array(
    [
        [0.1, 0.5, 0.3, 0.1, 0.0],
        [0.4, 0.1, 0.4, 0.1, 0.0],
        [0.2, 0.2, 0.3, 0.3, 0.0],
        [0.2, 0.2, 0.2, 0.2, 0.2],
        [0.2, 0.2, 0.2, 0.2, 0.2],
    ]
)


def chain(ids, cache, position):
    return jnp.log(jnp.asarray(CHAIN, jnp.float32))[ids], cache


def run_chain(keys, prompt, options=None, excluded_ids=()):
    run = jax.jit(
        lambda keys, prompt: sample_autoregressive(
            chain,
            (),
            options or SamplerOptions(),
            keys,
            prompt,
            eos_id=3,
            pad_id=4,
            vocab_size=5,
            excluded_ids=excluded_ids,
        )
    )
    return run(keys, prompt)


def test_chain_is_drawn_with_its_probabilities():
    drawn = run_chain(keys_of(20000), begin(20000, 3, first=0))
    ids = np.asarray(drawn.ids)
    after = np.where(np.arange(5)[:, None] == 3, np.eye(5)[4], CHAIN)  # the end, then padding
    joint = CHAIN[0][:, None] * after
    assert chi_square(5 * ids[:, 1] + ids[:, 2], joint.ravel()) > 1e-3
    log_probs = np.log(np.maximum(CHAIN, 1e-9))
    np.testing.assert_allclose(drawn.log_probs[:, 1], log_probs[0, ids[:, 1]], rtol=1e-5)
    ended = ids[:, 1] == 3
    assert ended.any()
    np.testing.assert_array_equal(ids[ended, 2], 4)
    np.testing.assert_array_equal(np.asarray(drawn.log_probs)[ended, 2], 0)
    np.testing.assert_array_equal(np.asarray(drawn.drawn_at)[ended, 2], 0)


def test_filters_and_excluded_tokens():
    greedy = run_chain(keys_of(3), begin(3, 5, first=0), SamplerOptions(temperature=0.0))
    np.testing.assert_array_equal(greedy.ids, [[0, 1, 0, 1, 0]] * 3)
    without = run_chain(keys_of(400), begin(400, 6, first=0), excluded_ids=(1, 4))
    assert not np.isin(np.asarray(without.ids), [1]).any()
    likely = run_chain(keys_of(400), begin(400, 6, first=0), SamplerOptions(min_p=0.35))
    moves = np.stack([likely.ids[:, :-1], likely.ids[:, 1:]], axis=-1).reshape(-1, 2)
    moves = {tuple(move) for move in moves.tolist()}
    # Nothing after 2 reaches 0.35: the two most probable tokens remain.
    assert moves == {(0, 1), (1, 0), (1, 2), (2, 2), (2, 3), (3, 4), (4, 4)}


def test_prompts_of_a_mixed_batch_are_continued_as_they_are_alone():
    ids = np.array([[0, 1, 2, 0, 4, 4, 4], [0, 3, 1, 0, 0, 0, 0], [2, 0, 0, 0, 0, 4, 4]], np.int32)
    free = np.zeros((3, 7), bool)
    free[0, 3:5], free[1, 3:7], free[2, 1:5] = True, True, True  # the second has an end within
    keys = keys_of(3)
    together = run_chain(keys, Prompt(jnp.asarray(ids), jnp.asarray(free)))
    np.testing.assert_array_equal(np.asarray(together.ids)[~free], ids[~free])
    for row, length in enumerate((5, 7, 5)):
        part = np.s_[row : row + 1, :length]
        alone = run_chain(keys[row : row + 1], Prompt(jnp.asarray(ids[part]), free[part]))
        np.testing.assert_array_equal(together.ids[part], alone.ids)
    assert np.asarray(together.ids)[1, 3] != 4  # an end in the prompt ends nothing


def test_options_of_diffusion_models_are_refused():
    check_autoregressive(SamplerOptions(temperature=0.5, top_p=0.9, min_p=0.1))
    for options in (SamplerOptions(method="psi"), SamplerOptions(block_length=4)):
        with pytest.raises(InputError, match="this model is autoregressive"):
            check_autoregressive(options)
