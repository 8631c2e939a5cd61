"""Suite blocks: texts block by block, with and without a cache, beside whole rows.

All make as many network calls as a row has tokens: whole rows so many steps, blocks one for each of
their tokens.
"""

from typing import Any

from benchmarks import inputs
from benchmarks.measure import jax_subject
from benchmarks.plan import Case, Check, Found, Subject

BLOCK = 32  # that of the target
# What goes through the network in a call: the row; the row, for one block after another; what
# follows the finished tokens; the block alone, of a model that was trained by blocks.
KINDS = ("rows", "uncached", "prefix", "causal")
LEAST = 5.0  # times whole rows' tokens a second, with blocks of 32 and their cache


def cases(scale: str, dtype: str) -> list[Case]:
    """Return the cases of the target and a series over the length of blocks."""
    if scale == "small":
        return [_case(kind, 2, 32, 1, 32, 8, 64, dtype) for kind in KINDS]
    size = (2, 256, 1, 512) if scale == "cpu" else (12, 768, 16, 512)
    vocab_size = 4096 if scale == "cpu" else 50304
    result = [_case(kind, *size, BLOCK, vocab_size, dtype) for kind in KINDS]
    result += [_case("causal", *size, block, vocab_size, dtype, "block") for block in (16, 64, 128)]
    return result


def _case(
    kind: str,
    num_layers: int,
    width: int,
    batch: int,
    length: int,
    block: int,
    vocab_size: int,
    dtype: str,
    sweep: str = "",
) -> Case:
    shape = {
        "num_layers": num_layers,
        "hidden_size": width,
        "num_heads": max(1, width // 64),
        "batch": batch,
        "length": length,
        "block": block,
        "vocab_size": vocab_size,
        "dtype": dtype,
    }
    name = f"{kind}_{num_layers}x{width}_{batch}x{length}"
    name += "" if kind == "rows" else f"_block{block}"
    return Case(
        kind=kind,
        name=name + f"_by_{sweep}" if sweep else name,
        shape=shape,
        tokens=batch * length,
        flops=0.0,
        sweep=sweep,
        rounds=3,  # up to half a minute each on two cores
    )


def ours(case: Case) -> Subject:
    """The loop of the sampler as `Gidd` compiles it, or without windows."""
    import jax
    import jax.numpy as jnp

    from gidd_jax.draws import row_keys
    from gidd_jax.models.gidd import TimeFreeTransformer
    from gidd_jax.process import LogSnrProcess
    from gidd_jax.sampling.loop import sample_diffusion
    from gidd_jax.sampling.options import SamplerOptions
    from gidd_jax.sampling.windows import windows_of

    shape = case.shape
    length, block = shape["length"], shape["block"]
    network = TimeFreeTransformer(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        num_layers=shape["num_layers"],
        num_heads=shape["num_heads"],
        max_seq_len=length,
        dtype=jnp.dtype(shape["dtype"]),
        block_length=block if case.kind == "causal" else 0,
    )
    process = LogSnrProcess(shape["vocab_size"], shape["vocab_size"] - 1)
    is_whole = case.kind == "rows"
    options = SamplerOptions(
        num_steps=length if is_whole else block, block_length=0 if is_whole else block
    )

    def draw(params: Any, keys: Any) -> Any:
        windows = None
        if case.kind in ("prefix", "causal"):
            windows = windows_of(network, params, options, length)

        def features(z_t: Any, times: Any) -> Any:
            return network.apply({"params": params}, z_t, times, method="features")

        def project(h: Any) -> Any:
            return network.apply({"params": params}, h, method="project")

        return sample_diffusion(
            process, features, options, keys, length, project=project, windows=windows
        ).ids

    keys = row_keys(jax.random.key(0), jnp.arange(shape["batch"]))
    return jax_subject(draw, inputs.random_parameters(network), keys)


def checks(scale: str, found: Found) -> list[Check]:
    """Return how many times the tokens a second of whole rows blocks have."""
    rows, *others = (case for case in cases(scale, "float32") if not case.sweep)
    whole, result = found.get(rows.name), []
    for case in others:
        one = found.get(case.name)
        ratio = None if whole is None or one is None else whole.seconds / one.seconds
        least = LEAST if case.kind == "causal" and scale == "cpu" else None
        result.append(Check(f"{case.name}: times whole rows", ratio, least))
    return result
