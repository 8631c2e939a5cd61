"""A plan as text for people, and as JSON for programs."""

from typing import Any

from gidd_jax.hardware import Chip
from gidd_jax.planning.estimate import KERNEL_SHARE, Estimate, Operation
from gidd_jax.planning.plan import Plan

GPU_SHARE = 0.75  # of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set
SHOWN = 5  # source lines


def describe(plan: Plan) -> str:
    """Return the plan as text for people; a GB is 1e9 bytes."""
    chip, memory = plan.topology.chip, plan.memory
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [
        f"plan: {plan.model} on {plan.topology.name} ({plan.topology.devices} devices, {mesh})",
        f"parameters            {plan.parameters:,}",
        "memory of one device" + (f", which has {_gb(chip.memory)}" if chip else ""),
        f"  parameters          {_gb(memory.parameters)}",
        f"  optimizer state     {_gb(memory.optimizer)}",
        f"  moving average      {_gb(memory.ema)}",
        f"  gradients           {_gb(memory.gradients)}",
        f"  activations         {_gb(memory.activations)}",
        f"  total               {_gb(memory.total)}: {_verdict(plan)}",
        f"  activations: {plan.way}; {_gb(memory.kept)} of them are kept for the backward pass",
        *(f"  {note}" for note in plan.notes),
        "one step",
        f"  tokens              {plan.tokens_per_step:,}",
        f"  FLOPs               {plan.flops / 1e9:.3f} G per token, "
        f"{plan.flops * plan.tokens_per_step / 1e12:,.2f} T in all",
        f"  computed by each    {plan.device_flops / 1e12:,.2f} TFLOP",
        f"  moved by each       {_gb(plan.bytes_moved)} in its memory",
        f"  sent by each        {_gb(sum(s.bytes for s in plan.sent))}",
        *(f"    {s.what}: {_gb(s.bytes)}" for s in plan.sent if s.bytes),
        *_time_lines(plan),
        _run_line(plan),
        *_advice_lines(plan),
    ]
    return "\n".join(lines)


def as_report(plan: Plan) -> dict[str, Any]:
    """Return the plan's figures under their names: bytes, FLOPs, seconds and shares."""
    chip, time, step = plan.topology.chip, plan.time, plan.estimated_step
    estimate = plan.estimate
    report: dict[str, Any] = {
        "topology": plan.topology.name,
        "devices": plan.topology.devices,
        "mesh": plan.mesh,
        "model": plan.model,
        "parameters": plan.parameters,
        "memory": plan.memory._asdict() | {"total": plan.memory.total, "way": plan.way},
        "fits": plan.fits,
        "notes": plan.notes,
        "tokens_per_step": plan.tokens_per_step,
        "steps": plan.num_steps,
        "flops_per_token": plan.flops,
        "device_flops": plan.device_flops,
        "bytes_moved": plan.bytes_moved,
        "sent": [sent._asdict() for sent in plan.sent],
        "least_time": None if time is None else time._asdict() | {"step": time.step},
        "estimate": None,
        "advice": plan.advice and plan.advice._asdict(),
    }
    if chip is not None and estimate is not None and step is not None:
        shares = {"seconds": step, "mfu": plan.mfu(step)}
        report["estimate"] = estimate_report(estimate, chip) | shares
    return report


def estimate_report(estimate: Estimate, chip: Chip) -> dict[str, Any]:
    """Return an estimate's figures under their names: cycles, seconds, kernels."""
    return {
        "seconds": estimate.seconds(chip),
        "cycles": estimate.cycles,
        "ghz": chip.ghz,
        "kernels": [kernel._asdict() for kernel in estimate.kernels],
        "kernel_share_of_limits": KERNEL_SHARE,
        "unknown_loops": estimate.unknown,
        "operations": [operation._asdict() for operation in estimate.operations[:SHOWN]],
    }


def _verdict(plan: Plan) -> str:
    chip, fits = plan.topology.chip, plan.fits
    if chip is None:
        return "compare it with the memory of the machine"
    if fits is False:
        return "does not fit; use mesh.fsdp, model.remat=full or more train.micro_batches"
    if fits is None and plan.accepted:
        return "may fit: the compiler takes the step, though this sum is more than the device has"
    if fits is None:
        return f"may fit; the least that it can be is {_gb(plan.memory.least)}"
    if not chip.torus and plan.memory.total > GPU_SHARE * chip.memory:
        return "fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (JAX takes 75 % by default)"
    return "fits"


def _time_lines(plan: Plan) -> list[str]:
    time, chip = plan.time, plan.topology.chip
    if time is None or chip is None:
        return ["  least time          unknown: no chip, no roofline"]
    return [
        f"  least time          {_ms(time.step)}, limited by {time.limit} (compute "
        f"{_ms(time.compute)}, memory {_ms(time.memory)}, interconnect {_ms(time.interconnect)})",
        f"  at most             {_pace(plan, time.step)} of "
        f"{chip.peak_flops / 1e12:,.0f} TFLOP/s bf16 each",
        *_estimate_lines(plan),
    ]


def _estimate_lines(plan: Plan) -> list[str]:
    chip, estimate, step = plan.topology.chip, plan.estimate, plan.estimated_step
    if chip is None or estimate is None or step is None:
        return []
    lines = [f"  compiler's estimate {_ms(step)}: {_pace(plan, step)}"]
    if kernels := estimate.kernel_seconds(chip):
        share = f"{100 * KERNEL_SHARE:.0f} % of the chip's limits"
        lines.append(f"    {_ms(kernels)} of it for kernels, assumed at {share}")
    if estimate.unknown:
        lines.append(f"  loops of unknown length, counted once: {estimate.unknown}")
    costliest = estimate.operations[:SHOWN]
    width = max(len(operation.source) for operation in costliest)
    return [*lines, "  costliest lines", *(_cost_line(o, width, chip) for o in costliest)]


def _cost_line(operation: Operation, width: int, chip: Chip) -> str:
    milliseconds = _ms(operation.cycles / (1e9 * chip.ghz))
    return f"    {operation.source:<{width}}  {milliseconds:>12}  {operation.what}"


def _pace(plan: Plan, step: float) -> str:
    return f"{plan.tokens_per_step / step:,.0f} tokens/s, MFU {100 * plan.mfu(step):.1f} %"


def _run_line(plan: Plan) -> str:
    tokens = plan.num_steps * plan.tokens_per_step / 1e9
    line = f"run: {plan.num_steps:,} steps, {tokens:,.3f} billion tokens"
    if plan.time is None:
        return line
    line = f"{line}, at least {_long(plan.num_steps * plan.time.step)}"
    step = plan.estimated_step
    return line if step is None else f"{line}; {_long(plan.num_steps * step)} by the estimate"


def _advice_lines(plan: Plan) -> list[str]:
    advice = plan.advice
    if advice is None:
        return []
    return [
        f"laws of the scaling paper for {advice.tokens / 1e9:,.3f} billion tokens: batch "
        f"{advice.batch_rows:,.1f} rows ({advice.batch_tokens:,.0f} tokens), learning rate "
        f"{advice.learning_rate:.3f}"
    ]


def _long(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds:,.1f} s"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3f} GB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f} ms"
