"""One device and many compute the same run, with every optimizer."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import (
    VOCAB_SIZE,
    tiny_settings,
)

from gidd_jax.parallel import sharding
from gidd_jax.settings import Settings
from gidd_jax.training import loop, programs
from gidd_jax.training.build import build_objective
from gidd_jax.training.optimizer import learning_rate, make_optimizer
from gidd_jax.training.step import TrainState


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Corpus and tokenizer."""
    return tmp_path_factory.mktemp("data")


MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
NAMES = ["gidd", "mdlm", "ar"]


def run_steps(
    settings: Settings,
    sizes: tuple[int, int, int],
    *,
    start: TrainState | None = None,
    num_steps: int = 10,
    new_batches: bool = True,
) -> tuple[TrainState, TrainState, list[float]]:
    """The first and the last state and the losses of steps on random tokens.

    On the first devices; from `start`, or from an initialisation on the mesh.
    """
    objective = build_objective(settings, VOCAB_SIZE, VOCAB_SIZE - 1)
    optimizer = make_optimizer(settings.optimizer, settings.model, settings.train.num_steps)
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    rng, losses = np.random.default_rng(0), []
    with sharding.activate(mesh):
        make_state, abstract = programs.state_maker(settings, objective, optimizer, mesh)
        rate = learning_rate(settings.optimizer, settings.train.num_steps)
        step_fn = programs.compile_step(settings, objective, optimizer, rate, abstract, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.device_put(start, shardings) if start else make_state(jax.random.key(0))
        first, batch = jax.device_get(state), None
        for _ in range(num_steps):
            if batch is None or new_batches:
                mask = np.arange(16) < rng.integers(1, 17, (8, 1))
                batch = {"tokens": rng.integers(0, 257, (8, 16)).astype(np.int32), "mask": mask}
            state, metrics = step_fn(state, loop.put_batch(batch, mesh), jax.random.key(1))
            losses.append(float(metrics.loss.compute()))
    return first, state, losses


def mesh_settings(folder: Path, name: str) -> Settings:
    return tiny_settings(folder, name, **{"train.mask_padding": True})


@pytest.fixture(scope="module", params=NAMES)
def one_device(request, folder) -> tuple[str, TrainState, TrainState, list[float]]:
    first, last, losses = run_steps(mesh_settings(folder, request.param), (1, 1, 1))
    assert max(losses) - min(losses) > 0.01
    return request.param, first, last, losses


@pytest.mark.parametrize("sizes", MESHES)
def test_devices_do_not_change_the_run(one_device, folder, sizes):
    name, start, alone, expected = one_device
    # One case initialises on the mesh: that draws the same numbers too.
    given = None if (name, sizes) == ("gidd", (2, 2, 2)) else start
    first, state, losses = run_steps(mesh_settings(folder, name), sizes, start=given)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(start), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    # What a step leaves is spread as asked, moments included, and is the same model.
    parts = int(np.prod(sizes[1:]))
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "mlp_in" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 2
    for array in (state.params["blocks"]["mlp_in"]["kernel"], *moments):
        assert array.shape == (2, 32, 128)
        assert len(array.addressable_shards) == 8
        assert array.addressable_shards[0].data.size == array.size // parts
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("optimizer", [pytest.param("psgd", marks=pytest.mark.slow), "muon"])
def test_every_optimizer_trains_sharded_parameters(folder, optimizer):
    changes = {
        "optimizer.name": optimizer,
        "optimizer.schedule": "constant",
        "optimizer.learning_rate": 3e-3,
    }
    settings = tiny_settings(folder, "ar", **changes)
    # The preconditioners of psgd multiply vectors and matrices as NumPy would.
    with jax.numpy_rank_promotion("allow"):
        _, state, losses = run_steps(settings, (1, 2, 1), num_steps=5, new_batches=False)
    kernel = state.params["blocks"]["mlp_in"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 128)
    assert int(state.step) == 5
    assert losses[-1] < losses[0] - 0.05
    assert all(np.isfinite(losses))
