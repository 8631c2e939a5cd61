"""The forms of attention: the TPU's kernel, interpreted, against the plain form; rows on CPU."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from gidd_jax.errors import InputError
from gidd_jax.models.dit import DiT
from gidd_jax.ops import attention as ops
from gidd_jax.ops.attention import attention, automatic
from gidd_jax.parallel import sharding

KINDS = {
    "plain": {},
    "causal": {"is_causal": True},
    "lengths": {"lengths": jnp.array([5, 9, 1])},
}
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}


def inputs(shape=(3, 9, 8), heads=(4, 2, 2), dtype="float32"):
    """Queries, keys and values; by default two heads share one of keys and values."""
    batch, length, features = shape
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (batch, length, n, features), jnp.float32).astype(dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


def value_and_gradients(parts, implementation, **kind):
    """Outputs, and the gradients of a loss that every number of them enters differently."""
    factors = jnp.cos(jnp.arange(parts[0].size, dtype=jnp.float32)).reshape(parts[0].shape)

    def loss(q, k, v):
        out = attention(q, k, v, implementation=implementation, **kind).astype(jnp.float32)
        return jnp.sum(jnp.sin(out) * factors), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = run(*parts)
    return [np.asarray(a, np.float32) for a in (out, *grads)]


def assert_close(ours, wanted, limit):
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * np.abs(b).max())


# Heads of 64 and 128 features, lengths of whole blocks, of several, of no multiple of the lanes.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("length", "features", "kind"),
    [
        (128, 64, "plain"),
        (130, 64, "causal"),
        (640, 64, "plain"),
        (128, 128, "causal"),
        (77, 128, "lengths"),
        (200, 64, "lengths"),
    ],
)
def test_the_kernel_gives_the_numbers_of_the_plain_form(length, features, kind, dtype):
    kind = dict(KINDS[kind])
    if "lengths" in kind:
        kind["lengths"] = jnp.array([1, length - 3])
    parts = inputs((2, length, features), (2, 1, 1), dtype)
    plain = value_and_gradients(parts, "xla", **kind)
    assert_close(value_and_gradients(parts, "splash", **kind), plain, LIMITS[dtype])


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (1, 8, 1)])
def test_the_kernel_runs_on_every_mesh(sizes):
    # Four rows and two heads: what the mesh does not divide, every device computes.
    parts = inputs((4, 128, 64), (4, 2, 2))
    kind = {"lengths": jnp.array([128, 3, 70, 1])}
    plain = value_and_gradients(parts, "xla", **kind)
    with sharding.activate(sharding.make_mesh(*sizes)):
        assert_close(value_and_gradients(parts, "splash", **kind), plain, 1e-5)


def test_padding_is_not_seen_by_the_kernel():
    q, k, v = inputs((2, 20, 64))
    lengths = jnp.array([20, 4])
    padded = (jnp.arange(20)[None] >= lengths[:, None])[..., None, None]
    outs = [
        attention(q, k, jnp.where(padded, filling, v), implementation="splash", lengths=lengths)
        for filling in (0.0, 1e3)
    ]
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("attention", 1), ("full", 2)])
def test_recomputation_keeps_what_the_kernel_made(remat, forward):
    """The backward pass is one kernel; the forward one runs again only if nothing was kept."""
    model = DiT(
        vocab_size=20,
        hidden_size=64,
        num_layers=1,
        num_heads=1,
        max_seq_len=8,
        attention="splash",
        remat=remat,
        scan_layers=False,
    )
    z, t = jnp.zeros((1, 8), jnp.int32), jnp.ones(1)
    params = jax.eval_shape(model.init, jax.random.key(0), z, t)
    gradient = jax.value_and_grad(lambda params: jnp.sum(model.apply(params, z, t)))
    program = jax.make_jaxpr(gradient)(params).jaxpr
    needed, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    assert str(needed).count("= pallas_call[") == forward + 1


def test_the_form_follows_from_the_device():
    forms = {
        (backend, jnp.dtype(dtype).name): automatic(backend, dtype, 512, 64)
        for backend, dtype in itertools.product(("cpu", "gpu", "tpu"), (jnp.float32, jnp.bfloat16))
    }
    assert forms.pop(("gpu", "bfloat16")) == "cudnn"
    assert forms.pop(("tpu", "bfloat16")) == "splash"
    assert set(forms.values()) == {"xla"}
    # Few tokens would mostly be filling; an odd width of a head would be.
    assert automatic("tpu", jnp.bfloat16, 127, 64) == "xla"
    assert automatic("tpu", jnp.bfloat16, 512, 48) == "xla"


def test_what_cannot_be_is_refused(monkeypatch):
    q, k, v = inputs()
    with pytest.raises(InputError, match="use 'xla', 'cudnn', 'splash' or ''"):
        attention(q, k, v, implementation="flash")
    mask = jnp.ones((1, 1, 9, 9), bool)
    with pytest.raises(InputError, match="'splash', which takes no mask; use 'xla'"):
        attention(q, k, v, implementation="splash", mask=mask)
    monkeypatch.setattr(ops, "automatic", lambda *_: "splash")
    plain = attention(q, k, v, implementation="xla")
    np.testing.assert_array_equal(attention(q, k, v, implementation="", mask=mask), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_give_the_numbers_of_the_batch(kind, monkeypatch):
    parts = inputs()
    assert not ops._goes_row_by_row(*parts[:2])
    whole = value_and_gradients(parts, "", **KINDS[kind])
    monkeypatch.setattr(ops, "MOST_SCORES", 3 * 4 * 9 * 9 - 1)
    assert ops._goes_row_by_row(*parts[:2])
    for ours, want in zip(value_and_gradients(parts, "", **KINDS[kind]), whole, strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-6, atol=1e-6)


def test_a_batch_that_devices_share_is_not_gone_through(monkeypatch):
    monkeypatch.setattr(ops, "MOST_SCORES", 0)
    q, k, _ = inputs()
    for devices, rows in ((1, True), (2, False)):
        mesh = sharding.make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
        with sharding.activate(mesh):
            assert ops._goes_row_by_row(q, k) == rows


def test_a_row_that_sees_no_padding_does_not_depend_on_it(monkeypatch):
    monkeypatch.setattr(ops, "MOST_SCORES", 0)
    q, k, v = inputs()
    lengths = KINDS["lengths"]["lengths"]
    padded = jnp.arange(9)[None] >= lengths[:, None]
    other = jnp.where(padded[..., None, None], 1e3, v)
    ours = attention(q, k, v, implementation="", lengths=lengths)
    theirs = attention(q, k, other, implementation="", lengths=lengths)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
