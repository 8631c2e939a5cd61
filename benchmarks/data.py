"""Suite data: batches from shards, whether a training step waits for them, and making shards."""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import inputs, preparing
from benchmarks.plan import Case, Check, Found, Subject

VOCAB_SIZE = 50304
TOKENS_PER_SECOND = 5e6
LARGEST_WAIT = 0.01  # share of the steps' time
NAME = "data_b32_l512"


def cases(scale: str, dtype: str) -> list[Case]:
    """Return reading alone at several lengths, reading while a network trains, and preparing."""
    del dtype
    if scale == "small":
        small = [_case("data", 4, 16, 8), _case("waiting", 4, 16, 4)]
        return [*small, *preparing.cases(scale)]
    return [
        _case("data", 32, 512, 128),
        _case("data", 32, 1024, 64, sweep="length"),
        _case("data", 32, 128, 512, sweep="length"),
        _case("data", 32, 512, 128, sweep="length"),
        _case("waiting", 32, 512, 20),
        *preparing.cases(scale),
    ]


def _case(kind: str, batch: int, length: int, batches: int, sweep: str = "") -> Case:
    name = f"{kind}_b{batch}_l{length}"
    return Case(
        kind=kind,
        name=f"{name}_by_{sweep}" if sweep else name,
        shape={"batch": batch, "length": length, "batches": batches, "vocab_size": VOCAB_SIZE},
        tokens=batch * length * batches,
        bytes_moved=batch * length * batches * (2.0 + 5.0),  # uint16 in; int32 and bool out
        sweep=sweep,
    )


def ours(case: Case) -> Subject:
    """The batches of gidd_jax.data.pipeline from shards of random tokens; or making shards."""
    if case.kind == "prepare":
        return preparing.ours(case)
    from gidd_jax.data.pipeline import TrainBatches

    length, batch = case.shape["length"], case.shape["batch"]
    tokenizer = inputs.word_tokenizer(VOCAB_SIZE)
    folder = Path(tempfile.mkdtemp(prefix="gidd_jax_shards_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_shards(folder, tokenizer, length, records=max(64, (4 << 20) // length))
    batches = TrainBatches(_settings(folder), tokenizer, length, batch, seed=0)
    if case.kind == "waiting":
        return _waiting(case, batches)

    def run() -> None:
        for _ in range(case.shape["batches"]):
            next(batches)

    return Subject(lambda: on_one_core(run))


def _waiting(case: Case, batches: Any) -> Subject:
    """Steps of a network that take batches as the trainer does; the share of time in waiting."""
    import jax
    import jax.numpy as jnp

    # Half a million tokens a second: what a fast GPU does with the paper's small network.
    weights = jnp.ones((64, 2048), jnp.float32)

    @jax.jit
    def step(tokens: Any) -> Any:
        h = jnp.sin(tokens.reshape(-1, 1) * jnp.arange(64.0)[None])
        return jnp.sum(jnp.dot(h, weights) ** 2)

    def run() -> float:
        waited, start = 0.0, time.perf_counter()
        for _ in range(case.shape["batches"]):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            jax.block_until_ready(step(batch["tokens"]))
        return waited / (time.perf_counter() - start)

    run()
    return Subject(run, {"waiting_share": run()})


def _settings(folder: Path) -> Any:
    from gidd_jax.cli import load_config
    from gidd_jax.settings import Settings

    data = Settings.from_config(load_config("base")).data  # its tokenizer is not read
    return replace(data, path=str(folder), validation="last:1", mode="packed")


def write_shards(folder: Path, tokenizer: Any, length: int, records: int) -> None:
    """Write a folder of shards as gidd_jax.prepare_data does, of random tokens."""
    import numpy as np
    from array_record.python.array_record_module import ArrayRecordWriter

    from gidd_jax.data import shards

    rng = np.random.default_rng(0)
    made = {}
    for split, count in (("train", records), ("validation", 1)):
        file = folder / f"{split}-00000.array_record"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for ids in rng.integers(0, VOCAB_SIZE - 3, (count, length)):
            writer.write(shards.encode_record(ids, 4 * length, tokenizer.vocab_size))
        writer.close()
        size = file.stat().st_size
        made[split] = [shards.Shard(file.name, size, "", count, count, count * length, 0)]
    shards.Manifest(
        path="random",
        validation="last:1",
        tokenizer="words",
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        mode="packed",
        seq_len=length,
        splits=made,
    ).write(folder)


def on_one_core(run: Any) -> None:
    """Run with all threads of this process on one core, where the system can do that."""
    if sys.platform != "linux":
        run()
        return
    before = os.sched_getaffinity(0)
    pin_threads({min(before)})
    try:
        run()
    finally:
        pin_threads(before)


def pin_threads(cores: set[int]) -> None:
    """Let every thread of this process, and those it starts, run on the given cores alone."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread.name), cores)


def checks(scale: str, found: Found) -> list[Check]:
    """Return the targets beside what was measured."""
    del scale
    speed = found.get(NAME)
    waiting = found.fact(NAME.replace("data", "waiting"), "waiting_share")
    return [
        Check(
            f"{NAME}: tokens/s on one core", speed and speed.tokens_per_second, TOKENS_PER_SECOND
        ),
        Check("waiting: share of time in waiting", waiting, LARGEST_WAIT, at_most=True),
        *preparing.checks(found),
    ]
