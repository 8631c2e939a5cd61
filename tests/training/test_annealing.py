"""What is given up of a start step by step: attention and noise, in one program."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import tiny_settings

from gidd_jax.process import HybridProcess
from gidd_jax.training.annealing import CAUSAL, NOTHING, Annealing
from gidd_jax.training.build import build_objective
from gidd_jax.training.objective import Objective
from gidd_jax.training.step import init_state

P = 0.3


@pytest.fixture(scope="module")
def objective(tmp_path_factory) -> Objective:
    folder = tmp_path_factory.mktemp("tiny")
    llama = {"model.name": "llama", "model.shift": True}
    steps = {"adapt.attention_steps": 10, "adapt.noise_steps": 4, "process.p_uniform": P}
    return build_objective(tiny_settings(folder, **llama, **steps), 40, 39)


def test_later_tokens_come_in_evenly():
    bias = [float(Annealing(10).future(jnp.int32(step))) for step in range(14)]
    assert bias[0] == CAUSAL
    np.testing.assert_allclose(np.exp(bias[1:]), np.minimum(np.arange(1, 14) / 10, 1), rtol=1e-6)
    assert bias[10:] == [0.0] * 4
    assert NOTHING.future(jnp.int32(3)) is None


def test_noise_comes_in_evenly_from_masks_alone():
    process, annealing = HybridProcess(40, 39, P), Annealing(noise_steps=4)
    t = jnp.linspace(0.05, 0.95, 7)
    for step, share in ((0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        fixed, found = HybridProcess(40, 39, P * share), annealing.process(process, jnp.int32(step))
        for a, b in zip(fixed.beta_pi(t), found.beta_pi(t), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5)
        np.testing.assert_allclose(found.log_b, fixed.log_b, rtol=1e-6)
    assert NOTHING.process(process, jnp.int32(1)) is process


@pytest.mark.parametrize("weighting", ["dynamic", "elbo", "dynamic_unbiased"])
def test_a_step_is_that_of_the_process_with_its_share(objective, weighting):
    """Noise, loss and gradient, from a program that is compiled once for all steps."""
    objective = dataclasses.replace(objective, weighting=weighting)
    params = init_state(objective, optax.identity(), jax.random.key(0), use_ema=False).params
    params = nn.unbox(params)
    x, mask = jax.random.randint(jax.random.key(1), (4, 16), 0, 39), jnp.ones((4, 16), bool)
    coefficient = jnp.full((4, 16), 1 / 64)

    def gradient_of(objective: Objective, params):
        def loss_of(params):
            noised = objective.noise(jax.random.key(2), x, mask)
            return objective.summed_loss(params, x, noised, coefficient)[0], noised.z_t

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    annealed = jax.jit(lambda params, step: gradient_of(objective.at(step), params))
    for step in (0, 2, 7):
        fixed = dataclasses.replace(
            objective,
            process=HybridProcess(40, 39, P * min(step / 4, 1)),
            annealing=NOTHING,
            future=objective.annealing.future(jnp.int32(step)),
        )
        (wanted, z), gradient = jax.jit(functools.partial(gradient_of, fixed))(params)
        (found, z_found), found_gradient = annealed(params, jnp.int32(step))
        np.testing.assert_array_equal(z_found, z)
        np.testing.assert_allclose(found, wanted, rtol=2e-6)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(found_gradient), strict=True):
            np.testing.assert_allclose(b, a, atol=1e-6 * max(float(jnp.abs(a).max()), 1e-3))
    assert annealed._cache_size() == 1


def test_masks_alone_come_first(objective):
    x, mask = jax.random.randint(jax.random.key(1), (64, 16), 0, 39), jnp.ones((64, 16), bool)
    first, last = (objective.at(jnp.int32(s)).noise(jax.random.key(3), x, mask) for s in (0, 4))
    is_other = (first.z_t != x) & (first.z_t != 39)
    assert not is_other.any()
    assert ((last.z_t != x) & (last.z_t != 39)).mean() > 0.05


def test_full_attention_is_what_is_left(objective):
    later = objective.unannealed().at(jnp.int32(20))
    assert later.future is None
    assert objective.at(jnp.int32(20)).future == 0.0
    assert float(later.process.p_uniform) == pytest.approx(P)
