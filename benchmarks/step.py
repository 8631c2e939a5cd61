"""Suite step: the training step of gidd_jax.training.loop, and how it grows and scales."""

from collections.abc import Mapping
from typing import Any

from benchmarks import collectives, inputs
from benchmarks.measure import compiled_facts, timed, torch_device, torch_wait
from benchmarks.plan import COMPILED, EAGER, OURS, TWIN, Case, Check, Found, Subject, ratio_checks

VOCAB_SIZE = 50304
DEVICES = (1, 2, 4, 8)
# (least speed-ups over the twin, largest shares of its memory)
TARGETS: dict[str, dict[str, tuple[Mapping[str, float], Mapping[str, float]]]] = {
    "cpu": {
        "step_4x256_b16_l128": ({EAGER: 3.0, COMPILED: 1.4}, {COMPILED: 1 / 6}),
        "step_8x512_b4_l512": ({EAGER: 2.2, COMPILED: 1.1}, {COMPILED: 1 / 3}),
    },
    "gpu": {
        "step_12x768_b64_l512": ({COMPILED: 1.3}, {}),
        "step_24x1024_b32_l512": ({COMPILED: 1.3}, {}),
        "step_24x2048_b16_l512": ({COMPILED: 1.3}, {}),
    },
}
LEAST_MFU = {
    "step_12x768_b64_l512": 0.5,
    "step_24x1024_b32_l512": 0.6,
    "step_24x2048_b16_l512": 0.6,
}


def cases(scale: str, dtype: str) -> list[Case]:
    """Return the cases of the targets, series over each size, and one over virtual devices."""
    if scale == "small":
        scaling = [_case(2, 32, 8, 16, 512, dtype, sweep="devices", devices=n) for n in (1, 8)]
        small = (2, 32, 2, 16, 512, dtype)
        return [_case(*small, TWIN), _case(*small, sweep="batch"), *scaling]
    if scale == "gpu":
        sizes = [(12, 768, 64), (24, 1024, 32), (24, 2048, 16)]
        return [_case(n, d, b, 512, VOCAB_SIZE, dtype, TWIN) for n, d, b in sizes]
    compared = [
        _case(4, 256, 16, 128, VOCAB_SIZE, dtype, TWIN),
        _case(8, 512, 4, 512, VOCAB_SIZE, dtype, TWIN),
    ]
    v = VOCAB_SIZE // 4
    series = [_case(2, 256, b, 64, v, dtype, sweep="batch") for b in (4, 16, 64)]
    series += [_case(2, 256, 2, n, v, dtype, sweep="length") for n in (64, 256, 512)]
    series += [_case(2, 256, 4, 64, v * k, dtype, sweep="vocab_size") for k in (1, 2, 4)]
    series += [_case(n, 256, 4, 64, v, dtype, sweep="num_layers") for n in (2, 4, 8)]
    scaling = [_case(2, 128, 16, 64, 4096, dtype, sweep="devices", devices=n) for n in DEVICES]
    return [*compared, *series, *scaling]


def _case(
    num_layers: int,
    width: int,
    batch: int,
    length: int,
    vocab_size: int,
    dtype: str,
    twin: tuple[str, ...] = (),
    sweep: str = "",
    devices: int = 0,
) -> Case:
    shape = {
        "num_layers": num_layers,
        "hidden_size": width,
        "num_heads": max(1, width // 64),
        "batch": batch,
        "length": length,
        "vocab_size": vocab_size,
        "dtype": dtype,
        # Recomputing in the backward pass costs a third more in the blocks, and saves most memory.
        "remat": "full" if dtype == "float32" else "none",
        "devices": max(devices, 1),
    }
    name = f"step_{num_layers}x{width}_b{batch}_l{length}"
    suffix = f"_v{vocab_size}" + (f"_on_{devices}" if devices else "") + f"_by_{sweep}"
    tokens = batch * length
    return Case(
        kind="step",
        name=name + suffix if sweep else name,
        shape=shape,
        tokens=tokens,
        flops=tokens * step_flops_per_token(shape),
        variants=(OURS, *twin),
        sweep=sweep,
        virtual_devices=max(DEVICES) if devices else 1,
    )


def step_flops_per_token(shape: Mapping[str, Any]) -> float:
    """FLOPs of forward and backward pass of a token; recomputation does not count.

    Six per weight of the matrix products, and three times the two products of attention. The same
    as gidd_jax.training.metrics.flops_per_token, here without imports.
    """
    width, layers = shape["hidden_size"], shape["num_layers"]
    weights = layers * 12 * width**2 + width * shape["vocab_size"]
    return 6.0 * weights + 3.0 * layers * 4 * shape["length"] * width


def ours(case: Case) -> Subject:
    """The compiled step of the trainer, with donated state, on a mesh of `devices`."""
    import time

    import jax
    import jax.numpy as jnp
    import numpy as np

    from gidd_jax.parallel import sharding
    from gidd_jax.training.build import build_objective
    from gidd_jax.training.loop import put_batch
    from gidd_jax.training.optimizer import learning_rate, make_optimizer
    from gidd_jax.training.programs import compile_step, state_maker

    shape = case.shape
    settings = _settings(shape)
    vocab_size = shape["vocab_size"]
    objective = build_objective(settings, vocab_size, vocab_size - 1)
    optimizer = make_optimizer(settings.optimizer, settings.model, settings.train.num_steps)
    rate = learning_rate(settings.optimizer, settings.train.num_steps)
    mesh = sharding.make_mesh(shape["devices"], 1, 1, devices=jax.devices()[: shape["devices"]])
    x = inputs.token_ids(shape, shape["batch"], shape["length"])
    with sharding.activate(mesh):
        make_state, abstract = state_maker(settings, objective, optimizer, mesh)
        state = make_state(jax.random.key(0))
        batch = put_batch({"tokens": x, "mask": np.ones(x.shape, bool)}, mesh)
        key = jax.device_put(jax.random.key(1), sharding.replicated(mesh))
        start = time.perf_counter()
        step = compile_step(settings, objective, optimizer, rate, abstract, mesh)
        compiled = step.lower(state, batch, key).compile()
    facts = compiled_facts(compiled, time.perf_counter() - start)

    def run() -> Any:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, batch, key))
        return metrics

    if case.sweep == "devices":
        facts["losses"] = [float(run().loss.compute()) for _ in range(3)]
        facts["collective_bytes"] = collectives.total_bytes(compiled.as_text())
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        facts["gradient_bytes"] = parameters * jnp.dtype(jnp.float32).itemsize
    else:
        facts["input_seconds"] = timed(lambda: put_batch({"tokens": x, "mask": x > 0}, mesh))
    return Subject(run, facts)


def _settings(shape: Mapping[str, Any]) -> Any:
    from gidd_jax.cli import load_config
    from gidd_jax.settings import Settings

    config = load_config("gidd")
    config.model.update(
        num_layers=shape["num_layers"],
        hidden_size=shape["hidden_size"],
        num_heads=shape["num_heads"],
        max_seq_len=shape["length"],
        dtype=shape["dtype"],
        remat=shape["remat"],
    )
    config.train.batch_size = shape["batch"]
    config.optimizer.schedule = "constant"
    return Settings.from_config(config)


def twin(case: Case, compiled: bool) -> Subject:
    """Noise, loss, gradients, clipping and AdamW in torch."""
    import torch

    from benchmarks import torch_twin

    shape, device = case.shape, torch_device()
    vocab_size = shape["vocab_size"]
    torch.manual_seed(0)
    model = torch_twin.DiT(
        vocab_size, shape["hidden_size"], shape["num_layers"], shape["num_heads"], cond_dim=128
    ).to(device)
    process = torch_twin.Hybrid(vocab_size, vocab_size - 1, p_uniform=0.1)
    step = torch_twin.TrainingStep(process, model, compiled, getattr(torch, shape["dtype"]))
    ids = inputs.token_ids(shape, shape["batch"], shape["length"])
    x = torch.from_numpy(ids).long().to(device)

    def run() -> None:
        step(x)
        torch_wait()

    return Subject(run)


def checks(scale: str, found: Found) -> list[Check]:
    """Return the targets beside what was measured."""
    result = [
        check
        for case, (speed_ups, shares) in TARGETS[scale].items()
        for check in ratio_checks(found, case, speed_ups, shares)
    ]
    if scale == "gpu":
        for case, bound in LEAST_MFU.items():
            step = found.get(case)
            result.append(Check(f"{case}: MFU", step and step.matmul_fraction, bound))
        return result
    names = [c.name for c in cases(scale, "float32") if c.sweep == "devices"]
    return result + scaling_checks(found, names)


def scaling_checks(found: Found, names: list[str]) -> list[Check]:
    """Return the checks of a series over devices: equal losses, and the communication planned.

    With copies of the model on every device, each gradient is summed over the devices once; other
    sums are of scalars. names: the cases, one device first.
    """
    single, *rest = (found.fact(name, "losses") for name in names)
    result = []
    for name, losses in zip(names[1:], rest, strict=True):
        difference = relative_difference(losses, single) if losses and single else None
        result.append(Check(f"{name}: difference of losses", difference, 1e-5, at_most=True))
    moved, planned = (found.fact(names[-1], n) for n in ("collective_bytes", "gradient_bytes"))
    off = abs(moved / planned - 1) if moved is not None and planned else None
    result.append(
        Check(f"{names[-1]}: bytes summed, off from the gradients'", off, 0.05, at_most=True)
    )
    return result


def relative_difference(a: list[float], b: list[float]) -> float:
    """Return the largest relative difference of two lists of numbers."""
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))
