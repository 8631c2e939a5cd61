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
    "capped": {"soft_cap": 2.0},
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
        (77, 128, "capped"),
    ],
)
def test_the_kernel_gives_the_numbers_of_the_plain_form(length, features, kind, dtype):
    kind = dict(KINDS[kind])
    if "lengths" in kind:
        kind["lengths"] = jnp.array([1, length - 3])
    parts = inputs((2, length, features), (2, 1, 1), dtype)
    plain = value_and_gradients(parts, "xla", **kind)
    assert_close(value_and_gradients(parts, "splash", **kind), plain, LIMITS[dtype])


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_a_learned_key_is_seen_by_every_query_and_learns(implementation):
    """With a soft cap: by the definition, key by key, with gradients of the key and the value."""
    parts, lengths = inputs((2, 9, 64), (2, 2, 2)), jnp.array([9, 4])
    sink = jax.random.normal(jax.random.key(7), (2, 2, 64))

    def by_definition(q, k, v, sink):
        k, v = (
            jnp.concatenate([jnp.broadcast_to(s, (2, 1, 2, 64)), a], axis=1)
            for s, a in zip(sink, (k, v), strict=True)
        )
        scores = 3.0 * jnp.tanh(jnp.einsum("bthd,bshd->bhts", q, k) / 8 / 3.0)
        seen = jnp.arange(10)[None] <= lengths[:, None]
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def ours(q, k, v, sink):
        return attention(
            q,
            k,
            v,
            implementation=implementation,
            lengths=lengths,
            soft_cap=3.0,
            sink=(sink[0], sink[1]),
        )

    def gradients(form):
        def loss(*arguments):
            return jnp.sum(jnp.sin(form(*arguments)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*parts, sink)

    (found, grads), (wanted, wanted_grads) = gradients(ours), gradients(by_definition)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert_close(grads, wanted_grads, 1e-5)


def test_a_mask_and_a_cap_are_those_of_the_definition():
    q, k, v = inputs()
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (3, 1, 9, 9)).at[0, 0, 2].set(False)
    found = attention(q, k, v, implementation="xla", mask=mask, soft_cap=1e6)
    plain = attention(q, k, v, implementation="xla", mask=mask)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    causal = attention(q, k, v, implementation="xla", is_causal=True, soft_cap=1e6)
    plain = attention(q, k, v, implementation="xla", is_causal=True)
    np.testing.assert_allclose(causal, plain, atol=1e-5)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_what_a_kernel_lacks_the_plain_form_computes_unasked(monkeypatch, backend):
    """cuDNN has no soft cap and splash no mask: only who asks for the kernel by name is refused."""
    monkeypatch.setattr(ops.jax, "default_backend", lambda: backend)
    parts = inputs((2, 128, 64), (2, 1, 1), "bfloat16")
    best, kind = {
        "gpu": ("cudnn", {"soft_cap": 2.0}),
        "tpu": ("splash", {"soft_cap": 2.0, "mask": jnp.tri(128, dtype=bool)[None, None]}),
    }[backend]
    assert automatic(backend, jnp.bfloat16, 128, 64) == best
    ours = attention(*parts, implementation="", **kind)
    assert ours.dtype == jnp.bfloat16
    plain = attention(*parts, implementation="xla", **kind)
    np.testing.assert_array_equal(ours, plain)
    uncapped = attention(*parts, implementation="xla", **kind | {"soft_cap": 0.0})
    assert np.abs((plain - uncapped).astype(jnp.float32)).max() > 0.05
    with pytest.raises(InputError, match="soft cap" if backend == "gpu" else "takes no mask"):
        attention(*parts, implementation=best, **kind)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("with_sink", [False, True])
def test_what_is_cached_comes_before_the_rest(soft_cap, with_sink, dtype):
    q, k, v = inputs((2, 9, 8), dtype=dtype)
    cached = jnp.swapaxes(k[:, :6], 1, 2), jnp.transpose(v[:, :6], (0, 2, 3, 1))
    cached = tuple(a.astype(jnp.float32) for a in cached)  # it may be wider than what is computed
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (2, 1, 9, 9))
    sink = (jnp.ones((2, 8)), jnp.arange(16.0).reshape(2, 8)) if with_sink else None
    kind: dict = {"implementation": "xla", "mask": mask, "soft_cap": soft_cap, "sink": sink}
    found = attention(q, k[:, 6:], v[:, 6:], cached=cached, **kind)
    assert found.dtype == dtype
    assert_close([found], [np.asarray(attention(q, k, v, **kind))], LIMITS[dtype])


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
    with pytest.raises(InputError, match="'cudnn', which has no soft cap of scores; use 'xla'"):
        attention(q, k, v, implementation="cudnn", soft_cap=2.0)
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
