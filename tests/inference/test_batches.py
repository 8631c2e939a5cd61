"""Batches of rows over the devices: a TPU's kernel is told which rows each of them has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gidd_jax.errors import InputError
from gidd_jax.inference import programs
from gidd_jax.inference.batches import by_batches
from gidd_jax.inference.prompts import Rows
from gidd_jax.models.dit import DiT
from gidd_jax.parallel.sharding import unbox
from gidd_jax.process import HybridProcess
from gidd_jax.sampling.options import SamplerOptions

VOCAB, LENGTH = 20, 128
NETWORK = DiT(
    VOCAB, hidden_size=64, num_layers=1, num_heads=1, max_seq_len=LENGTH, dtype=jnp.bfloat16
)


def free_rows(count, length):
    free = np.ones((count, length), bool)
    return Rows(np.zeros(free.shape, np.int32), free, np.full(count, length, np.int32))


@pytest.fixture(scope="module")
def params():
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    return unbox(NETWORK.init(jax.random.key(0), ids, jnp.ones(1))["params"])


def test_a_batch_over_several_tpus_lowers(params, monkeypatch):
    """The compiler cannot split a kernel: without the mesh, this is an error."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    draw = functools.partial(
        programs.diffusion.trace,
        network=NETWORK,
        process=HybridProcess(VOCAB, VOCAB - 1, 0.1),
        special=programs.SpecialIds(0, 1, VOCAB - 1, VOCAB),
        options=SamplerOptions(num_steps=2),
        num_free=LENGTH,
        width=LENGTH,
        trace=False,
    )
    texts = []

    def lower(batch):
        assert len(batch.ids.sharding.device_set) == 8
        texts.append(draw(batch).lower(lowering_platforms=("tpu",)).as_text())
        return batch.ids

    (ids,) = by_batches(lower, params, free_rows(8, LENGTH), 8, seed=0)
    assert ids.shape == (8, LENGTH)
    assert texts[0].count("@tpu_custom_call") == 1


def test_rows_keep_their_order_and_their_numbers(params):
    """Three rows, in batches of two that are filled up to eight: each draws by its own name."""
    rows = free_rows(3, 4)

    def keys(batch):
        return jax.random.key_data(batch.keys)

    whole = np.concatenate(by_batches(keys, params, rows, 2, seed=1))[:3]
    named = np.concatenate(by_batches(keys, params, rows, 2, seed=1, names=np.array([2, 0, 1])))
    np.testing.assert_array_equal(named[:3], whole[[2, 0, 1]])
    with pytest.raises(InputError, match="batch_size must be at least 1: 0"):
        by_batches(keys, params, rows, 0, seed=1)
