"""Training step, fused loss and sampler lower for CPU, GPU and TPU where there is only a CPU.

What the code chooses by platform (the layout of the fused loss) is made to be the choice for each
platform in turn. cuDNN's attention alone cannot be traced without cuDNN: XLA's takes its place.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from gidd_jax import hardware
from gidd_jax.cli import load_config
from gidd_jax.draws import row_keys
from gidd_jax.models.dit import DiT
from gidd_jax.models.gidd import TimeFreeTransformer
from gidd_jax.ops.attention import attention
from gidd_jax.ops.fused_loss import fused_loss
from gidd_jax.parallel import sharding
from gidd_jax.process import HybridProcess
from gidd_jax.sampling.correction import proposals, self_correct
from gidd_jax.sampling.loop import sample_diffusion
from gidd_jax.sampling.options import CorrectionOptions, SamplerOptions
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_objective
from gidd_jax.training.optimizer import learning_rate, make_optimizer
from gidd_jax.training.programs import compile_step, state_maker

PLATFORMS = ("cpu", "cuda", "tpu")
BACKENDS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}  # jax.default_backend() on each
VOCAB, BATCH, LENGTH = 250, 8, 16
PROCESS = HybridProcess(VOCAB, VOCAB - 1, 0.1)
ALL_LOGITS = f"{BATCH}x{LENGTH}x256x"


@pytest.fixture(params=PLATFORMS)
def platform(request, monkeypatch):
    """A platform, with the choices of the code as on it."""
    monkeypatch.setattr(jax, "default_backend", lambda: BACKENDS[request.param])
    kind = "TPU v5 lite" if request.param == "tpu" else ""
    monkeypatch.setattr(hardware, "device_kind", lambda: kind)
    return request.param


def lowered(function, *arguments, platform):
    """Export for a platform; the text of the program, and the function to call on it."""
    exported = export.export(function, platforms=(platform,))(*arguments)
    assert exported.platforms == (platform,)
    return exported.mlir_module(), exported.call


def settings(**changes):
    config = load_config("gidd")
    config.model.update(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        cond_dim=16,
        max_seq_len=LENGTH,
        dtype="bfloat16",
        attention="xla",
    )
    config.train.batch_size = BATCH
    config.update_from_flattened_dict(changes)
    return Settings.from_config(config)


def network():
    return DiT(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        cond_dim=16,
        max_seq_len=LENGTH,
        dtype=jnp.bfloat16,
        attention="xla",
    )


def token_ids():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, VOCAB - 1, (BATCH, LENGTH)), jnp.int32)


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)])
def test_training_step(platform, mesh_shape):
    options = settings(**{"model.remat": "full"})
    objective = build_objective(options, VOCAB, VOCAB - 1)
    optimizer = make_optimizer(options.optimizer, options.model, options.train.num_steps)
    rate = learning_rate(options.optimizer, options.train.num_steps)
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: np.prod(mesh_shape)])
    with sharding.activate(mesh):
        _, abstract = state_maker(options, objective, optimizer, mesh)
        step = compile_step(options, objective, optimizer, rate, abstract, mesh)
        rows = {
            "tokens": jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32),
            "mask": jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.bool_),
        }
        key = jax.eval_shape(lambda: jax.random.key(0))
        lowering = step.trace(abstract, rows, key).lower(lowering_platforms=(platform,))
    text = lowering.as_text()
    assert ALL_LOGITS not in text
    assert "bf16" in text
    assert re.search(r"stablehlo\.while", text)  # layers, and chunks of the loss


@pytest.mark.parametrize(
    ("mesh_shape", "head_dim", "kv_heads"), [((1, 1, 1), 64, 2), ((2, 2, 2), 128, 4)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_kernel_of_attention(monkeypatch, mesh_shape, head_dim, kv_heads, is_causal):
    """A TPU gets one kernel forward and one backward, and no scores."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")

    def loss(q, k, v, lengths):
        out = attention(q, k, v, implementation="", is_causal=is_causal, lengths=lengths)
        return jnp.sum(out.astype(jnp.float32))

    q, k, v = (
        jax.ShapeDtypeStruct((BATCH, 200, heads, head_dim), jnp.bfloat16)
        for heads in (4, kv_heads, kv_heads)
    )
    lengths = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: np.prod(mesh_shape)])
    with sharding.activate(mesh):
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        traced = gradient.trace(q, k, v, lengths)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2
    assert not re.search(r"tensor<[\dx]*(200x200|256x256)x", text)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fused_loss(platform, dtype):
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.normal(size=(BATCH, LENGTH, 32)), dtype)
    kernel = jnp.asarray(rng.normal(size=(32, 256)), jnp.float32)
    x, t = token_ids(), jnp.linspace(0.1, 0.9, BATCH)
    z_t = PROCESS.sample(jax.random.key(0), x, t)

    def loss(h, kernel):
        weights = PROCESS.loss_weights(x, z_t, t)
        return fused_loss(
            PROCESS,
            h,
            kernel,
            None,
            x,
            z_t,
            t,
            weights,
            cross_entropy=False,
            vocab_size=VOCAB,
            tokens_per_chunk=48,  # three chunks of 43
        )[0]

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text, call = lowered(grad, h, kernel, platform=platform)
    # The vocabulary lies on the major axis of the logits on CPU alone.
    assert ("tensor<256x43xf32>" in text) == (platform == "cpu")
    # A TPU's kernel takes them by 16 rows.
    assert ("tensor<43x256xf32>" in text) == (platform == "cuda")
    assert ("tensor<48x256xf32>" in text) == (platform == "tpu")
    assert text.count("@tpu_custom_call") == (platform == "tpu")
    assert ALL_LOGITS not in text
    if platform == "cpu":
        value, grads = call(h, kernel)
        want, want_grads = grad(h, kernel)
        np.testing.assert_array_equal(value, want)
        np.testing.assert_array_equal(grads[1], want_grads[1])


@pytest.mark.parametrize(
    ("mesh_shape", "columns", "kernels"),
    [
        ((8, 1, 1), 256, 1),
        ((2, 4, 1), 256, 1),
        ((2, 2, 2), 251, 1),
        ((2, 2, 2), 256, 0),
        ((1, 1, 8), 256, 0),
        ((1, 1, 8), 250, 0),
    ],
)
def test_the_kernel_of_the_loss_on_a_mesh(monkeypatch, mesh_shape, columns, kernels):
    """It is used wherever a device has all columns, and can be told which rows are its own."""
    monkeypatch.setattr(hardware, "device_kind", lambda: "TPU v5 lite")

    def loss(h, kernel, x, t):
        axes = {"batch_axes": sharding.BATCH_AXES, "vocab_axis": sharding.VOCAB_AXIS}
        options = {"cross_entropy": False, "vocab_size": VOCAB}
        ones = jnp.ones(x.shape)
        return fused_loss(PROCESS, h, kernel, None, x, x, t, ones, **axes, **options)[0]

    h = jax.ShapeDtypeStruct((BATCH, LENGTH, 32), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((32, columns), jnp.float32)
    with sharding.activate(sharding.make_mesh(*mesh_shape)):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        traced = gradient.trace(h, kernel, token_ids(), jnp.full(BATCH, 0.5))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == kernels


@pytest.mark.parametrize("method", ["ancestral", "adaptive", "confidence"])
def test_sampler(platform, method):
    model = network()
    params = jax.eval_shape(model.init, jax.random.key(0), token_ids(), jnp.ones(BATCH))["params"]
    params = sharding.unbox(params)
    options = SamplerOptions(num_steps=3, method=method)

    def sample(params, keys):
        def denoise(z_t, t):
            return model.apply({"params": params}, z_t, t)

        return sample_diffusion(PROCESS, denoise, options, keys, LENGTH).ids

    keys = row_keys(jax.random.key(1), jnp.arange(BATCH))
    text, _ = lowered(jax.jit(sample), params, keys, platform=platform)
    assert "bf16" in text
    assert "stablehlo.while" in text  # one program for all steps


@pytest.mark.parametrize("length", [LENGTH, 128])
def test_the_network_without_times(platform, length):
    """Its soft cap and learned key, forward and backward, with what each platform takes unasked:
    only a TPU whose lanes a sequence fills has a kernel for them."""
    model = TimeFreeTransformer(VOCAB, 128, 2, 2, max_seq_len=length, dtype=jnp.bfloat16)
    assert model.soft_cap > 0
    assert model.sink
    ids = jnp.zeros((BATCH, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids, jnp.ones(BATCH))["params"]
    params = sharding.unbox(params)

    def loss(params, ids):
        return jnp.mean(jnp.square(model.apply({"params": params}, ids, jnp.ones(BATCH))))

    traced = jax.jit(jax.grad(loss)).trace(params, ids)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    has_kernel = platform == "tpu" and length == 128
    assert text.count("@tpu_custom_call") == (2 if has_kernel else 0)
    assert "cudnn" not in text
    assert ("stablehlo.tanh" in text) != has_kernel  # of the cap: elsewhere none
    scores = rf"tensor<{BATCH}x2x1x{length}x{length + 1}x"
    assert bool(re.search(scores, text)) != has_kernel


def test_self_correction(platform):
    model = network()
    params = jax.eval_shape(model.init, jax.random.key(0), token_ids(), jnp.ones(BATCH))["params"]
    params = sharding.unbox(params)

    def correct(params, keys, z):
        def denoise(z_t, t):
            return model.apply({"params": params}, z_t, t)

        free = jnp.ones(z.shape, bool)
        options = CorrectionOptions(num_steps=3)
        return self_correct(PROCESS, denoise, options, z, free, proposals(keys)).ids

    keys = row_keys(jax.random.key(1), jnp.arange(BATCH))
    text, _ = lowered(jax.jit(correct), params, keys, token_ids(), platform=platform)
    assert "stablehlo.while" in text


def test_one_program_for_all_platforms_computes_what_jit_does():
    key, x, t = jax.random.key(0), token_ids(), jnp.linspace(0.1, 0.9, BATCH)
    exported = export.export(jax.jit(PROCESS.sample), platforms=PLATFORMS)(key, x, t)
    assert exported.platforms == PLATFORMS
    np.testing.assert_array_equal(exported.call(key, x, t), PROCESS.sample(key, x, t))
