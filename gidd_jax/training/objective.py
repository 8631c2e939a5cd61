"""What is optimised: the network, the process and the loss, on noisy tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gidd_jax.loss import GiddLoss, autoregressive_loss, gidd_loss, mdlm_loss, mdlm_weights
from gidd_jax.models.dit import DiT
from gidd_jax.models.gidd import TimeFreeTransformer, blocks_of
from gidd_jax.models.llama import Llama
from gidd_jax.models.llama_denoiser import LlamaDenoiser
from gidd_jax.ops.fused_loss import fused_loss
from gidd_jax.parallel.sharding import BATCH_AXES, VOCAB_AXIS
from gidd_jax.process import InterpolatingProcess, MaskedProcess, expand_time
from gidd_jax.sampling.times import told
from gidd_jax.training.annealing import NOTHING, Annealing
from gidd_jax.training.lora import Lora
from gidd_jax.training.noising import PLAIN, Noised, Noising

Params = Any
Network = DiT | TimeFreeTransformer | Llama | LlamaDenoiser
# tokens int32 [B, L], mask bool [B, L] (False on padding); given bool [B, L], where rows mark some
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a network is trained on: a process and a loss (process None: autoregressive).

    annealing: what of them changes from step to step; future: what a Llama's attention
    adds to the scores of later tokens (None: nothing). lora: parameters are adapters of `frozen`.
    """

    model: Network
    process: InterpolatingProcess | None
    weighting: str
    min_weight: float
    max_weight: float
    stratified: bool
    mask_padding: bool
    align_mask_to_input: bool
    keep_padding_columns: bool
    padding_weight: float = 1.0
    aggregation: str = "mean"  # of the losses of positions: mean | sum
    noising: Noising = PLAIN
    annealing: Annealing = NOTHING
    future: jax.Array | None = None
    lora: Lora | None = None
    frozen: Params | None = None

    def on(self, frozen: Params | None) -> "Objective":
        """Return the objective of adapters beside frozen parameters; None: of all parameters."""
        return dataclasses.replace(self, frozen=frozen)

    def whole(self, params: Params) -> Params:
        """Return the network's parameters: what is trained, or is beside what is frozen."""
        if self.frozen is None:
            return params
        assert self.lora is not None
        return self.lora.merged(self.frozen, params)

    def at(self, step: jax.Array) -> "Objective":
        """Return the objective of a 0-based step of training."""
        process, future = self.annealing.process(self.process, step), self.annealing.future(step)
        return dataclasses.replace(self, process=process, future=future)

    def unannealed(self) -> "Objective":
        """Return the objective of the steps after attention has become full."""
        annealing = dataclasses.replace(self.annealing, attention_steps=0)
        return dataclasses.replace(self, annealing=annealing)

    def apply(self, params: Params, *inputs: jax.Array | None) -> jax.Array:
        """Return the network's logits."""
        return self.model.apply({"params": self.whole(params)}, *inputs)  # pyright: ignore[reportReturnType]

    def denoise(self, params: Params, x: jax.Array, z_t: jax.Array, times: jax.Array) -> jax.Array:
        """Return the logits for noisy tokens whose positions are at times [B] or [B, L].

        x: the clean tokens, of which a model by blocks sees the blocks before each.
        """
        return self.apply(params, *self._inputs(x, Noised(z_t, times)))

    def _inputs(self, x: jax.Array, noised: Noised) -> tuple[Any, ...]:
        assert self.process is not None
        times = told(self.model, self.process, noised.times, noised.within)
        inputs = noised.z_t, times
        if blocks_of(self.model):
            return (*inputs, None, x)
        if self.future is not None:
            return (*inputs, noised.lengths, self.future)
        return inputs if noised.lengths is None else (*inputs, noised.lengths)

    def noise(
        self,
        key: jax.Array,
        x: jax.Array,
        mask: jax.Array | None = None,
        marked: jax.Array | None = None,
    ) -> Noised:
        """Draw times and noisy tokens for the whole (global) batch.

        mask bool [B, L]: the real tokens of rows to train on, with what `noising` says; None: each
        row has one time. marked bool [B, L]: tokens that are given in any case; None: none.
        """
        if self.process is None:
            return Noised(z_t=x, t=jnp.zeros(x.shape[0], jnp.float32))
        how = PLAIN if mask is None else self.noising
        t_key, z_key = jax.random.split(key)
        t = self.process.sample_t(t_key, x.shape[0], self.stratified)
        t = how.times(self.process, jax.random.fold_in(key, 2), t, x.shape[1])
        z_t = how.noisy(self.process, z_key, x, t)
        given = how.given(jax.random.fold_in(key, 1), mask, marked)
        lengths = how.lengths(jax.random.fold_in(key, 3), x.shape)
        return Noised(z_t if given is None else jnp.where(given, x, z_t), t, given, lengths)

    def losses(self, params: Params, x: jax.Array, noised: Noised) -> GiddLoss:
        """Return the per-token losses, [B, L] ([B, L-1] if autoregressive)."""
        if self.process is None:
            nll = autoregressive_loss(self.apply(params, x), x)
            return GiddLoss(loss=nll, elbo=nll, kl=nll, is_div=jnp.zeros_like(nll))
        logits = self.apply(params, *self._inputs(x, noised))
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
        params, z_t, t = self.whole(params), noised.z_t, noised.t
        inputs = (x,) if self.process is None else self._inputs(x, noised)
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

    def loss_mask(self, mask: jax.Array, left_out: jax.Array | None = None) -> jax.Array:
        """Return how much each position counts in the mean of the training loss, in [0, 1], shaped
        as the losses."""
        if self.process is None:
            return mask[:, :-1] if self.align_mask_to_input else mask[:, 1:]
        counted = jnp.where(mask, 1.0, 0.0 if self.mask_padding else self.padding_weight)
        return counted if left_out is None else jnp.where(left_out, 0.0, counted)

    def metric_mask(self, mask: jax.Array, left_out: jax.Array | None = None) -> jax.Array:
        """Return which positions the reported divergences average over: real, not left out."""
        if self.process is None:
            return mask[:, 1:]
        return mask if left_out is None else mask & ~left_out
