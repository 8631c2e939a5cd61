"""The training state, and the pure train and evaluation steps over it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gidd_jax.likelihood import autoregressive_nelbo, nelbo
from gidd_jax.parallel.sharding import placed, state_shardings, unbox
from gidd_jax.training.noising import Noised
from gidd_jax.training.objective import Batch, Objective, Params


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes: the step counts finished updates; ema is None when off."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None

    @property
    def base(self) -> Params | None:
        """Parameters that stay, beside which `params` are adapters; None: there are none."""
        return None


class AdaptedState(TrainState):
    """The state of a run that trains adapters."""

    frozen: Params

    @property
    def base(self) -> Params:
        return self.frozen


def init_state(
    objective: Objective, optimizer: optax.GradientTransformation, key: jax.Array, use_ema: bool
) -> TrainState:
    """Return the state before the first step; parameters still boxed with their axis names."""
    ids = jnp.zeros((1, min(8, objective.model.max_seq_len)), jnp.int32)
    inputs = (ids,) if objective.process is None else (ids, jnp.zeros(1, jnp.float32))
    params = objective.model.init(key, *inputs)["params"]
    return started(objective, params, optimizer, key, use_ema)


def started(
    objective: Objective,
    params: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    use_ema: bool,
) -> TrainState:
    """Return the state before the first step that begins with these parameters of the network."""
    adapters = None
    if objective.lora is not None:
        adapters = objective.lora.adapters(params, jax.random.fold_in(key, 1))
    trained = params if adapters is None else adapters
    ema = jax.tree.map(jnp.copy, trained) if use_ema else None
    state = jnp.zeros((), jnp.int32), trained, optimizer.init(trained), ema
    return TrainState(*state) if adapters is None else AdaptedState(*state, params)


def abstract_params(objective: Objective, mesh: Mesh | None = None) -> Params:
    """Return the network's parameters as jax.ShapeDtypeStruct, with their places on a mesh."""
    state = _abstract_state(objective, mesh)
    return state.params if state.base is None else state.base


def abstract_adapters(objective: Objective, mesh: Mesh | None = None) -> Params:
    """Return the adapters in the same way, of an objective that has them."""
    return _abstract_state(objective, mesh).params


def _abstract_state(objective: Objective, mesh: Mesh | None) -> TrainState:
    def state(key: jax.Array) -> Any:
        return init_state(objective, optax.identity(), key, use_ema=False)

    boxed = jax.eval_shape(state, jax.random.key(0))
    shapes = unbox(boxed)
    return shapes if mesh is None else placed(shapes, state_shardings(boxed, mesh))


def split_micro_batches(tree: Any, count: int) -> Any:
    """Reshape every [B, ...] to [count, B/count, ...] so that each device keeps its own rows."""
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1), tree
    )


def loss_and_grads(
    objective: Objective, params: Params, batch: Batch, noised: Noised, micro_batches: int
) -> tuple[Params, dict[str, jax.Array]]:
    """Return gradients and metrics of the loss over the whole batch, its mean or its sum.

    The metrics are means whatever the gradients are of. The batch is worked on in `micro_batches`
    parts; numerators and denominators are those of the whole batch, so the parts' sums are its
    values whatever their number.
    """
    masks = batch["mask"], noised.left_out
    loss_count = jnp.maximum(jnp.sum(objective.loss_mask(*masks)), 1).astype(jnp.float32)
    divisor = loss_count if objective.aggregation == "mean" else jnp.ones_like(loss_count)
    token_count = jnp.maximum(jnp.sum(objective.metric_mask(*masks)), 1).astype(jnp.float32)

    def part_loss(params: Params, part: tuple[Batch, Noised]):
        tokens, masks = part[0]["tokens"], (part[0]["mask"], part[1].left_out)
        coefficient = objective.loss_mask(*masks) / divisor
        loss, terms = objective.summed_loss(params, tokens, part[1], coefficient)
        # The two parts of the loss: each divergence with the training weight of its token.
        both = terms.kl + terms.is_div
        weights = jnp.where(both > 0, terms.loss / jnp.where(both > 0, both, 1.0), 0.0)
        parts = {"elbo": terms.elbo, "kl": weights * terms.kl, "is_div": weights * terms.is_div}
        real = objective.metric_mask(*masks)
        means = {
            name: jnp.sum(jnp.where(real, value, 0.0)) / token_count
            for name, value in parts.items()
        }
        return loss, {"loss": loss * (divisor / loss_count), **means}

    grad = jax.grad(part_loss, has_aux=True)
    if micro_batches == 1:
        return grad(params, (batch, noised))
    parts = split_micro_batches((batch, noised), micro_batches)

    def accumulate(total: Any, part: tuple[Batch, Noised]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad(params, part)), None

    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(grad, params, jax.tree.map(lambda a: a[0], parts)),
    )
    return jax.lax.scan(accumulate, zeros, parts)[0]


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float,
    micro_batches: int,
    state: TrainState,
    batch: Batch,
    run_key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Make one update; its random numbers depend on the run's key and the step alone."""
    key = jax.random.fold_in(run_key, state.step)
    objective = objective.at(state.step)
    noised = objective.noise(key, batch["tokens"], batch["mask"], batch.get("given"))
    return update(objective, optimizer, ema_decay, micro_batches, state, batch, noised)


def update(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float,
    micro_batches: int,
    state: TrainState,
    batch: Batch,
    noised: Noised,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Make one update on given noisy tokens; returns the new state and scalar metrics."""
    objective = objective.on(state.base)
    grads, metrics = loss_and_grads(objective, state.params, batch, noised, micro_batches)
    metrics["grad_norm"] = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params, grad_norm=metrics["grad_norm"]
    )
    params = optax.apply_updates(state.params, updates)
    ema = None
    if state.ema is not None:
        ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
    changes = {"step": state.step + 1, "params": params, "opt_state": opt_state, "ema": ema}
    return state.replace(**changes), metrics


def evaluation_step(
    objective: Objective, params: Params, batch: Batch, key: jax.Array
) -> dict[str, jax.Array]:
    """Return sums over the real tokens of a batch: bound and its terms in nats, training loss.

    What the rows mark as given is known, and does not count.
    """
    x, mask, marked = batch["tokens"], batch["mask"], batch.get("given")
    loss_key, bound_key = jax.random.split(key)
    if objective.process is None:
        bound = autoregressive_nelbo(lambda ids: objective.apply(params, ids), x)
        real = mask & (jnp.arange(x.shape[1])[None] > 0)
        loss = bound.total
    else:
        bound = nelbo(
            objective.process,
            lambda z_t, t: objective.denoise(params, x, z_t, t),
            bound_key,
            x,
            keep_padding_columns=objective.keep_padding_columns,
            given=marked,
        )
        real = objective.metric_mask(mask, marked)
        loss = objective.losses(params, x, objective.noise(loss_key, x, marked=marked)).loss
    sums = {
        "loss": loss,
        "nelbo": bound.total,
        "middle": bound.middle,
        "reconstruction": bound.reconstruction,
        "prior": bound.prior,
    }
    sums = {name: jnp.sum(jnp.where(real, value, 0.0)) for name, value in sums.items()}
    return {**sums, "tokens": jnp.sum(real)}
