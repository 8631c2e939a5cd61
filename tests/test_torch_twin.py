"""The PyTorch twin of the benchmarks computes what we compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import inputs
from gidd_jax.loss import gidd_loss
from gidd_jax.models.dit import DiT
from gidd_jax.ops.fused_loss import fused_loss
from gidd_jax.process import HybridProcess

VOCAB = 256


@pytest.fixture(scope="module")
def twin():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # its threads and those of JAX would wait for each other
    from benchmarks import torch_twin

    return torch_twin


def both():
    process = HybridProcess(VOCAB, VOCAB - 1, 0.1)
    shape = {"vocab_size": VOCAB, "hidden_size": 32}
    h, kernel, bias = inputs.projection(shape, 64)
    x = inputs.token_ids(shape, 4, 16)
    t = inputs.times(4)
    return process, (h.reshape(4, 16, -1), kernel, bias), (x, inputs.noisy_ids(shape, x, t), t)


def tensors(arrays):
    import torch

    found = (torch.from_numpy(np.array(a)) for a in arrays)
    return [a.long() if a.dtype == torch.int32 else a for a in found]


def test_the_twins_loss_is_ours(twin):
    process, arrays, (x, z_t, t) = both()
    theirs = twin.Hybrid(VOCAB, VOCAB - 1, 0.1)
    logits = arrays[0] @ arrays[1] + arrays[2]
    want = gidd_loss(process, jnp.asarray(logits), x, z_t, t)
    got = twin.mean_loss(theirs, *tensors((logits, x, z_t, t)))
    np.testing.assert_allclose(float(got), float(jnp.mean(want.loss)), rtol=1e-5)
    kl, is_div = twin.divergences(theirs, *tensors((logits, x, z_t, t)))
    np.testing.assert_allclose(kl, want.kl, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(is_div, want.is_div, rtol=1e-4, atol=1e-5)
    elbo = theirs.elbo_weights(*tensors((x, z_t, t)))
    np.testing.assert_allclose(elbo, process.elbo_weights(x, z_t, t), rtol=1e-5)


def test_the_twins_gradients_are_ours(twin):
    process, arrays, (x, z_t, t) = both()

    def loss(h, kernel, bias):
        weights = process.loss_weights(x, z_t, t) / x.size
        data = (x, z_t, t, weights)
        return fused_loss(process, h, kernel, bias, *data, cross_entropy=False, vocab_size=VOCAB)[0]

    value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, arrays))
    weights = [a.requires_grad_() for a in tensors(arrays)]
    theirs = twin.Hybrid(VOCAB, VOCAB - 1, 0.1)
    got = twin.projected_loss(theirs, *weights, *tensors((x, z_t, t)))
    got.backward()
    np.testing.assert_allclose(float(got.detach()), float(value), rtol=1e-5)
    for a, want in zip(weights, grads, strict=True):
        scale = float(jnp.max(jnp.abs(want)))
        np.testing.assert_allclose(a.grad, want, rtol=0, atol=1e-4 * scale)


def test_the_twins_posterior_and_noise_are_ours(twin):
    process, arrays, (_, z_t, t) = both()
    x_hat = np.exp(arrays[0] @ arrays[1])
    x_hat[..., -1] = 0.0  # the mask
    x_hat /= x_hat.sum(-1, keepdims=True)
    s = 0.9 * t
    want = process.posterior_probs(x_hat, z_t, t, s)
    theirs = twin.Hybrid(VOCAB, VOCAB - 1, 0.1)
    got = theirs.posterior(*tensors((x_hat, z_t, t, s)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(theirs.noise(*tensors((t,))), process.noise_probs(t), rtol=1e-5)


def test_the_twins_draws_follow_their_distribution(twin):
    import torch

    torch.manual_seed(0)
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = twin.draw(probs.expand(20_000, 4))
    share = torch.bincount(drawn, minlength=4) / 20_000
    assert share[1] == 0
    np.testing.assert_allclose(share, probs, atol=0.015)


def test_the_twins_network_is_ours(twin):
    network = DiT(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, cond_dim=16)
    _, _, (_, z_t, t) = both()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * rng.standard_normal(a.shape, np.float32),
        inputs.random_parameters(network),
    )
    want = network.apply({"params": params}, z_t, t)
    theirs = twin.DiT(VOCAB, 32, 2, 4, 16)
    twin.load_parameters(theirs, params)
    got = theirs(*tensors((z_t, t))).detach()
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.max(jnp.abs(want))))


def test_the_twins_step_lowers_its_loss_and_its_sampler_fills_masks(twin):
    import torch

    torch.manual_seed(0)
    process = twin.Hybrid(16, 15, 0.1)
    model = twin.DiT(16, 32, 2, 4, 16)
    training = twin.TrainingStep(process, model, False, torch.float32)
    x = torch.full((8, 8), 3)
    losses = [float(training(x)) for _ in range(40)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    sampler = twin.Sampler(process, model, False, torch.float32)
    z = sampler(4, 8, 16, "cpu")
    assert (z == 3).float().mean() > 0.6
    wrong = z.clone()
    wrong[:, 0] = 5
    corrected = sampler.correct(wrong, num_steps=20, temperature=0.1, time=0.01, patience=20)
    assert (corrected == 3).float().mean() > (wrong == 3).float().mean()
