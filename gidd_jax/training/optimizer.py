"""Learning-rate schedules and optimizers: clipping, then AdamW, LaProp, PSGD Kron or Muon.

The schedules are those of the code of GIDD and, wsd, of the scaling paper (arXiv 2512.10858), whose
groups of parameters CompleteP's are. Weight decay is decoupled; it acts on every parameter, or with
CompleteP as the groups say.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gidd_jax.settings import ModelSettings, OptimizerSettings

Schedule = Callable[[Any], Any]  # step -> float32
AUX_RATE = 0.02  # CompleteP: rate of all that is no matrix of a block / learning rate

# Kernels inside `blocks` carry their layer on axis 0. What Muon makes orthogonal is one matrix
# (input axes, output axes) per layer, and per part where one kernel holds several matrices (the
# queries, keys and values of qkv; the shifts, scales and gates of modulation): all other axes.
_MUON_AXES = {
    "qkv": ((1,), (3, 4)),
    "query": ((1,), (2, 3)),
    "key": ((1,), (2, 3)),
    "value": ((1,), (2, 3)),
    "attn_out": ((1, 2), (3,)),
    "modulation": ((1,), (3,)),
    "mlp_gate": ((1,), (2,)),
    "mlp_in": ((1,), (2,)),
    "mlp_out": ((1,), (2,)),
}


def learning_rate(settings: OptimizerSettings, num_steps: int) -> Schedule:
    """Return the learning rate as a float32 function of the 0-based step (float64 under x64).

    All but constant, which has no warm-up, rise linearly from 0 over warmup_steps. Then cosine
    falls to final_lr_ratio of the peak and linear to 0, at num_steps; wsd stays, and over the last
    cooldown_steps falls to 0 by one less the root of their finished part (0 steps: it never falls).
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "constant":
        return lambda step: jnp.full(jnp.shape(step), peak, float)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step)
        rising = step.astype(float) / max(warmup, 1)
        # Counted from the end, in integers: float32 is then accurate down to the last step.
        left = jnp.clip(num_steps - step, 0).astype(float) / max(num_steps - warmup, 1)
        if settings.schedule == "wsd":
            cooldown = settings.cooldown_steps
            cooled = jnp.clip(step - (num_steps - cooldown), 0, cooldown).astype(float)
            left = 1 - jnp.sqrt(cooled / max(cooldown, 1))
        elif settings.schedule == "cosine":
            low = settings.final_lr_ratio
            left = low + (1 - low) * jnp.square(jnp.sin(0.5 * jnp.pi * left))
        return peak * jnp.where(step < warmup, rising, left)

    return schedule


def make_optimizer(
    settings: OptimizerSettings, model: ModelSettings, num_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a run: clipping by global norm, then the chosen update rule.

    Of the model's settings parametrization, width and depth count. The schedule reads the
    optimizer's own count, so the first update has the rate of step 0. `update` takes the gradient's
    norm as `grad_norm`: beyond skip_above nothing changes, that count included.
    """
    rate = learning_rate(settings, num_steps)
    if model.parametrization == "completep":
        rule = _completep(settings, rate, model.hidden_size, model.num_layers)
    else:
        rules = {"adamw": _adamw, "laprop": _laprop, "psgd": _psgd, "muon": _muon}
        rule = rules[settings.name](settings, rate)
    clip = _clip(settings.clip_norm) if settings.clip_norm > 0 else optax.identity()
    chain = optax.chain(clip, rule)
    if settings.skip_above > 0:

        def is_small(step: Any, **extra_args: Any) -> jax.Array:
            del step
            return extra_args["grad_norm"] <= settings.skip_above

        return optax.conditionally_mask(chain, is_small, forward_extra_args=True)
    return optax.with_extra_args_support(chain)


def _clip(largest: float) -> optax.GradientTransformation:
    """Scale gradients of a larger norm down to it, as optax.clip_by_global_norm.

    By one factor: optax's quotient for each number makes XLA hold a second copy of all gradients.
    """

    def clip(updates: Any, params: Any) -> Any:
        del params
        factor = largest / jnp.maximum(optax.tree.norm(updates), largest)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)


def _adamw(settings: OptimizerSettings, rate: Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate, settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay
    )


def _laprop(settings: OptimizerSettings, rate: Schedule) -> optax.GradientTransformation:
    return optax.chain(
        _laprop_direction(settings.b1, settings.b2, settings.eps),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _laprop_direction(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """LaProp (arXiv 2002.04839): momentum of gradients that are already normalised.

    Both averages are corrected for their start, so the first step is the sign of the gradient.
    """
    return optax.chain(
        optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        optax.ema(b1, debias=True),
    )


class Group(NamedTuple):
    """What a parameter of a group has: the factor of the learning rate, and the weight decay."""

    rate: float
    decay: float


def completep_groups(settings: OptimizerSettings, width: int) -> dict[str, Group]:
    """Return CompleteP's groups by name (scaling paper's code): a matrix moves by rate / width.

    Decay is multiplied by the rate of its group: that of matrices is the same at every width.
    """
    return {
        "bulk": Group(1 / width, settings.weight_decay * width),
        "norm": Group(AUX_RATE, settings.norm_decay),
        "bias": Group(AUX_RATE, settings.bias_decay),
        "embedding": Group(AUX_RATE, 0.0),
    }


def completep_group(names: list[str]) -> str:
    """Return the name of the group of the parameter that has this path in `models.gidd`."""
    if any("norm" in name for name in names):
        return "norm"
    if {"vocab_embed", "output"} & set(names):
        return "embedding"
    if {"bias", "sink_key", "sink_value"} & set(names):
        return "bias"
    return "bulk"


def _completep(
    settings: OptimizerSettings, rate: Schedule, width: int, depth: int
) -> optax.GradientTransformation:
    """AdamW or LaProp with CompleteP's rates, decays, and eps / (width * depth)."""
    groups = completep_groups(settings, width)
    direction = {"adamw": optax.scale_by_adam, "laprop": _laprop_direction}[settings.name]

    def scaled(path: tuple[Any, ...], update: Any, param: Any) -> Any:
        group = groups[completep_group(_names(path))]
        return group.rate * (update + group.decay * param)

    def grouped(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(scaled, updates, params)

    return optax.chain(
        direction(settings.b1, settings.b2, settings.eps / (width * depth)),
        optax.stateless(grouped),
        optax.scale_by_learning_rate(rate),
    )


def _muon(settings: OptimizerSettings, rate: Schedule) -> optax.GradientTransformation:
    """Muon on the matrices of the blocks, AdamW on embeddings, output layer, norms and biases.

    Updates are scaled to the size of AdamW's (arXiv 2502.16982), so both share one learning rate.
    """
    muon = optax.contrib.muon(
        rate,
        beta=settings.b1,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=0.2,
    )
    # optax.contrib.muon would train the rest with Nesterov's variant of Adam.
    return optax.partition({"muon": muon, "adamw": _adamw(settings, rate)}, _muon_labels)


def _muon_labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _is_matrix(_names(path)) else "adamw", params
    )


def _is_matrix(names: list[str]) -> bool:
    return "blocks" in names and "kernel" in names


def _muon_axes(params: Any) -> Any:
    def axes(path: tuple[Any, ...], _: Any) -> optax.contrib.MuonDimensionNumbers:
        names = _names(path)
        return optax.contrib.MuonDimensionNumbers(*_MUON_AXES[names[names.index("kernel") - 1]])

    return jax.tree_util.tree_map_with_path(axes, params)


def _psgd(settings: OptimizerSettings, rate: Schedule) -> optax.GradientTransformation:
    """PSGD with Kronecker-factored preconditioners, one set per layer."""
    # Not at the top: the import draws a random key, which would start the devices.
    from psgdax.psgd import kron

    def rule(params: Any) -> optax.GradientTransformation:
        stacked = jax.tree_util.tree_map_with_path(lambda path, _: "blocks" in _names(path), params)
        return kron(rate, settings.b1, settings.weight_decay, scanned_layers=stacked)

    def init(params: Any) -> optax.OptState:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory needs
            return rule(params).init(params)

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, Any]:
        return rule(updates).update(updates, state, params)

    return optax.GradientTransformation(init, update)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
