"""The denoiser that a Llama becomes: the source's logits while causal, then it sees both sides."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from gidd_jax.errors import InputError
from gidd_jax.models.llama import Llama
from gidd_jax.models.llama_denoiser import LlamaDenoiser
from gidd_jax.training.annealing import CAUSAL

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 16,
}
IDS = jax.random.randint(jax.random.key(0), (3, 12), 0, 67)
TIMES = jnp.array([0.1, 0.5, 0.9])


@pytest.fixture(scope="module")
def params():
    """Larger than the initialisation, so that attention is not nearly uniform."""
    made = jax.jit(Llama(**SHAPE).init)(jax.random.key(1), IDS)["params"]
    return jax.tree.map(lambda p: 4 * p if p.ndim > 2 else p, nn.unbox(made))


def logits_of(params, ids=IDS, times=TIMES, lengths=None, future=None, **changes):
    network = LlamaDenoiser(**SHAPE, **changes)
    future = None if future is None else jnp.float32(future)
    with jax.default_matmul_precision("highest"):
        return np.asarray(network.apply({"params": params}, ids, times, lengths, future))


@pytest.fixture(scope="module")
def source_logits(params):
    with jax.default_matmul_precision("highest"):
        return np.asarray(Llama(**SHAPE).apply({"params": params}, IDS))


def test_while_causal_the_logits_are_the_sources(params, source_logits):
    found = logits_of(params, future=CAUSAL, shift=True)
    np.testing.assert_allclose(found[:, 1:], source_logits[:, :-1], atol=1e-5, rtol=0)
    np.testing.assert_allclose(found[:, 0], source_logits[:, 0], atol=1e-5, rtol=0)
    unshifted = logits_of(params, future=CAUSAL)
    np.testing.assert_allclose(unshifted, source_logits, atol=1e-5, rtol=0)


def test_opened_attention_is_that_without_a_bias(params, source_logits):
    opened = logits_of(params, future=0.0)
    np.testing.assert_allclose(opened, logits_of(params), atol=1e-5, rtol=0)
    assert np.abs(opened - source_logits)[:, 0].max() > 0.05  # the first token saw itself alone


@pytest.mark.parametrize("shift", [False, True])
def test_which_tokens_a_token_sees(params, shift):
    changed = IDS.at[:, 7].set((IDS[:, 7] + 1) % 67)
    for future, sees in ((None, True), (CAUSAL, False)):
        moved = np.abs(
            logits_of(params, changed, future=future, shift=shift)
            - logits_of(params, future=future, shift=shift)
        ).max(axis=(0, 2))
        assert (moved[:7] > 1e-4).all() == sees
        assert (moved[7 + shift :] > 1e-4).all()


def test_times_change_nothing_at_first_and_then_do(params):
    network = LlamaDenoiser(**SHAPE, cond_dim=8)
    fresh = nn.unbox(network.init(jax.random.key(2), IDS, TIMES)["params"])
    told = unflatten_dict(flatten_dict(fresh) | flatten_dict(params))
    without = logits_of(params)
    np.testing.assert_array_equal(logits_of(told, cond_dim=8), without)
    told["blocks"]["modulation"]["bias"] = jnp.full((2, 6, 32), 0.1)
    told["blocks"]["modulation"]["kernel"] = jax.random.normal(jax.random.key(3), (2, 8, 6, 32))
    moved = logits_of(told, cond_dim=8)
    assert np.abs(moved - without).max() > 1e-3
    by_row = logits_of(told, times=TIMES[:, None].repeat(12, 1), cond_dim=8)
    np.testing.assert_allclose(by_row, moved, atol=1e-5, rtol=0)
    later = logits_of(told, times=TIMES.at[1].set(0.8), cond_dim=8)
    assert np.abs(later[1] - moved[1]).max() > 1e-3
    np.testing.assert_array_equal(later[[0, 2]], moved[[0, 2]])


@pytest.mark.parametrize("future", [None, -2.0])
def test_padding_is_seen_by_nobody(params, future):
    lengths = jnp.array([5, 12, 9])
    found = logits_of(params, lengths=lengths, future=future)
    for row, length in enumerate([5, 12, 9]):
        alone = logits_of(params, IDS[row : row + 1, :length], TIMES[row : row + 1], future=future)
        np.testing.assert_allclose(found[row, :length], alone[0], atol=1e-5, rtol=0)


def test_bad_shapes_are_named(params):
    with pytest.raises(InputError, match=r"exceeds the model's max_seq_len 16"):
        logits_of(params, jnp.zeros((1, 17), jnp.int32), jnp.zeros(1))
    with pytest.raises(InputError, match=r"t has shape \(2,\); give \[3\], \[1\] or \[3, 12\]"):
        logits_of(params, times=jnp.zeros(2))
