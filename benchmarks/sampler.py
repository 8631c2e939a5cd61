"""Suite sampler: the head of an ancestral step, whole samples, and self-correction."""

from collections.abc import Mapping
from typing import Any

from benchmarks import inputs
from benchmarks.measure import jax_subject, torch_device, torch_wait
from benchmarks.plan import COMPILED, EAGER, OURS, TWIN, Case, Check, Found, Subject, ratio_checks

VOCAB_SIZE = 50304
P_UNIFORM = 0.1
STEP = 1 / 32  # of the head's case: s = t - STEP
TARGETS: dict[str, dict[str, Mapping[str, float]]] = {
    "cpu": {
        "head_d256_n512_t0.5": {COMPILED: 10.0},
        "head_d256_n512_t0.06": {COMPILED: 5.0},
        "sampler_4x256_4x128_steps32": {EAGER: 12.0, COMPILED: 5.0},
    },
    "gpu": {
        "head_d768_n8192_t0.5": {COMPILED: 5.0},
        "head_d768_n8192_t0.06": {COMPILED: 5.0},
        "sampler_12x768_16x512_steps32": {COMPILED: 2.0},
        "correction_12x768_16x512_steps4": {EAGER: 10.0},
    },
}
# On a CPU, arithmetic leaves no large factor over the twin where every position needs a dense call:
# what can be asked is how near the machine's limit we are.
OF_CEILING = {"cpu": {"correction_4x256_16x128_steps4": 0.5}}
OTHERS = (("psi", "hybrid"), ("mode_seeking", "hybrid"), ("remdm_cap", "masked"))
ORDERED = {name: f"sampler_4x256_4x128_steps32_{name}" for name in ("confidence", "entropy_bound")}
BODY, WHOLE = "body_12x768_4x128", "sampler_12x768_4x128_steps1"


def cases(scale: str, dtype: str) -> list[Case]:
    """Return the cases of the targets, a series over the batch, and the share of the body."""
    if scale == "small":
        return [
            _head(32, 1, 16, 512, 0.5, dtype),
            _network("sampler", 2, 32, 2, 16, 512, dtype, TWIN, num_steps=4),
            _network("correction", 2, 32, 2, 16, 512, dtype, (EAGER,), num_steps=2),
            _network("body", 2, 32, 2, 16, 512, dtype),
        ]
    layers, width, batch, length = (4, 256, 4, 128) if scale == "cpu" else (12, 768, 16, 512)
    size = (layers, width, batch, length, VOCAB_SIZE, dtype)
    result = [_head(width, batch, length, VOCAB_SIZE, t, dtype) for t in (0.5, 0.06)]
    result.append(_network("sampler", *size, TWIN, num_steps=32))
    sixteen = (layers, width, 16, length, VOCAB_SIZE, dtype)
    result.append(_network("correction", *sixteen, (EAGER,), num_steps=4))
    result += [
        _network("sampler", layers, width, b, length, VOCAB_SIZE, dtype, num_steps=2, sweep="batch")
        for b in (1, 2, 4)
    ]
    if scale == "cpu":
        small = (12, 768, 4, 128, VOCAB_SIZE, dtype)
        result += [_network("body", *small), _network("sampler", *small, num_steps=1)]
        result += [_network("sampler", *size, num_steps=32, method=name) for name in ORDERED]
        result += [
            _network("sampler", *size, num_steps=16, method=name, process=process)
            for name, process in OTHERS
        ]
        # More steps than tokens: most calls could change nothing, and are left out.
        alone = (layers, width, 1, length, VOCAB_SIZE, dtype)
        result.append(_network("sampler", *alone, num_steps=4 * length, process="masked"))
        hitting = {"num_steps": length, "process": "masked", "method": "first_hitting"}
        result.append(_network("sampler", *alone, **hitting))
    return result


def _head(width: int, batch: int, length: int, vocab_size: int, t: float, dtype: str) -> Case:
    shape = {
        "hidden_size": width,
        "batch": batch,
        "length": length,
        "vocab_size": vocab_size,
        "t": t,
        "dtype": dtype,
    }
    tokens = batch * length
    return Case(
        kind="head",
        name=f"head_d{width}_n{tokens}_t{t}",
        shape=shape,
        tokens=tokens,
        flops=2.0 * tokens * width * vocab_size,  # of the dense product
        bytes_moved=width * vocab_size * (4.0 if dtype == "float32" else 2.0),
        variants=(OURS, *TWIN),
    )


def _network(
    kind: str,
    num_layers: int,
    width: int,
    batch: int,
    length: int,
    vocab_size: int,
    dtype: str,
    twin: tuple[str, ...] = (),
    *,
    num_steps: int = 1,
    sweep: str = "",
    process: str = "hybrid",
    method: str = "ancestral",
) -> Case:
    shape = {
        "num_layers": num_layers,
        "hidden_size": width,
        "num_heads": max(1, width // 64),
        "batch": batch,
        "length": length,
        "vocab_size": vocab_size,
        "num_steps": num_steps,
        "process": process,
        "method": method,
        "dtype": dtype,
    }
    tokens = batch * length
    body = num_layers * (2.0 * 12 * width**2 + 4 * length * width)
    head = 0.0 if kind == "body" else 2.0 * width * vocab_size  # of the dense product
    name = f"{kind}_{num_layers}x{width}_{batch}x{length}"
    name += "" if kind == "body" else f"_steps{num_steps}"
    name += "" if process == "hybrid" else f"_{process}"
    name += "" if method == "ancestral" else f"_{method}"
    return Case(
        kind=kind,
        name=name + f"_by_{sweep}" if sweep else name,
        shape=shape,
        tokens=tokens,
        flops=num_steps * tokens * (body + head),
        variants=(OURS, *twin),
        sweep=sweep,
    )


def ours(case: Case) -> Subject:
    """The public methods of a model; for the head the projection and the step of the sampler."""
    return _our_head(case) if case.kind == "head" else _our_network(case)


def _our_head(case: Case) -> Subject:
    import jax
    import jax.numpy as jnp

    from gidd_jax.draws import row_keys
    from gidd_jax.process import HybridProcess
    from gidd_jax.sampling.filters import unnormalised
    from gidd_jax.sampling.steps import ancestral_step
    from gidd_jax.sampling.thinning import network_at

    vocab_size, t = case.shape["vocab_size"], case.shape["t"]
    process = HybridProcess(vocab_size, vocab_size - 1, P_UNIFORM)
    h, kernel, bias, z_t = _head_arrays(case)
    keys = row_keys(jax.random.key(0), jnp.arange(len(z_t)))

    def head(keys: Any, h: Any, kernel: Any, bias: Any, z_t: Any) -> Any:
        def project(h: Any) -> Any:
            return jnp.einsum("bkd,dv->bkv", h, kernel, preferred_element_type=jnp.float32) + bias

        times = jnp.full(len(z_t), t)
        network = network_at(process, lambda z_t, t: h, project, unnormalised, z_t, times)
        everywhere = jnp.ones(z_t.shape, bool)
        return ancestral_step(process, keys, network, z_t, everywhere, t, t - STEP)

    dtype = case.shape["dtype"]
    arrays = jnp.asarray(h, dtype), jnp.asarray(kernel, dtype), jnp.asarray(bias)
    return jax_subject(head, keys, *arrays, jnp.asarray(z_t))


def _our_network(case: Case) -> Subject:
    import jax
    import jax.numpy as jnp

    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.models.dit import DiT
    from gidd_jax.process import HybridProcess, MaskedProcess

    shape, vocab_size = case.shape, case.shape["vocab_size"]
    network = DiT(
        vocab_size=vocab_size,
        hidden_size=shape["hidden_size"],
        num_layers=shape["num_layers"],
        num_heads=shape["num_heads"],
        max_seq_len=shape["length"],
        dtype=jnp.dtype(shape["dtype"]),
    )
    params = inputs.random_parameters(network)
    batch, length, num_steps = shape["batch"], shape["length"], shape["num_steps"]
    x = inputs.token_ids(shape, batch, length)
    if case.kind == "body":

        def body(params: Any, z_t: Any, t: Any) -> Any:
            return network.apply({"params": params}, z_t, t, method="features")

        return jax_subject(body, params, jnp.asarray(x), jnp.asarray(inputs.times(batch)))
    hybrid = HybridProcess(vocab_size, vocab_size - 1, P_UNIFORM)
    masked = MaskedProcess(vocab_size, vocab_size - 1)
    process = hybrid if shape["process"] == "hybrid" else masked
    model = Gidd(network, params, inputs.word_tokenizer(vocab_size), process)
    if case.kind == "correction":
        return Subject(
            lambda: model.correct(x, batch_size=batch, num_steps=num_steps, patience=num_steps)
        )
    options = {"num_steps": num_steps, "method": shape["method"]}
    if shape["method"] == "entropy_bound":
        options["epsilon"] = 0.0  # as many calls as there are steps
    return Subject(
        lambda: jax.block_until_ready(
            model.generate(batch, length=length, batch_size=batch, **options).ids
        )
    )


def twin(case: Case, compiled: bool) -> Subject:
    """The dense posterior, a loop over network calls, and correction of one sample at a time."""
    import torch

    from benchmarks import torch_twin

    shape, device = case.shape, torch_device()
    dtype, vocab_size = getattr(torch, case.shape["dtype"]), case.shape["vocab_size"]
    process = torch_twin.Hybrid(vocab_size, vocab_size - 1, P_UNIFORM)
    if case.kind == "head":
        return _twin_head(case, process, compiled)
    torch.manual_seed(0)
    model = torch_twin.DiT(
        vocab_size, shape["hidden_size"], shape["num_layers"], shape["num_heads"], cond_dim=128
    ).to(device)
    sampler = torch_twin.Sampler(process, model, compiled, dtype)
    batch, length, num_steps = shape["batch"], shape["length"], shape["num_steps"]
    if case.kind == "correction":
        x = torch.from_numpy(inputs.token_ids(shape, batch, length)).long().to(device)

        def correct(count: int, steps: int) -> None:
            sampler.correct(x[:count], steps, temperature=0.1, time=0.01, patience=steps)
            torch_wait()

        return Subject(lambda: correct(batch, num_steps), warm_up=lambda: correct(1, 2))

    def sample(steps: int) -> None:
        sampler(batch, length, steps, device)
        torch_wait()

    return Subject(lambda: sample(num_steps), warm_up=lambda: sample(2))


def _twin_head(case: Case, process: Any, compiled: bool) -> Subject:
    import torch

    from benchmarks import torch_twin

    device, dtype = torch_device(), getattr(torch, case.shape["dtype"])
    h, kernel, bias, z_t = (torch.from_numpy(a).to(device) for a in _head_arrays(case))
    h, kernel, bias, z_t = h.to(dtype), kernel.to(dtype), bias.to(dtype), z_t.long()
    t = torch.full((len(z_t),), case.shape["t"], device=device)

    def head(h: Any, kernel: Any, bias: Any, z_t: Any, t: Any, s: Any) -> Any:
        return torch_twin.ancestral_step(process, h @ kernel + bias, z_t, t, s)

    step = torch.compile(head) if compiled else head

    @torch.no_grad()
    def run() -> None:
        step(h, kernel, bias, z_t, t, t - STEP)
        torch_wait()

    return Subject(run)


def _head_arrays(case: Case) -> tuple[Any, ...]:
    import numpy as np

    shape = case.shape
    h, kernel, bias = inputs.projection(shape, case.tokens)
    x = inputs.token_ids(shape, shape["batch"], shape["length"])
    t = np.full(len(x), shape["t"], np.float32)
    return h.reshape(*x.shape, -1), kernel, bias, inputs.noisy_ids(shape, x, t)


def checks(scale: str, found: Found) -> list[Check]:
    """Return the targets beside what was measured, and the share of the body in a step."""
    result = [
        check
        for case, speed_ups in TARGETS[scale].items()
        for check in ratio_checks(found, case, speed_ups)
    ]
    for case, bound in OF_CEILING.get(scale, {}).items():
        one = found.get(case)
        result.append(Check(f"{case}: of the matmul ceiling", one and one.matmul_fraction, bound))
    body, whole = found.get(BODY), found.get(WHOLE)
    if body is not None and whole is not None:
        share = body.seconds / whole.seconds
        result.append(Check("12x768: share of the blocks in a step", share, None))
    confidence, bound = (found.get(name) for name in ORDERED.values())
    if confidence is not None and bound is not None:
        ratio = confidence.seconds / bound.seconds  # entropy_bound may take 1.1 of it
        result.append(Check("confidence / entropy_bound, as many calls", ratio, 1 / 1.1))
    return result
