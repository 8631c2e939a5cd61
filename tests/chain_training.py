"""Networks trained on a Markov chain, and how far what they draw is from its law."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gidd_jax.draws import row_keys
from gidd_jax.evaluation import oracle
from gidd_jax.likelihood import nelbo
from gidd_jax.sampling.loop import sample_diffusion
from gidd_jax.sampling.windows import windows_of
from gidd_jax.training.step import init_state, train_step

BATCH, DRAWN = 64, 4000


def trained(objective, chain, length, steps):
    """Parameters after steps of 64 fresh rows, by Adam with a rate that falls from 1e-3 to 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    state = nn.unbox(init_state(objective, optimizer, jax.random.key(0), use_ema=False))
    places = oracle.draw_places(chain, BATCH * steps, length, 0)
    x = jnp.asarray(oracle.chain_ids(objective.process)[places]).reshape(steps, BATCH, length)
    wrapped = optax.with_extra_args_support(optimizer)

    def step(state, x):
        batch = {"tokens": x, "mask": jnp.ones(x.shape, bool)}
        return train_step(objective, wrapped, 0.0, 1, state, batch, jax.random.key(1))[0], None

    return jax.jit(lambda state, x: jax.lax.scan(step, state, x)[0])(state, x).params


def excess(objective, params, chain, length):
    """The bound of fresh rows beyond -log p in nats a row, and three standard errors of it."""
    fresh = oracle.draw_places(chain, 512, length, 1)
    ids = jnp.asarray(oracle.chain_ids(objective.process)[fresh])
    bound = nelbo(
        objective.process,
        lambda z, t: objective.denoise(params, ids, z, t),
        jax.random.key(2),
        ids,
        num_samples_t=32,
    )
    beyond = np.asarray(bound.total.sum(-1)) + oracle.log_prob(chain, fresh)
    return beyond.mean(), 3 * np.std(beyond) / len(beyond) ** 0.5


def distance(objective, params, chain, length, options):
    """Total variation of neighbours in rows that are drawn, and that of as many exact ones."""
    process, network = objective.process, objective.model

    def draw(keys):
        def features(z, times):
            t = times if network.position_times else times[:, 0]  # all are at one time
            return network.apply({"params": params}, z, t, method="features")

        return sample_diffusion(
            process,
            features,
            options,
            keys,
            length,
            project=lambda h: network.apply({"params": params}, h, method="project"),
            windows=windows_of(network, params, options, length),
        ).ids

    drawn = jax.jit(draw)(row_keys(jax.random.key(5), jnp.arange(DRAWN)))
    found = oracle.bigrams(chain, oracle.places_of(process, np.asarray(drawn)))
    wanted = oracle.bigram_law(chain, length)
    floor = oracle.noise_floor(wanted, DRAWN * (length - 1))
    return oracle.total_variation(found, wanted), floor
