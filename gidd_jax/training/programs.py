"""The programs of a run, compiled for its mesh: the first state, the step, the evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gidd_jax.parallel import sharding
from gidd_jax.settings import Settings
from gidd_jax.training.metrics import StepMetrics
from gidd_jax.training.objective import Objective, Params
from gidd_jax.training.step import (
    TrainState,
    evaluation_step,
    init_state,
    split_micro_batches,
    started,
    train_step,
)


def state_maker(
    settings: Settings,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> tuple[Callable[..., TrainState], TrainState]:
    """Return what makes the first state on the mesh, of a key or parameters, and its description.

    The description holds a jax.ShapeDtypeStruct with its sharding for every array.
    """
    use_ema = settings.optimizer.ema_decay > 0

    def init(key: jax.Array) -> Any:
        return init_state(objective, optimizer, key, use_ema=use_ema)

    def unboxed_init(key: jax.Array) -> Any:
        return sharding.unbox(init(key))

    key = jax.random.key(0)
    shardings = sharding.state_shardings(jax.eval_shape(init, key), mesh)
    abstract = sharding.placed(jax.eval_shape(unboxed_init, key), shardings)

    def make(key: jax.Array, params: Params | None = None) -> TrainState:
        if params is None:
            return jax.jit(unboxed_init, out_shardings=shardings)(key)
        layout = shardings.params if shardings.base is None else shardings.base

        def begin(params: Params, key: jax.Array) -> TrainState:
            return started(objective, params, optimizer, key, use_ema)

        begun = jax.jit(begin, out_shardings=shardings)
        return begun(jax.device_put(params, layout), key)

    return make, abstract


def compile_step(
    settings: Settings,
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    rate: Callable[[Any], Any],
    abstract_state: TrainState,
    mesh: jax.sharding.Mesh,
) -> Callable[..., Any]:
    """Return the jitted step (state, batch, run key) -> (state, metrics); state is donated."""

    def step(state: TrainState, batch: Any, run_key: jax.Array) -> Any:
        new_state, metrics = train_step(
            objective,
            optimizer,
            settings.optimizer.ema_decay,
            settings.train.micro_batches,
            state,
            batch,
            run_key,
        )
        metrics["learning_rate"] = rate(state.step)
        return new_state, StepMetrics.single_from_model_output(**metrics)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh), sharding.replicated(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def compile_evaluation(
    settings: Settings, objective: Objective, abstract_state: TrainState, mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
    """Return the jitted evaluation (parameters, frozen ones, batch, key) -> sums over the batch.

    It works on as many rows at a time as a training step does: their logits must fit.
    """
    parts = settings.train.micro_batches

    def evaluation(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        def part_sums(part: Any) -> Any:
            number, rows = part
            return evaluation_step(
                objective.on(frozen), params, rows, jax.random.fold_in(key, number)
            )

        sums = jax.lax.map(part_sums, (jnp.arange(parts), split_micro_batches(batch, parts)))
        return jax.tree.map(lambda a: jnp.sum(a, axis=0), sums)

    parts_of_state = abstract_state.params, abstract_state.base
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parts_of_state)
    return jax.jit(
        evaluation,
        in_shardings=(*shardings, sharding.batch_sharding(mesh), sharding.replicated(mesh)),
        out_shardings=sharding.replicated(mesh),
    )
