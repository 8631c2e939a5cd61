"""Logits only where a token can change: the same step as with all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gidd_jax.draws import row_keys
from gidd_jax.filters import unnormalised
from gidd_jax.loss import log_probs_at
from gidd_jax.options import SamplerOptions
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess
from gidd_jax.sampler import Prompt, sample_diffusion
from gidd_jax.steps import ancestral_draws, ancestral_step, needs_x_hat
from gidd_jax.thinning import group_size, thinned_step

pytestmark = pytest.mark.usefixtures("compile_quickly")

V, D, B = 11, 6, 4
PROCESSES = {
    "hybrid": HybridProcess(V, 10, 0.2),
    "mostly uniform": HybridProcess(V, 3, 0.8, gamma=0.5),
    "masked": MaskedProcess(V, 10),
    "log-SNR": LogSnrProcess(V, 10),
}
KERNEL = 2 * jax.random.normal(jax.random.key(5), (D, V))
KEYS = row_keys(jax.random.key(1), jnp.arange(B))
TIMES = [(0.999, 0.9), (0.7, 0.5), (0.5, 0.1), (0.2, 0.19)]


def log_x_hat_of(process, features):
    excluded = (jnp.arange(V) == process.mask_id)[None, None]
    return jax.nn.log_softmax(jnp.where(excluded, -jnp.inf, features @ KERNEL))


@pytest.mark.parametrize("kappa", [1.0, 0.7])
@pytest.mark.parametrize("name", PROCESSES)
def test_thinned_steps_are_dense_steps(name, kappa):
    """Token for token, at every time, for rows of one group and of several."""
    process = PROCESSES[name]

    @jax.jit
    def both(z_t, t, s, active, features):
        log_x_hat = log_x_hat_of(process, features)
        dense = ancestral_step(process, KEYS, jnp.exp(log_x_hat), z_t, t, s, kappa)
        thinned, log_probs = thinned_step(
            process,
            KEYS,
            # Logits, and weights of another sum than 1.
            lambda at: 3 + log_x_hat_of(process, jnp.take_along_axis(features, at[..., None], 1)),
            unnormalised,
            z_t,
            active,
            t,
            s,
            kappa,
        )
        return dense, log_probs_at(log_x_hat, dense), thinned, log_probs

    changes = 0
    for length in (5, 70):
        assert (length > group_size(length)) == (length == 70)
        for number, (t, s) in enumerate(TIMES):
            key = jax.random.fold_in(jax.random.key(2), number)
            features = jax.random.normal(key, (B, length, D))
            x = jax.random.randint(key, (B, length), 0, V - 1)
            x = jnp.where(x == process.mask_id, V - 1, x)
            z_t = process.sample(key, x, jnp.full(B, t))
            active = jax.random.bernoulli(key, 0.8, (B, length))
            dense, dense_log_probs, thinned, log_probs = both(z_t, t, s, active, features)
            np.testing.assert_array_equal(thinned, jnp.where(active, dense, z_t))
            changed = np.asarray(active & (thinned != z_t) & (thinned != process.mask_id))
            np.testing.assert_allclose(log_probs[changed], dense_log_probs[changed], rtol=2e-5)
            changes += changed.sum()
    assert changes > 100


def test_with_masks_alone_the_network_is_asked_exactly_where_a_mask_is_lifted():
    process = PROCESSES["masked"]
    z_t = jnp.full((B, 200), process.mask_id).at[:, ::3].set(1)
    draws = ancestral_draws(process, KEYS, z_t, 0.5, 0.4, num_columns=V)
    asked = needs_x_hat(process, draws, z_t)
    x_hat = jnp.exp(log_x_hat_of(process, jax.random.normal(jax.random.key(0), (B, 200, D))))
    lifted = ancestral_step(process, KEYS, x_hat, z_t, 0.5, 0.4) != z_t
    np.testing.assert_array_equal(asked, lifted)
    # A share of 1 - 0.4 / 0.5 of the 532 masks, give or take.
    assert 70 < lifted.sum() < 145


@pytest.mark.parametrize("method", ["ancestral", "psi"])
def test_whole_runs_from_features_are_those_from_logits(method):
    """Prompts, filters, blocks and the fill of leftover masks included."""
    process, length = PROCESSES["hybrid"], 40
    table = jax.random.normal(jax.random.key(3), (V, D))

    def features(z, t):
        return table[z] + jnp.sin(jnp.cumsum(table[z], axis=1)) + t[:, None, None]

    options = SamplerOptions(
        method=method, num_steps=6, temperature=0.8, top_p=0.95, block_length=16
    )
    free = np.arange(length)[None] >= np.array([0, 3, 10, 30])[:, None]
    prompt = Prompt(jnp.ones((B, length), jnp.int32), jnp.asarray(free))
    runs = []
    for denoise, project in (
        (features, lambda h: h @ KERNEL),
        (lambda z, t: features(z, t) @ KERNEL, lambda h: h),
    ):
        run = jax.jit(
            lambda keys, denoise=denoise, project=project: sample_diffusion(
                process, denoise, options, keys, length, prompt, num_free=length, project=project
            )
        )
        runs.append(run(KEYS))
    np.testing.assert_array_equal(runs[0].ids, runs[1].ids)
    np.testing.assert_array_equal(runs[0].drawn_at, runs[1].drawn_at)
    np.testing.assert_allclose(runs[0].log_probs, runs[1].log_probs, rtol=1e-4, atol=1e-5)
    assert (np.asarray(runs[0].ids)[~free] == 1).all()
