"""What the TPU's own compiler expects of training, loss, sampling and correction; nothing is timed.

Examples:
  pip install libtpu
  python -m benchmarks.tpu
  python -m benchmarks.tpu --chips=v5e --cases=small,loss

Compiles for described chips that need not be here: the training step of each size on 16 of them
(small with a copy of the model on each, base and 1B split over all with mesh.fsdp), 16 x 512 tokens
a chip, in bfloat16, without and with recomputation; the rest for one chip. Prints a table of the
compiler's estimates, which are no measurements, and appends a JSON line per case and chip to
RESULTS/tpu.jsonl. A case takes one to three minutes.
"""

import datetime
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gidd_jax.cli import CommandFlags, load_config, nearest, run
from gidd_jax.errors import InputError

flags = CommandFlags()
TOPOLOGIES = {"v5e": "v5e-16", "v5p": "v5p-32", "v6e": "v6e-16"}  # 16 chips each
SIZES = {"small": 1, "base": 16, "1B": 16}  # mesh.fsdp
REMAT = ("none", "attention")
PROGRAMS = ("loss", "sampler", "correction")
ROWS, LENGTH, VOCAB_SIZE = 16, 512, 50258
MASK_ID = VOCAB_SIZE - 1
NUM_STEPS = 32

CHIPS = flags.DEFINE_list("chips", list(TOPOLOGIES), f"Some of {', '.join(TOPOLOGIES)}.")
CASES = flags.DEFINE_list(
    "cases", [*SIZES, *PROGRAMS], f"Some of {', '.join((*SIZES, *PROGRAMS))}."
)
RESULTS = flags.DEFINE_string("results", "benchmarks/results", "Folder to append results to.")


def main(argv: list[str]) -> None:
    del argv
    _check("chips", CHIPS.value, TOPOLOGIES)
    _check("cases", CASES.value, (*SIZES, *PROGRAMS))
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError("benchmarks.tpu needs the TPU's compiler: pip install libtpu")
    from benchmarks.comparison import append
    from gidd_jax.planning.plan import set_devices

    set_devices("cpu-16")
    print("| case | chip | estimate | MFU | beyond the state | costliest line |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for name in CASES.value:
        for chip in CHIPS.value:
            for line in _step_lines(name, chip) if name in SIZES else [_program_line(name, chip)]:
                append(Path(RESULTS.value) / "tpu.jsonl", line)
                print(_row(line), flush=True)


def _check(flag: str, given: list[str], legal: Any) -> None:
    for word in given:
        if word not in legal:
            raise InputError(f"--{flag}={word}: {nearest(word, legal)}")


def _step_lines(size: str, chip: str) -> Iterator[dict[str, Any]]:
    """Compile the training step of a size without and with recomputation."""
    from gidd_jax.planning.plan import plan_for
    from gidd_jax.planning.report import as_report
    from gidd_jax.settings import Settings

    for remat in REMAT:
        config = load_config(f"gidd:{size}")
        config.model.remat = remat
        config.mesh.fsdp, config.mesh.data = SIZES[size], -1
        config.train.batch_size = 16 * ROWS
        settings = Settings.from_config(config)
        report = as_report(plan_for(settings, TOPOLOGIES[chip], VOCAB_SIZE, MASK_ID))
        yield _line(f"step {size}, remat {remat}", chip, report["estimate"]) | {
            "temporaries": report["memory"]["activations"] + report["memory"]["gradients"],
            "fits": report["fits"],
            "way": report["memory"]["way"],
        }


def _program_line(name: str, chip: str) -> dict[str, Any]:
    """Compile a program of the small model for one chip; seconds are those of one step of it."""
    from gidd_jax.planning.ahead import compile_for_one
    from gidd_jax.planning.report import estimate_report
    from gidd_jax.planning.roofline import parse_topology

    topology = parse_topology(TOPOLOGIES[chip])
    program, arguments, static, steps = _loss() if name == "loss" else _sampling(name)
    compiled = compile_for_one(topology, program, *arguments, **static)
    assert topology.chip is not None
    estimate = compiled.estimate(topology.chip)
    report = estimate and estimate_report(estimate, topology.chip)
    if report is not None:
        report["seconds"] = report["seconds"] / steps
    title = name if name == "loss" else f"{name}, one step"
    return _line(f"{title} (small)", chip, report) | {"temporaries": compiled.temporaries}


def _loss() -> tuple[Any, tuple[Any, ...], dict[str, Any], int]:
    """The loss of 16 x 512 features of width 768, with the gradients by features and kernel."""
    import jax
    import jax.numpy as jnp

    from gidd_jax.models.dit import padded_vocab_size
    from gidd_jax.ops.fused_loss import fused_loss
    from gidd_jax.process import HybridProcess

    process = HybridProcess(VOCAB_SIZE, MASK_ID, 0.1)

    def loss(h: Any, kernel: Any, x: Any, z: Any, t: Any, coefficient: Any) -> Any:
        options: Any = {"cross_entropy": False, "vocab_size": VOCAB_SIZE}
        return fused_loss(process, h, kernel, None, x, z, t, coefficient, **options)[0]

    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    arguments = (
        jax.ShapeDtypeStruct((ROWS, LENGTH, 768), jnp.bfloat16),
        jax.ShapeDtypeStruct((768, padded_vocab_size(VOCAB_SIZE)), jnp.float32),
        ids,
        ids,
        jax.ShapeDtypeStruct((ROWS,), jnp.float32),
        jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32),
    )
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), arguments, {}, 1


def _sampling(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any], int]:
    """Ancestral sampling or self-correction of 16 rows of 512 tokens, as `Gidd` runs them."""
    import jax
    import jax.numpy as jnp

    from gidd_jax.draws import row_keys
    from gidd_jax.inference import programs
    from gidd_jax.models.dit import SIZES as MODELS
    from gidd_jax.models.dit import DiT
    from gidd_jax.parallel.sharding import unbox
    from gidd_jax.process import HybridProcess
    from gidd_jax.sampling.options import CorrectionOptions, SamplerOptions

    network = DiT(VOCAB_SIZE, **MODELS["small"], max_seq_len=LENGTH, dtype=jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0), ids, jnp.ones(ROWS))["params"]
    keys = jax.eval_shape(lambda: row_keys(jax.random.key(0), jnp.arange(ROWS)))
    free = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_)
    batch = programs.Batch(unbox(params), keys, ids, free, None)
    static: dict[str, Any] = {
        "network": network,
        "process": HybridProcess(VOCAB_SIZE, MASK_ID, 0.1),
        "trace": False,
    }
    if name == "correction":
        # It ends when nothing changes any more: the loop has no known length, and counts once.
        static["options"] = CorrectionOptions(num_steps=NUM_STEPS)
        return programs.correct, (batch,), static, 1
    static["special"] = programs.SpecialIds(0, 1, MASK_ID, VOCAB_SIZE)
    static |= {"options": SamplerOptions(num_steps=NUM_STEPS), "num_free": LENGTH}
    return programs.diffusion, (batch,), static, NUM_STEPS


def _line(case: str, chip: str, estimate: dict[str, Any] | None) -> dict[str, Any]:
    packages = {name: _version(name) for name in ("jax", "libtpu")}
    date = datetime.date.today().isoformat()
    return {"case": case, "chip": chip, "estimate": estimate, "date": date, **packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # the library lies at TPU_LIBRARY_PATH
        return None


def _row(line: dict[str, Any]) -> str:
    cells, estimate = [line["case"], line["chip"]], line["estimate"]
    if estimate is None:
        cells += ["does not fit" if line.get("fits") is False else "-", "-"]
    else:
        mfu = estimate.get("mfu")
        seconds = f"{1e3 * estimate['seconds']:.1f} ms"
        cells += [seconds, "-" if mfu is None else f"{100 * mfu:.1f} %"]
    cells.append(f"{line['temporaries'] / 1e9:.2f} GB")
    costliest = estimate["operations"][0] if estimate else None
    cells.append(costliest["source"] if costliest else "-")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    run(main, flags)
