"""Twelve updates of the scaling paper's training, against its code's numbers.

The whole of it: network, mask of prompts, loss, CompleteP's groups, LaProp and WSD.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gidd_jax.cli import load_config
from gidd_jax.interchange.tensors import TorchTensors, gidd_format, params_from_torch
from gidd_jax.loss import gidd_divergences, gidd_loss
from gidd_jax.models.gidd import TimeFreeTransformer, sees_prompt
from gidd_jax.process import LogSnrProcess, expand_time
from gidd_jax.settings import Settings
from gidd_jax.training.optimizer import completep_group, make_optimizer

VOCAB, MASK, WIDTH, DEPTH, HEADS, STEPS = 97, 3, 32, 2, 4, 12
GROUPS = ("bulk", "norm", "bias", "embedding", "head")  # columns of the reference's norms
FORMAT = gidd_format(HEADS, normed_heads=True, sink=True, mlp_bias=True, tie_embeddings=False)
STARTS = {
    "init": "s08_init_weights.safetensors",
    "strong": "s01_hf_published/model.safetensors",
}


@dataclasses.dataclass(frozen=True)
class Trace:
    """How a trace differs from the others."""

    start: str
    shift: float
    rate: float
    b2: float
    decays: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of matrices, norms, biases
    is_mean: bool = False


TRACES = {
    "init_uniform": Trace("init", 1000.0, 0.4, 0.99),
    "strong_hybrid": Trace("strong", 0.0, 0.25, 0.98, (0.01, 0.02, 0.03)),
    "strong_mask_mean": Trace("strong", -1000.0, 0.3, 0.99, is_mean=True),
}


def optimizer_of(trace: Trace) -> optax.GradientTransformation:
    base = Settings.from_config(load_config("base"))
    model = dataclasses.replace(
        base.model, name="gidd", parametrization="completep", hidden_size=WIDTH, num_layers=DEPTH
    )
    decay, norm_decay, bias_decay = trace.decays
    settings = dataclasses.replace(
        base.optimizer,
        name="laprop",
        learning_rate=trace.rate,
        b2=trace.b2,
        eps=1e-8,
        weight_decay=decay,
        norm_decay=norm_decay,
        bias_decay=bias_decay,
        clip_norm=0.0,
        schedule="wsd",
        warmup_steps=3,
        cooldown_steps=4,
    )
    return make_optimizer(settings, model, STEPS)


def run(trace: Trace, golden_scaling, name: str):
    """Return losses, norms of gradients and parameters, metrics by step, and both ends."""
    arrays = golden_scaling("s08_training_trace.npz")
    start = params_from_torch(golden_scaling(STARTS[trace.start]), FORMAT, DEPTH)
    params = jax.tree.map(lambda a: jnp.asarray(a, float), start)
    network = TimeFreeTransformer(
        VOCAB,
        WIDTH,
        DEPTH,
        HEADS,
        max_seq_len=48,
        head_scale=512 / WIDTH,
        dtype=jnp.zeros(()).dtype,
    )
    process = LogSnrProcess(VOCAB, MASK, 1.0, trace.shift)
    optimizer = optimizer_of(trace)

    def loss(params, x, z_t, noisy, log_snr):
        def logits(model):
            h, _ = model.run(z_t, jnp.arange(x.shape[1]), sees_prompt(~noisy)[:, None])
            return model.project(h)

        times = jax.nn.sigmoid(-log_snr)
        terms = gidd_loss(
            process, network.apply({"params": params}, method=logits), x, z_t, times, max_weight=1e3
        )
        count = jnp.sum(noisy)
        weights = process.dynamic_weights(x, z_t, times, v1_1=False)
        parts = (terms.loss, terms.elbo, weights * terms.kl, weights * terms.is_div)
        total, *sums = (jnp.sum(jnp.where(noisy, value, 0.0)) for value in parts)
        metrics = jnp.stack([*(value / count for value in sums), count])
        return total / count if trace.is_mean else total, metrics

    @jax.jit
    def step(params, state, *batch):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, (value, metrics, group_norms(grads), group_norms(params)), grads

    state, found, first = optimizer.init(params), [], None
    for number in range(STEPS):
        batch = [arrays["labels"], arrays[f"{name}/z"], arrays["noise_mask"]]
        batch.append(arrays["log_snr"].astype(jnp.zeros(()).dtype))
        params, state, figures, grads = step(params, state, *(a[number] for a in batch))
        found.append(figures)
        first = grads if number == 0 else first
    values, metrics, grad_norms, param_norms = (np.stack(a) for a in zip(*found, strict=True))
    return values, metrics, grad_norms, param_norms, params, first


def group_norms(tree):
    squares = dict.fromkeys(GROUPS, 0.0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [entry.key for entry in path]
        group = "head" if "output" in names else completep_group(names)
        squares[group] += jnp.sum(jnp.square(leaf))
    return jnp.sqrt(jnp.stack([squares[group] for group in GROUPS]))


def with_floor(process, log_x_hat, x, z_t, t):
    """The divergences with the reference's 1e-12 on the model's probability of z_t.

    Without it late losses differ by 2e-9: LaProp divides by gradients that are nearly 0.
    """
    kl, is_div = gidd_divergences(process, log_x_hat, x, z_t, t)
    alpha, mass = process.alpha(expand_time(t, x)), process.beta_pi(expand_time(t, x))
    at_z = process.mass_at(mass, z_t)
    x_hat = jnp.exp(jnp.take_along_axis(log_x_hat, z_t[..., None], -1)[..., 0])
    q, p = jnp.where(z_t == x, alpha, 0.0) + at_z, alpha * x_hat + at_z
    p = jnp.where(at_z > 0, p, 1.0)
    return kl, is_div + jnp.where(at_z > 0, q / (p + 1e-12) - q / p, 0.0)


@pytest.mark.parametrize("name", TRACES)
def test_trace_is_the_scaling_papers(golden_scaling, monkeypatch, name):
    monkeypatch.setattr("gidd_jax.loss.gidd_divergences", with_floor)
    with jax.enable_x64(True):
        found = run(TRACES[name], golden_scaling, name)
    arrays = golden_scaling("s08_training_trace.npz")
    losses, metrics, grad_norms, param_norms, params, first = found
    for key, value in {
        "loss": losses,
        "metrics": metrics,
        "grad_norms": grad_norms,
        "param_norms": param_norms,
    }.items():
        want = arrays[f"{name}/{key}/f64"]
        np.testing.assert_allclose(value, want, rtol=1e-9, atol=1e-11, err_msg=key)
    tensors = TorchTensors(params)
    sums = [(np.sum(a), np.sum(np.square(a))) for a in map(tensors.get, sorted(tensors))]
    want = arrays[f"{name}/final_checksum/f64"]
    np.testing.assert_allclose(sums, want, rtol=1e-9, atol=1e-11)
    if name == "strong_hybrid":  # the only one of which numbers are stored, in float32
        prefix, suffix = f"{name}/grad0/", "/f64"
        names = [n for n in arrays if n.startswith(prefix)]
        grads = {n.removeprefix(prefix).removesuffix(suffix): arrays[n] for n in names}
        final = golden_scaling("s08_strong_hybrid_final.safetensors")
        for found, wanted in ((tensors, final), (TorchTensors(first), grads)):
            assert len(wanted) > 15
            for key, value in wanted.items():
                np.testing.assert_allclose(found[key], value, rtol=2e-7, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", TRACES)
def test_trace_in_float32(golden_scaling, name):
    losses = run(TRACES[name], golden_scaling, name)[0]
    arrays = golden_scaling("s08_training_trace.npz")
    np.testing.assert_allclose(losses, arrays[f"{name}/loss/f32"], rtol=1e-5)
