"""Suite loss: output projection and GIDD loss, values and gradients."""

from collections.abc import Mapping
from typing import Any

from benchmarks import inputs
from benchmarks.measure import jax_subject, torch_device, torch_wait
from benchmarks.plan import COMPILED, EAGER, OURS, TWIN, Case, Check, Found, Subject, ratio_checks

P_UNIFORM = 0.1
VOCAB_SIZE = 50304
LENGTH = 512
# (least speed-ups over the twin, largest shares of its memory)
TARGETS: dict[str, dict[str, tuple[Mapping[str, float], Mapping[str, float]]]] = {
    "cpu": {
        "loss_d256_n4096": ({EAGER: 3.5, COMPILED: 1.7}, {EAGER: 1 / 30}),
        "loss_d768_n2048": ({EAGER: 1.7, COMPILED: 1.15}, {EAGER: 1 / 9}),
    },
    "gpu": {
        "loss_d768_n32768": ({COMPILED: 2.0}, {COMPILED: 1 / 10}),
        "loss_d2048_n16384": ({COMPILED: 2.0}, {COMPILED: 1 / 10}),
    },
}


def cases(scale: str, dtype: str) -> list[Case]:
    """Return the cases of the targets, and series over tokens and vocabulary."""
    if scale == "small":
        return [_case(32, 256, 512, dtype, TWIN), _case(32, 128, 512, dtype, sweep="tokens")]
    sizes = [(256, 4096), (768, 2048)] if scale == "cpu" else [(768, 32768), (2048, 16384)]
    compared = [_case(d, n, VOCAB_SIZE, dtype, TWIN) for d, n in sizes]
    d, n = sizes[0]
    counts = [_case(d, n // k, VOCAB_SIZE, dtype, sweep="tokens") for k in (8, 4, 2)]
    vocabularies = [_case(d, n // 4, VOCAB_SIZE // k, dtype, sweep="vocab_size") for k in (4, 2, 1)]
    return [*compared, *counts, *vocabularies]


def _case(
    width: int,
    tokens: int,
    vocab_size: int,
    dtype: str,
    twin: tuple[str, ...] = (),
    sweep: str = "",
) -> Case:
    shape = {
        "hidden_size": width,
        "tokens": tokens,
        "vocab_size": vocab_size,
        "p_uniform": P_UNIFORM,
        "dtype": dtype,
    }
    item = 4 if dtype == "float32" else 2
    name = f"loss_d{width}_n{tokens}"
    return Case(
        kind="loss",
        name=name if not sweep else f"{name}_v{vocab_size}_by_{sweep}",
        shape=shape,
        tokens=tokens,
        flops=6.0 * tokens * width * vocab_size,
        # features and their gradient, weights and their gradient in float32
        bytes_moved=float(tokens * width * 2 * item + width * vocab_size * (item + 4)),
        variants=(OURS, *twin),
        sweep=sweep,
    )


def ours(case: Case) -> Subject:
    """The fused projection and loss, with gradients by features, weights and bias."""
    import jax
    import jax.numpy as jnp

    from gidd_jax.ops.fused_loss import fused_loss
    from gidd_jax.process import HybridProcess

    vocab_size = case.shape["vocab_size"]
    process = HybridProcess(vocab_size, vocab_size - 1, case.shape["p_uniform"])
    h, kernel, bias, x, z_t, t = _arrays(case)

    def loss(h: Any, kernel: Any, bias: Any, x: Any, z_t: Any, t: Any) -> Any:
        weights = process.loss_weights(x, z_t, t) / x.size
        return fused_loss(
            process,
            h,
            kernel,
            bias,
            x,
            z_t,
            t,
            weights,
            cross_entropy=False,
            vocab_size=vocab_size,
        )[0]

    arrays = (jnp.asarray(h, case.shape["dtype"]), *map(jnp.asarray, (kernel, bias, x, z_t, t)))
    return jax_subject(jax.value_and_grad(loss, argnums=(0, 1, 2)), *arrays)


def twin(case: Case, compiled: bool) -> Subject:
    """The projection, the dense loss and torch's backward pass."""
    import torch

    from benchmarks import torch_twin

    vocab_size, device = case.shape["vocab_size"], torch_device()
    process = torch_twin.Hybrid(vocab_size, vocab_size - 1, case.shape["p_uniform"])
    dtype = getattr(torch, case.shape["dtype"])
    h, kernel, bias, x, z_t, t = (torch.from_numpy(a).to(device) for a in _arrays(case))
    weights = tuple(a.to(dtype).requires_grad_() for a in (h, kernel, bias))
    x, z_t = x.long(), z_t.long()
    loss = torch_twin.projected_loss
    if compiled:
        loss = torch.compile(loss)

    def run() -> None:
        loss(process, *weights, x, z_t, t).backward()
        for a in weights:
            a.grad = None
        torch_wait()

    return Subject(run)


def _arrays(case: Case) -> tuple[Any, ...]:
    tokens = case.tokens
    length = min(LENGTH, tokens)
    h, kernel, bias = inputs.projection(case.shape, tokens)
    x = inputs.token_ids(case.shape, tokens // length, length)
    t = inputs.times(len(x))
    z_t = inputs.noisy_ids(case.shape, x, t)
    return h.reshape(*x.shape, -1), kernel, bias, x, z_t, t


def checks(scale: str, found: Found) -> list[Check]:
    """Return the targets beside what was measured."""
    return [
        check
        for case, (speed_ups, shares) in TARGETS[scale].items()
        for check in ratio_checks(found, case, speed_ups, shares)
    ]
