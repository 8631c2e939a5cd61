"""The fused projection and loss against its plain twin: values, gradients, chunks and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gidd_jax import hardware
from gidd_jax.loss import autoregressive_loss, gidd_loss, mdlm_loss, mdlm_weights
from gidd_jax.ops.fused_loss import chunk_size, fused_loss, pairwise_sum
from gidd_jax.ops.row_kernel import suits
from gidd_jax.parallel import sharding
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess

VOCAB, COLUMNS, WIDTH, BATCH, LENGTH = 200, 256, 32, 8, 16
UNEVEN = np.random.default_rng(7).dirichlet(np.ones(VOCAB))
UNEVEN[[0, 9]] = 0.0  # the mask, and a token that the noise never is
PROCESSES = {
    "hybrid": HybridProcess(VOCAB, VOCAB - 1, 0.1),
    "mask_only": HybridProcess(VOCAB, 3, 0.0),
    "masked": MaskedProcess(VOCAB, VOCAB - 1),
    "log_snr": LogSnrProcess(VOCAB, 5),
    "background": HybridProcess(VOCAB, 0, 0.3, background=tuple(UNEVEN / UNEVEN.sum())),
}
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]


def case(process):
    rng = np.random.default_rng(0)
    ids = [i for i in range(VOCAB) if i != process.mask_id]
    x = jnp.asarray(rng.choice(ids, (BATCH, LENGTH)), jnp.int32)
    t = process.sample_t(jax.random.key(0), BATCH)
    z_t = process.sample(jax.random.key(1), x, t)
    h = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)
    kernel = rng.normal(size=(WIDTH, COLUMNS)) * 0.5
    kernel[:, int(x[0, 0])] += 2.0  # some targets are nearly certain
    bias = jnp.asarray(rng.normal(size=COLUMNS), jnp.float32)
    return (h, jnp.asarray(kernel, jnp.float32), bias), (x, z_t, t)


def plain(process, x, z_t, t, keep):
    """The loss by the tensor of logits, as a function of what the projection is made of."""

    def loss(h, kernel, bias):
        logits = jnp.einsum("bld,dv->blv", h, kernel) + bias[None, None]
        terms = gidd_loss(process, logits, x, z_t, t, weighting="elbo", keep_padding_columns=keep)
        return jnp.mean(terms.loss), (terms.kl, terms.is_div)

    return loss


def fused(process, x, z_t, t, keep, **more):
    coefficient = process.elbo_weights(x, z_t, t) / x.size

    def loss(h, kernel, bias):
        return fused_loss(
            process,
            h,
            kernel,
            bias,
            x,
            z_t,
            t,
            coefficient,
            cross_entropy=False,
            vocab_size=VOCAB,
            keep_padding_columns=keep,
            **more,
        )

    return loss


def value_and_grads(loss, arrays):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)


def assert_same(got, want, value=1e-6, gradient=1e-5):
    (loss, terms), grads = got
    (want_loss, want_terms), want_grads = want
    np.testing.assert_allclose(loss, want_loss, rtol=value)
    for a, b in zip(terms, want_terms, strict=True):
        np.testing.assert_allclose(a, b, rtol=value, atol=value * float(jnp.max(jnp.abs(b))))
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=gradient * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", PROCESSES)
def test_fused_is_plain(name, keep, by_rows):
    process = PROCESSES[name]
    arrays, data = case(process)
    want = value_and_grads(plain(process, *data, keep), arrays)
    for size in (20, 128)[: 2 - keep]:  # one that leaves a rest, one that holds all
        loss = fused(process, *data, keep, tokens_per_chunk=size, by_rows=by_rows)
        assert_same(value_and_grads(loss, arrays), want)
        # Without gradients it is another program.
        np.testing.assert_allclose(jax.jit(loss)(*arrays)[0], want[0][0], rtol=1e-6)


def check_on_a_mesh(name, mesh_shape, by_rows=False):
    process = PROCESSES[name]
    arrays, data = case(process)
    want = value_and_grads(plain(process, *data, False), arrays)
    mesh = sharding.make_mesh(*mesh_shape)
    specs = (P(sharding.BATCH_AXES), P("fsdp", "tensor"), P("tensor"))
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
    loss = fused(
        process,
        *data,
        False,
        tokens_per_chunk=7,
        batch_axes=sharding.BATCH_AXES,
        vocab_axis=sharding.VOCAB_AXIS,
        by_rows=by_rows,
    )
    with sharding.activate(mesh):
        assert_same(value_and_grads(loss, placed), want)


@pytest.mark.parametrize(
    ("name", "mesh_shape"), [*(("hybrid", shape) for shape in MESHES), ("background", (2, 2, 2))]
)
def test_fused_on_a_mesh_is_plain(name, mesh_shape):
    check_on_a_mesh(name, mesh_shape)


@pytest.mark.parametrize(
    ("name", "mesh_shape"),
    [("background", (8, 1, 1)), ("hybrid", (2, 2, 2)), ("masked", (1, 1, 8))],
)
def test_fused_with_the_vocabulary_on_the_minor_axis_is_plain(name, mesh_shape, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check_on_a_mesh(name, mesh_shape)


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_the_kernel_on_a_mesh_is_plain(mesh_shape):
    # Split over tensor, columns are summed over devices, which a kernel cannot: it is not used.
    check_on_a_mesh("background", mesh_shape, by_rows=True)


def test_the_kernel_is_for_chips_that_hold_its_rows(monkeypatch):
    kinds = ("cpu", "NVIDIA H100", "TPU v3", "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite")
    found = {}
    for kind in kinds:
        monkeypatch.setattr(hardware, "device_kind", lambda kind=kind: kind)
        found[kind] = suits(50304)
        assert not suits(128256)
    assert [kind for kind in kinds if found[kind]] == ["TPU v5 lite", "TPU v5", "TPU v6 lite"]


@pytest.mark.parametrize("by_rows", [False, True])
def test_bfloat16_features_are_near_float64(by_rows):
    process = PROCESSES["hybrid"]
    (h, kernel, bias), data = case(process)
    low = h.astype(jnp.bfloat16)
    # What bfloat16 rounds of the inputs is no error of the loss: compare on the rounded inputs.
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    with jax.enable_x64(True):
        exact = [np.asarray(a, np.float64) for a in (low.astype(jnp.float32), rounded, bias)]
        x, z_t, t = data
        (want, _), grads = value_and_grads(
            plain(process, x, z_t, t.astype(jnp.float64), False), exact
        )
        want, grads = float(want), [np.asarray(g) for g in grads]
    loss = fused(process, *data, False, tokens_per_chunk=20, by_rows=by_rows)
    (got, _), got_grads = value_and_grads(loss, (low, rounded, bias))
    assert abs(float(got) / want - 1) < 1e-5
    for a, b in zip(got_grads, grads, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < 1e-2


@pytest.mark.parametrize("by_rows", [False, True])
def test_cross_entropy_is_mdlm_and_autoregressive(by_rows):
    process = PROCESSES["masked"]
    (h, kernel, bias), (x, z_t, t) = case(process)

    def mdlm(h, kernel, bias):
        logits = jnp.einsum("bld,dv->blv", h, kernel) + bias[None, None]
        return jnp.mean(mdlm_loss(process, logits, x, z_t, t).loss)

    def fused_mdlm(h, kernel, bias):
        weights = mdlm_weights(process, z_t, t) / x.size
        return fused_loss(
            process,
            h,
            kernel,
            bias,
            x,
            z_t,
            t,
            weights,
            cross_entropy=True,
            vocab_size=VOCAB,
            by_rows=by_rows,
        )[0]

    def causal(h, kernel, bias):
        return jnp.mean(autoregressive_loss(jnp.einsum("bld,dv->blv", h, kernel), x))

    def fused_causal(h, kernel, bias):
        ones = jnp.full((BATCH, LENGTH - 1), 1 / (BATCH * (LENGTH - 1)), jnp.float32)
        y = x[:, 1:]
        return fused_loss(
            None,
            h[:, :-1],
            kernel,
            None,
            y,
            y,
            t,
            ones,
            cross_entropy=True,
            vocab_size=COLUMNS,
            by_rows=by_rows,
        )[0]

    for got, want in ((fused_mdlm, mdlm), (fused_causal, causal)):
        a, a_grads = jax.value_and_grad(got, argnums=(0, 1))(h, kernel, bias)
        b, b_grads = jax.value_and_grad(want, argnums=(0, 1))(h, kernel, bias)
        np.testing.assert_allclose(a, b, rtol=1e-6)
        for x_grad, y_grad in zip(a_grads, b_grads, strict=True):
            scale = float(jnp.max(jnp.abs(y_grad)))
            np.testing.assert_allclose(x_grad, y_grad, rtol=0, atol=1e-5 * scale)


def test_no_array_of_all_logits_exists():
    process = PROCESSES["hybrid"]
    arrays, data = case(process)
    loss = fused(process, *data, False, tokens_per_chunk=16)
    text = jax.jit(jax.grad(lambda *a: loss(*a)[0], argnums=(0, 1))).lower(*arrays).as_text()
    assert f"{COLUMNS}x16x" in text or f"16x{COLUMNS}x" in text  # logits of a chunk
    for shape in ((BATCH, LENGTH, COLUMNS), (BATCH * LENGTH, COLUMNS), (COLUMNS, BATCH * LENGTH)):
        assert "x".join(map(str, shape)) + "xf32" not in text


def test_one_array_of_a_chunks_logits_is_held():
    columns, tokens, width = 4096, 64, 16
    process = HybridProcess(columns, 0, 0.1)
    x = jnp.ones((1, 4 * tokens), jnp.int32)
    h, kernel = jnp.ones((*x.shape, width)), jnp.ones((width, columns))

    def loss(h, kernel):
        case = x, x, jnp.full(1, 0.5), jnp.ones(x.shape)
        return fused_loss(
            process,
            h,
            kernel,
            None,
            *case,
            cross_entropy=False,
            vocab_size=columns,
            tokens_per_chunk=tokens,
        )[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(h, kernel).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    held = memory.temp_size_in_bytes
    assert 1 <= held / (4 * columns * tokens) < 1.5


def test_chunk_size_follows_the_shapes():
    assert chunk_size(50304, 768, "cpu") == 512
    assert chunk_size(128, 768, "cpu") * 128 == 1 << 20
    sizes = [chunk_size(50304, d, "gpu") for d in (256, 768, 1024, 2048, 8192)]
    assert sizes == [4096, 4096, 4096, 8192, 8192]
    assert chunk_size(1 << 18, 2048, "tpu") << 18 == 1 << 29  # 2 GiB of float32
    assert chunk_size(1 << 10, 768, "tpu") << 10 == 1 << 27


def test_pairwise_sum_keeps_small_terms():
    rng = np.random.default_rng(0)
    values = rng.random(100_001).astype(np.float32)
    values[17] = 3e6
    exact = values.astype(np.float64).sum()
    assert abs(float(pairwise_sum(jnp.asarray(values))) - exact) < 0.5
