"""The network calls of a run: their times, and what else a step needs to know about its place."""

import bisect
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.options import GRIDS, REMASKING, SamplerOptions

MASK_ONLY = (*REMASKING, "first_hitting")


def check_method(process: InterpolatingProcess, method: str) -> None:
    """Raise InputError when the method cannot sample this process."""
    if method in MASK_ONLY and not is_mask_only(process):
        raise InputError(
            f"method {method!r} needs a process whose only noise is the mask: "
            "use 'ancestral', 'psi' or 'adaptive'"
        )
    if method == "confidence" and prior_mask(process) < 0.99:
        raise InputError(
            "method 'confidence' needs a process that starts from masks: "
            "use 'ancestral', 'psi' or 'adaptive'"
        )


def check_options(process: InterpolatingProcess, options: SamplerOptions) -> None:
    """Raise InputError when the method, or one of its options, does nothing for this process."""
    check_method(process, options.method)
    if options.edit_above < 1 and is_mask_only(process):
        raise InputError(
            "edit_above needs a process with noise other than the mask, under masks alone no token "
            "is ever wrong: leave it at 1"
        )


def prior_mask(process: InterpolatingProcess) -> float:
    """Return the probability of the mask in the prior."""
    with jax.ensure_compile_time_eval():
        return float(process.prior().mask)


def is_mask_only(process: InterpolatingProcess) -> bool:
    """Return whether noise other than the mask has at most 1e-6 of the mass at any time."""
    with jax.ensure_compile_time_eval():
        t = jnp.linspace(process.t_min, process.t_max, 101)
        return bool(jnp.max(process.beta_pi(t).uniform) * process.num_noise_tokens <= 1e-6)


def has_masks(process: InterpolatingProcess) -> bool:
    """Return whether the mask has more than 1e-6 of the mass at any time."""
    with jax.ensure_compile_time_eval():
        t = jnp.linspace(process.t_min, process.t_max, 101)
        return bool(jnp.max(process.beta_pi(t).mask) > 1e-6)


def time_grid(
    process: InterpolatingProcess, num_steps: int, grid: str = "uniform"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the times t and s of each step, float32 [num_steps], noisiest first.

    uniform: num_steps equal transitions from t_max to t_min. cosine: smaller ones at both ends,
    t = (1 - cos(pi u)) / 2, as in arXiv 2512.10858. reference: the original's pairs, which leave
    out the noisiest point and end with a step from t_min to itself.
    Raises InputError for an unknown grid or num_steps < 1.
    """
    if grid not in GRIDS:
        raise InputError(f"unknown grid {grid!r}: use one of {', '.join(GRIDS)}")
    if num_steps < 1:
        raise InputError(f"num_steps must be at least 1: {num_steps}")
    u = np.linspace(0.0, 1.0, num_steps + 1)
    u = 0.5 - 0.5 * np.cos(np.pi * u) if grid == "cosine" else u
    points = (process.t_min + (process.t_max - process.t_min) * u).astype(np.float32)
    if grid == "reference":
        return points[-2::-1], np.concatenate([points[-3::-1], points[:1]])
    return points[:0:-1], points[-2::-1]


def sweep_grid(
    process: InterpolatingProcess, options: SamplerOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Return the times of `gibbs`: after a step `sweeps` calls at which time stands still.

    After a step that ends at a time above sweep_below none follows, but after the last. There are
    no more steps than it takes to fill the calls, and sweeps that are too many at the end are cut.
    """

    def laid_out(num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Times of the steps, and how many calls each takes with its sweeps."""
        t, s = time_grid(process, num_steps, options.grid)
        is_last = np.arange(num_steps) == num_steps - 1
        return t, s, 1 + options.sweeps * ((s <= options.sweep_below) | is_last)

    def num_calls(num_steps: int) -> int:
        return int(laid_out(num_steps)[2].sum())

    # Of one step more at most one ends below: the calls grow with the steps.
    counts = range(1, options.num_steps + 1)
    t, s, calls = laid_out(counts[bisect.bisect_left(counts, options.num_steps, key=num_calls)])
    is_step = np.cumsum(calls) - calls
    after = np.repeat(s, calls)
    before = after.copy()
    before[is_step] = t
    return before[: options.num_steps], after[: options.num_steps]


def loop_grid(
    process: InterpolatingProcess, options: SamplerOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Return the times of ReMDM-loop: down to alpha = loop_alpha, there for a while, then on."""
    steps_before = round(options.num_steps * (1 - options.loop_from))
    steps_after = round(options.num_steps * options.loop_to)
    held = time_of_alpha(process, options.loop_alpha)
    before = np.linspace(process.t_max, held, steps_before + 1)
    after = np.linspace(held, process.t_min, steps_after + 1)
    stay = np.full(options.num_steps - steps_before - steps_after, held)
    t = np.concatenate([before[:-1], stay, after[:-1]])
    s = np.concatenate([before[1:], stay, after[1:]])
    return t.astype(np.float32), s.astype(np.float32)


def time_of_alpha(process: InterpolatingProcess, alpha: float) -> float:
    """Return the time in [t_min, t_max] at which the signal mass is alpha, by bisection."""
    low, high = process.t_min, process.t_max
    with jax.ensure_compile_time_eval():
        for _ in range(30):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if process.alpha(middle) > alpha else (low, middle)
    return 0.5 * (low + high)


class Schedule(NamedTuple):
    """The network calls of a run, arrays [num_calls] in the order of the calls.

    t and s: times before and after; sigma: remasking probability; kappa: weight of the posterior
    against drawing anew; block: which block of positions may change, with those from `first` on;
    step: number of the call among the `calls` that these blocks get at a time; closes: whether the
    block is done after it.
    """

    t: np.ndarray
    s: np.ndarray
    sigma: np.ndarray
    kappa: np.ndarray
    step: np.ndarray
    block: np.ndarray
    first: np.ndarray
    calls: np.ndarray
    closes: np.ndarray

    @property
    def reopens(self) -> np.ndarray | jax.Array:
        """Whether blocks that were done may change again."""
        return self.first < self.block

    @property
    def is_last(self) -> np.ndarray | jax.Array:
        """Whether it is the last call that these blocks get at a time."""
        return self.step == self.calls - 1


def make_schedule(
    process: InterpolatingProcess, options: SamplerOptions, num_free: int
) -> Schedule:
    """Return the schedule for rows with at most `num_free` tokens to generate."""
    block_length = min(options.block_length or num_free, num_free)
    num_blocks = -(-num_free // block_length)
    if options.method == "first_hitting":  # draws its own times
        t = s = np.full(block_length, process.t_max, np.float32)
    elif options.method == "remdm_loop":
        t, s = loop_grid(process, options)
    elif options.method == "gibbs":
        t, s = sweep_grid(process, options)
    else:
        t, s = time_grid(process, options.num_steps, options.grid)
    kappa = np.full(len(t), options.kappa if options.method == "psi" else 1.0, np.float32)
    if options.method == "gibbs":
        kappa[t == s] = 1 - options.rho
    sigma = remasking(process, options, t, s)
    again = t <= options.reopen_at  # the end of the same way, from the time that was noised to
    if options.reopen and not again.any():
        raise InputError(
            f"reopen_at = {options.reopen_at}: no step begins there or later, set num_steps to at "
            f"least {math.floor(1 / options.reopen_at) + 1}"
        )
    entries = []
    for block in range(num_blocks):
        reopens = options.reopen > 0 and block > 0
        phases = [(block, np.full(len(t), True))]
        if reopens:
            phases.append((max(block - options.reopen, 0), again))
        for number, (first, made) in enumerate(phases):
            count = int(made.sum())
            step = np.arange(count)
            closes = (step == count - 1) & (number == len(phases) - 1)
            place = (np.full(count, n, np.int32) for n in (block, first, count))
            entries.append((t[made], s[made], sigma[made], kappa[made], step, *place, closes))
    return Schedule(*map(np.concatenate, zip(*entries, strict=True)))


def remasking(
    process: InterpolatingProcess, options: SamplerOptions, t: np.ndarray, s: np.ndarray
) -> np.ndarray:
    """Return sigma of every step (section 4 of arXiv 2503.00307), float32; 0 without remasking.

    cap: min(eta, sigma_max), rescale: eta sigma_max, sigma_max = min(1, (1 - alpha_s) / alpha_t);
    loop: the cap, where time stands still.
    """
    if options.method not in REMASKING:
        return np.zeros_like(t)
    with jax.ensure_compile_time_eval():
        masked, alpha = np.asarray(process.beta_pi(s).mask), np.asarray(process.alpha(t))
    largest = np.minimum(1.0, masked / alpha)
    if options.method == "remdm_rescale":
        return (options.eta * largest).astype(np.float32)
    capped = np.minimum(options.eta, largest)
    if options.method == "remdm_loop":
        capped = np.where(t == s, capped, 0.0)
    return capped.astype(np.float32)
