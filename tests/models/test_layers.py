"""Attention on CPU: row by row where scores are many, with the numbers of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gidd_jax.models import layers
from gidd_jax.parallel import sharding

KINDS = {
    "plain": {},
    "causal": {"is_causal": True},
    "lengths": {"lengths": jnp.array([5, 9, 1])},
}


def inputs():
    """Three rows of nine tokens, four heads of eight features, two of keys and values."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (4, 2, 2)
    return [jax.random.normal(key, (3, 9, n, 8)) for key, n in zip(keys, heads, strict=True)]


def value_and_gradients(kind):
    def loss(q, k, v):
        out = layers.attention(q, k, v, implementation="", **KINDS[kind])
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs())
    return out, *grads


@pytest.mark.parametrize("kind", KINDS)
def test_rows_give_the_numbers_of_the_batch(kind, monkeypatch):
    q, k, _ = inputs()
    assert not layers._goes_row_by_row(q, k)
    whole = value_and_gradients(kind)
    monkeypatch.setattr(layers, "MOST_SCORES", 3 * 4 * 9 * 9 - 1)
    assert layers._goes_row_by_row(q, k)
    for ours, want in zip(value_and_gradients(kind), whole, strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-6, atol=1e-6)


def test_a_batch_that_devices_share_is_not_gone_through(monkeypatch):
    monkeypatch.setattr(layers, "MOST_SCORES", 0)
    q, k, _ = inputs()
    for devices, rows in ((1, True), (2, False)):
        mesh = sharding.make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
        with sharding.activate(mesh):
            assert layers._goes_row_by_row(q, k) == rows


def test_a_row_that_sees_no_padding_does_not_depend_on_it(monkeypatch):
    monkeypatch.setattr(layers, "MOST_SCORES", 0)
    q, k, v = inputs()
    lengths = KINDS["lengths"]["lengths"]
    padded = jnp.arange(9)[None] >= lengths[:, None]
    other = jnp.where(padded[..., None, None], 1e3, v)
    ours = layers.attention(q, k, v, implementation="", lengths=lengths)
    theirs = layers.attention(q, k, other, implementation="", lengths=lengths)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
