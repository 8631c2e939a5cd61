"""The training state, and the pure train and evaluation steps over it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from gidd_jax.likelihood import autoregressive_nelbo, nelbo
from gidd_jax.loss import GiddLoss, autoregressive_loss, gidd_loss, mdlm_loss, mdlm_weights
from gidd_jax.models.dit import DiT
from gidd_jax.models.llama import Llama
from gidd_jax.ops.fused_loss import fused_loss
from gidd_jax.parallel.sharding import BATCH_AXES, VOCAB_AXIS
from gidd_jax.process import InterpolatingProcess, MaskedProcess, expand_time

Params = Any
Batch = Mapping[str, jax.Array]  # tokens int32 [B, L], mask bool [B, L] (False on padding)


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes: the step counts finished updates; ema is None when off."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None


class Noised(NamedTuple):
    """Noisy tokens z_t int32 [B, L] and their times t float32 [B]."""

    z_t: jax.Array
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a network is trained on: a process and a loss (process None: autoregressive)."""

    model: DiT | Llama
    process: InterpolatingProcess | None
    weighting: str
    min_weight: float
    max_weight: float
    stratified: bool
    mask_padding: bool
    align_mask_to_input: bool
    keep_padding_columns: bool

    def apply(self, params: Params, *inputs: jax.Array) -> jax.Array:
        """Return the network's logits."""
        return self.model.apply({"params": params}, *inputs)  # pyright: ignore[reportReturnType]

    def noise(self, key: jax.Array, x: jax.Array) -> Noised:
        """Draw a time per sequence and noisy tokens for the whole (global) batch."""
        if self.process is None:
            return Noised(z_t=x, t=jnp.zeros(x.shape[0], jnp.float32))
        t_key, z_key = jax.random.split(key)
        t = self.process.sample_t(t_key, x.shape[0], self.stratified)
        return Noised(z_t=self.process.sample(z_key, x, t), t=t)

    def losses(self, params: Params, x: jax.Array, noised: Noised) -> GiddLoss:
        """Return the per-token losses, [B, L] ([B, L-1] if autoregressive)."""
        if self.process is None:
            nll = autoregressive_loss(self.apply(params, x), x)
            return GiddLoss(loss=nll, elbo=nll, kl=nll, is_div=jnp.zeros_like(nll))
        logits = self.apply(params, noised.z_t, noised.t)
        arguments = (self.process, logits, x, noised.z_t, noised.t)
        if isinstance(self.process, MaskedProcess):
            return mdlm_loss(*arguments, keep_padding_columns=self.keep_padding_columns)
        return gidd_loss(
            *arguments,
            weighting=self.weighting,
            min_weight=self.min_weight,
            max_weight=self.max_weight,
            keep_padding_columns=self.keep_padding_columns,
        )

    def summed_loss(
        self, params: Params, x: jax.Array, noised: Noised, coefficient: jax.Array
    ) -> tuple[jax.Array, GiddLoss]:
        """Return sum(coefficient * loss) and the per-token losses, without a tensor of logits.

        The same numbers as `losses`, by the fused projection; only the sum can be differentiated.
        """
        z_t, t = noised
        inputs = (x,) if self.process is None else (z_t, t)
        h: Any = self.model.apply({"params": params}, *inputs, method="features")
        weights = elbo_weights = jnp.ones((), jnp.float32)
        scale = jnp.ones((), jnp.float32)  # of the cross-entropy in the KL
        if self.process is None:
            h, x, z_t = h[:, :-1], x[:, 1:], x[:, 1:]
        elif isinstance(self.process, MaskedProcess):
            alpha = self.process.alpha(expand_time(t, x))
            weights = elbo_weights = mdlm_weights(self.process, z_t, t)
            scale = jnp.where(z_t == self.process.mask_id, alpha, 0.0)
        else:
            weights = self.process.loss_weights(
                x,
                z_t,
                t,
                weighting=self.weighting,
                min_weight=self.min_weight,
                max_weight=self.max_weight,
            )
            elbo_weights = self.process.elbo_weights(x, z_t, t)
        loss, (kl, is_div) = fused_loss(
            self.process,
            h,
            *self.model.output_weights(params),
            x,
            z_t,
            t,
            coefficient * weights,
            cross_entropy=self.process is None or isinstance(self.process, MaskedProcess),
            vocab_size=self.model.vocab_size,
            keep_padding_columns=self.keep_padding_columns,
            batch_axes=BATCH_AXES,
            vocab_axis=VOCAB_AXIS,
        )
        both = kl + is_div
        return loss, GiddLoss(weights * both, elbo_weights * both, scale * kl, is_div)

    def loss_mask(self, mask: jax.Array) -> jax.Array:
        """Return which positions the training loss averages over, bool, shaped as the losses."""
        if self.process is None:
            return mask[:, :-1] if self.align_mask_to_input else mask[:, 1:]
        return mask if self.mask_padding else jnp.ones_like(mask)

    def metric_mask(self, mask: jax.Array) -> jax.Array:
        """Return which positions the reported divergences average over: the real tokens."""
        return mask if self.process is not None else mask[:, 1:]


def init_state(
    objective: Objective, optimizer: optax.GradientTransformation, key: jax.Array, use_ema: bool
) -> TrainState:
    """Return the state before the first step; parameters still boxed with their axis names."""
    ids = jnp.zeros((1, 8), jnp.int32)
    inputs = (ids,) if objective.process is None else (ids, jnp.zeros(1, jnp.float32))
    params = objective.model.init(key, *inputs)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if use_ema else None,
    )


def abstract_params(objective: Objective) -> Params:
    """Return the shapes and dtypes of the parameters as jax.ShapeDtypeStruct."""

    def params(key: jax.Array) -> Params:
        return nn.unbox(init_state(objective, optax.identity(), key, use_ema=False).params)

    return jax.eval_shape(params, jax.random.key(0))


def split_micro_batches(tree: Any, count: int) -> Any:
    """Reshape every [B, ...] to [count, B/count, ...] so that each device keeps its own rows."""
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1), tree
    )


def loss_and_grads(
    objective: Objective, params: Params, batch: Batch, noised: Noised, micro_batches: int
) -> tuple[Params, dict[str, jax.Array]]:
    """Return gradients and metrics of the mean loss over the whole batch.

    The batch is worked on in `micro_batches` parts; numerators and denominators are those of the
    whole batch, so the parts' sums are its values whatever their number.
    """
    loss_count = jnp.maximum(jnp.sum(objective.loss_mask(batch["mask"])), 1).astype(jnp.float32)
    token_count = jnp.maximum(jnp.sum(objective.metric_mask(batch["mask"])), 1).astype(jnp.float32)

    def part_loss(params: Params, part: tuple[Batch, Noised]):
        tokens, mask = part[0]["tokens"], part[0]["mask"]
        coefficient = objective.loss_mask(mask) / loss_count
        loss, terms = objective.summed_loss(params, tokens, part[1], coefficient)
        # The two parts of the loss: each divergence with the training weight of its token.
        both = terms.kl + terms.is_div
        weights = jnp.where(both > 0, terms.loss / jnp.where(both > 0, both, 1.0), 0.0)
        parts = {"elbo": terms.elbo, "kl": weights * terms.kl, "is_div": weights * terms.is_div}
        real = objective.metric_mask(mask)
        means = {
            name: jnp.sum(jnp.where(real, value, 0.0)) / token_count
            for name, value in parts.items()
        }
        return loss, {"loss": loss, **means}

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
    noised = objective.noise(jax.random.fold_in(run_key, state.step), batch["tokens"])
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
    grads, metrics = loss_and_grads(objective, state.params, batch, noised, micro_batches)
    metrics["grad_norm"] = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params, grad_norm=metrics["grad_norm"]
    )
    params = optax.apply_updates(state.params, updates)
    ema = None
    if state.ema is not None:
        ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def evaluation_step(
    objective: Objective, params: Params, batch: Batch, key: jax.Array
) -> dict[str, jax.Array]:
    """Return sums over the real tokens of a batch: bound and its terms in nats, training loss."""
    x, mask = batch["tokens"], batch["mask"]
    loss_key, bound_key = jax.random.split(key)
    if objective.process is None:
        bound = autoregressive_nelbo(lambda ids: objective.apply(params, ids), x)
        real = mask & (jnp.arange(x.shape[1])[None] > 0)
        loss = bound.total
    else:
        bound = nelbo(
            objective.process,
            lambda z_t, t: objective.apply(params, z_t, t),
            bound_key,
            x,
            keep_padding_columns=objective.keep_padding_columns,
        )
        real = mask
        loss = objective.losses(params, x, objective.noise(loss_key, x)).loss
    sums = {
        "loss": loss,
        "nelbo": bound.total,
        "middle": bound.middle,
        "reconstruction": bound.reconstruction,
        "prior": bound.prior,
    }
    sums = {name: jnp.sum(jnp.where(real, value, 0.0)) for name, value in sums.items()}
    return {**sums, "tokens": jnp.sum(real)}
