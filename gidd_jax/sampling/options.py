"""What can be chosen about sampling and correcting.

Imports nothing heavy, so that commands can name the choices in --help.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

from gidd_jax.cli import nearest
from gidd_jax.errors import InputError

ANCESTRAL = ("ancestral", "psi")
REMASKING = ("remdm_cap", "remdm_rescale", "remdm_loop")
METHODS = (
    *ANCESTRAL,
    "gibbs",
    *REMASKING,
    "first_hitting",
    "confidence",
    "entropy_bound",
    "adaptive",
    "mode_seeking",
)
GRIDS = ("uniform", "cosine", "reference")
ORDERS = ("entropy", "drawn")
NOISE_TIMES = ("step", "prior")
ESTIMATORS = ("bound", "chain", "importance")
CHAIN_ORDERS = ("random", "left_to_right")
ESTIMATED_BY = {
    "num_samples_t": "bound",
    "num_orders": "chain",
    "chain_order": "chain",
    "num_paths": "importance",
    "path_steps": "importance",
}
CORRECTION_SCORES = ("proposal", "suspicion")
SUSPICION_METHODS = ("one_pass", "leave_one_out")
# Options that only some methods read: setting one for another method is an error.
READ_BY = {
    "num_steps": tuple(m for m in METHODS if m != "first_hitting"),
    "grid": (*ANCESTRAL, "gibbs", "remdm_cap", "remdm_rescale", "mode_seeking"),
    "kappa": ("psi",),
    "sweeps": ("gibbs",),
    "sweep_below": ("gibbs",),
    "rho": ("gibbs",),
    "order": ("confidence",),
    "epsilon": ("entropy_bound",),
    "edit_above": ("entropy_bound",),
    "stop_after": ("entropy_bound",),
    "stop_entropy": ("entropy_bound",),
    "eta": REMASKING,
    "loop_from": ("remdm_loop",),
    "loop_to": ("remdm_loop",),
    "loop_alpha": ("remdm_loop",),
    "reopen": ANCESTRAL,
    "reopen_at": ANCESTRAL,
    "tokens_per_step": ("mode_seeking",),
    "noise_at": ("mode_seeking",),
}


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How samples are drawn; raises InputError for values outside their range.

    Autoregressive models read temperature, top_k, top_p and min_p alone.
    """

    num_steps: int = 128  # at most so many network calls for the sequence, or for each block
    method: str = "ancestral"  # one of METHODS
    grid: str = "uniform"  # times of the steps, see time_grid
    temperature: float = 1.0  # of x_hat; 0: the most probable token
    top_k: int = 0  # keep the top_k most probable tokens of x_hat; 0: all
    top_p: float = 1.0  # keep the most probable tokens of x_hat with this sum; 1: all
    min_p: float = 0.0  # drop what is less probable from the distribution that is drawn from
    block_length: int = 0  # generate blocks of so many tokens from left to right; 0: all at once
    reopen: int = 0  # blocks: noise a finished block with so many before it, denoise all together
    reopen_at: float = 0.5  # ... noised to this time
    stop_at_end: bool = False  # blocks: a text ends with the end token, what follows is padding
    kappa: float = 0.95  # psi: weight of the posterior against the marginal
    eta: float = 0.02  # remdm: cap of the remasking probability, or its share of the largest legal
    loop_from: float = 0.55  # remdm_loop: the loop takes the steps from here ...
    loop_to: float = 0.05  # ... to here (1: first step, 0: last), as t_on and t_off of the paper
    loop_alpha: float = 0.9  # remdm_loop: alpha during the loop
    tokens_per_step: int = 0  # mode_seeking: positions redrawn a step; 0: enough to draw each once
    noise_at: str = "step"  # mode_seeking: a token is noise at the step's time, or as in the prior
    sweeps: int = 1  # gibbs: redraws of a share `rho` of the positions after each ancestral step
    sweep_below: float = 1.0  # ... that ends at this time or earlier, and after the last one
    rho: float = 0.1  # gibbs: share of the positions that a sweep redraws
    order: str = "entropy"  # confidence: which mask is lifted first, one of ORDERS
    epsilon: float = 0.1  # entropy_bound: nats of dependence that tokens drawn together may lose
    edit_above: float = (
        1.0  # entropy_bound: reopen a token that is wrong with more than this; 1: no
    )
    stop_after: int = 0  # entropy_bound: stop a row whose argmax stood still so often; 0: never
    stop_entropy: float = 0.05  # ... and whose mean entropy is below this, in nats
    guidance: float = 1.0  # weight of the prompt: x_hat(with)^g x_hat(without)^(1 - g); 1: as it is
    fill_masks: bool = True  # draw what is still masked after the last step from x_hat

    def __post_init__(self):
        choices = {"method": METHODS, "grid": GRIDS, "order": ORDERS, "noise_at": NOISE_TIMES}
        for name, legal in choices.items():
            if getattr(self, name) not in legal:
                raise InputError(
                    f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(legal)}"
                )
        least = {"num_steps": 1, "top_k": 0, "block_length": 0, "tokens_per_step": 0}
        least |= {"reopen": 0, "sweeps": 1, "stop_after": 0}
        for name, least_value in least.items():
            if getattr(self, name) < least_value:
                raise InputError(f"{name} must be at least {least_value}: {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be finite and at least 0: {self.temperature}")
        for name in ("min_p", "kappa", "eta", "loop_to", "loop_from", "sweep_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1]: {getattr(self, name)}")
        for name in ("top_p", "rho", "edit_above"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in (0, 1]: {getattr(self, name)}")
        for name in ("epsilon", "stop_entropy"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative: {getattr(self, name)}")
        if not 0 <= self.guidance < float("inf"):
            raise InputError(f"guidance must be finite and at least 0: {self.guidance}")
        for name in ("loop_alpha", "reopen_at"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must lie in (0, 1): {getattr(self, name)}")
        if self.loop_to > self.loop_from:
            raise InputError(f"loop_to must not exceed loop_from: {self.loop_to}, {self.loop_from}")
        self._check_read()
        if self.stop_entropy != SamplerOptions.stop_entropy and not self.stop_after:
            raise InputError("stop_entropy has no effect without stop_after: set stop_after, too")
        if self.reopen_at != SamplerOptions.reopen_at and not self.reopen:
            raise InputError("reopen_at has no effect without reopen: set reopen, too")

    def _check_read(self) -> None:
        for field in dataclasses.fields(self):
            readers = READ_BY.get(field.name, METHODS)
            if getattr(self, field.name) != field.default and self.method not in readers:
                raise InputError(
                    f"{field.name} has no effect with method {self.method!r}: "
                    f"it belongs to {', '.join(readers)}"
                )


@dataclasses.dataclass(frozen=True)
class CorrectionOptions:
    """How samples are corrected; raises InputError for values outside their range."""

    num_steps: int = 128  # most network calls
    temperature: float = 0.1  # of the proposals
    tokens_per_step: int = 1  # most tokens replaced in a step
    patience: int = 32  # stop a row after more than so many steps without a better accuracy
    t: float = 0.01  # the time the network is told, 0 to 1
    score: str = "proposal"  # which tokens are replaced first, one of CORRECTION_SCORES
    threshold: float = 0.5  # suspicion: replace what is wrong with more than this probability

    def __post_init__(self):
        if self.score not in CORRECTION_SCORES:
            legal = ", ".join(CORRECTION_SCORES)
            raise InputError(f"unknown score {self.score!r}: use one of {legal}")
        for name, least in (("num_steps", 1), ("tokens_per_step", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}: {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be finite and at least 0: {self.temperature}")
        if not 0 < self.t < 1:
            raise InputError(f"t must lie in (0, 1): {self.t}")
        if not 0 <= self.threshold < 1:
            raise InputError(f"threshold must lie in [0, 1): {self.threshold}")
        if self.threshold != CorrectionOptions.threshold and self.score != "suspicion":
            raise InputError(
                f"threshold has no effect with score {self.score!r}: it belongs to suspicion"
            )


def correction_grid(
    scores: Sequence[str],
    times: Sequence[str],
    temperatures: Sequence[str],
    common: dict[str, Any],
) -> list[CorrectionOptions]:
    """Return the options of every score, --t and --temperature, each with the common fields.

    A threshold is for suspicion: other scores beside it do without. Raises InputError for values
    outside their range, and for a threshold where no score reads it.
    """
    if not scores:
        raise InputError(f"--score is empty: use {' or '.join(CORRECTION_SCORES)}")
    without = {name: value for name, value in common.items() if name != "threshold"}
    return [
        CorrectionOptions(
            score=score,
            t=t,
            temperature=temperature,
            **(without if "suspicion" in scores and score != "suspicion" else common),
        )
        for score, t, temperature in itertools.product(
            scores, numbers("t", times, float), numbers("temperature", temperatures, float)
        )
    ]


@dataclasses.dataclass(frozen=True)
class SuspicionOptions:
    """How wrong tokens are looked for; raises InputError for values outside their range."""

    method: str = "one_pass"  # one network call, or "leave_one_out": one a token, for any process
    t: float = (
        CorrectionOptions.t
    )  # the time the network is told: the later, the more is suspicious

    def __post_init__(self):
        if self.method not in SUSPICION_METHODS:
            legal = ", ".join(SUSPICION_METHODS)
            raise InputError(f"unknown method {self.method!r}: use one of {legal}")
        if not 0 < self.t < 1:
            raise InputError(f"t must lie in (0, 1): {self.t}")


@dataclasses.dataclass(frozen=True)
class EstimatorOptions:
    """How log p of a text is estimated; raises InputError for values outside their range."""

    estimator: str = "bound"  # one of ESTIMATORS
    num_samples_t: int = 8  # bound: times drawn per row
    num_orders: int = 4  # chain: orders in which the tokens of a row are put in, each a decoder
    chain_order: str = "random"  # chain: one of CHAIN_ORDERS
    num_paths: int = 8  # importance: noisy paths of each row
    path_steps: int = 32  # importance: steps of a path

    def __post_init__(self):
        for name, legal in (("estimator", ESTIMATORS), ("chain_order", CHAIN_ORDERS)):
            if getattr(self, name) not in legal:
                raise InputError(
                    f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(legal)}"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise InputError(f"{field.name} must be at least 1: {value}")
            reader = ESTIMATED_BY.get(field.name, self.estimator)
            if value != field.default and reader != self.estimator:
                raise InputError(
                    f"{field.name} has no effect with estimator {self.estimator!r}: it belongs to "
                    f"{reader}"
                )
        if self.chain_order != "random" and self.num_orders != 1:
            raise InputError(f"chain_order {self.chain_order!r} is one order: set num_orders to 1")


Options = TypeVar("Options", SamplerOptions, CorrectionOptions, SuspicionOptions, EstimatorOptions)


def numbers(flag: str, words: Sequence[str], kind: type) -> list:
    """Return the numbers of a flag that takes several; raises InputError unless there are some."""
    if not words:
        raise InputError(f"--{flag} is empty: give numbers, as in 1,2")
    try:
        return [kind(word) for word in words]
    except ValueError:
        raise InputError(f"--{flag}={','.join(words)}: give numbers, as in 1,2") from None


def changed_options(options: Options, changes: dict[str, Any]) -> Options:
    """Return the options with fields changed; raises InputError that names an unknown one."""
    legal = [field.name for field in dataclasses.fields(options)]
    for name in changes:
        if name not in legal:
            raise InputError(f"unknown option {name}: {nearest(name, legal)}")
    return dataclasses.replace(options, **changes)
