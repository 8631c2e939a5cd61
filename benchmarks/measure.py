"""How things are measured: times, peak memory, the ceilings of the machine and its description."""

import contextlib
import ctypes
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.plan import Ceilings, Subject

SHORTEST = 0.02  # seconds: shorter work is repeated within one measurement
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class ProcessMemory:
    """Peak of the resident memory of this process above what it held at the start, by Linux."""

    def __init__(self) -> None:
        self._before: int | None = None
        if STATUS.is_file() and os.access(CLEAR, os.W_OK):
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps is not in use
            CLEAR.write_text("5")  # start the peak anew
            self._before = status_bytes(STATUS.read_text(), "VmRSS")

    def peak(self) -> int | None:
        if self._before is None:
            return None
        return max(0, status_bytes(STATUS.read_text(), "VmHWM") - self._before)


def status_bytes(text: str, field: str) -> int:
    """Return a size out of the text of /proc/PID/status, in bytes."""
    line = next(line for line in text.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


class TreeMemory:
    """Peak of the memory of all processes that this one starts, looked at every 10 ms, by Linux.

    Mapped files do not count: their pages belong to the system's cache.
    """

    def __init__(self) -> None:
        self._peak: int | None = 0 if STATUS.is_file() else None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._peak is not None and not self._done.wait(0.01):
            self._peak = max(self._peak, sum(map(_anonymous_bytes, _descendants(os.getpid()))))

    def peak(self) -> int | None:
        self._done.set()
        self._thread.join()
        return self._peak


def _descendants(process: int) -> list[int]:
    """Ids of the processes that a process has started, and of those that they have."""
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            for child in map(int, file.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _anonymous_bytes(process: int) -> int:
    try:
        return status_bytes(Path(f"/proc/{process}/status").read_text(), "RssAnon")
    except (OSError, StopIteration):  # it has just ended
        return 0


class TorchGpuMemory:
    """The same of the memory that torch holds on its GPU."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._cuda.reset_peak_memory_stats()
        self._before = self._cuda.memory_allocated()

    def peak(self) -> int | None:
        return self._cuda.max_memory_allocated() - self._before


class XlaMemory:
    """What the compiler plans for temporaries: on GPU, where JAX's peak cannot be started anew."""

    def __init__(self, subject: Subject) -> None:
        self._bytes = subject.facts.get("xla_temp_bytes")

    def peak(self) -> int | None:
        return self._bytes


def repeats_for(seconds: float) -> int:
    """Return how often work of this length is repeated so that the clock can tell it."""
    return max(1, min(10_000, int(SHORTEST / max(seconds, 1e-9)) + 1))


def timed(run: Callable[[], Any], repeats: int = 1) -> float:
    """Return the seconds of one run, the mean over `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def compiled_facts(compiled: Any, seconds: float) -> dict[str, Any]:
    """Return the facts of a program compiled by JAX: compile time, XLA's memory and FLOPs."""
    facts: dict[str, Any] = {"compile_seconds": seconds}
    memory = compiled.memory_analysis()
    if memory is not None:
        facts["xla_temp_bytes"] = memory.temp_size_in_bytes
        facts["xla_argument_bytes"] = memory.argument_size_in_bytes
    cost = compiled.cost_analysis()
    if cost:  # XLA counts the body of a loop once
        facts["xla_flops"] = float(cost.get("flops", 0.0))
    return facts


def jax_subject(function: Callable[..., Any], *arguments: Any, **jit: Any) -> Subject:
    """Compile a function for its arguments ahead of time; a run ends when its results are there."""
    import jax

    start = time.perf_counter()
    compiled = jax.jit(function, **jit).lower(*arguments).compile()
    facts = compiled_facts(compiled, time.perf_counter() - start)
    return Subject(lambda: jax.block_until_ready(compiled(*arguments)), facts)


def jax_ceilings(width: int = 2048, copied: int = 1 << 28, dtype: str = "float32") -> Ceilings:
    """Measure the ceilings with JAX: a [width, width] product and a copy of so many bytes."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((width, width), dtype)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32).astype(a.dtype))
    b = jnp.ones(copied // 4, jnp.float32)
    copy = jax.jit(lambda b: b + 1.0)  # reads and writes as a copy does, and is not optimised away
    seconds = [
        _best(lambda: jax.block_until_ready(product(a))),
        _best(lambda: jax.block_until_ready(copy(b))),
    ]
    return Ceilings(2.0 * width**3 / seconds[0], 2.0 * copied / seconds[1])


def torch_ceilings(width: int = 2048, copied: int = 1 << 28, dtype: str = "float32") -> Ceilings:
    """The same with PyTorch."""
    import torch

    device = torch_device()
    a = torch.ones(width, width, dtype=getattr(torch, dtype), device=device)
    b = torch.ones(copied // 4, device=device)
    into = torch.empty_like(b)

    def synchronised(run: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (run(), torch_wait())

    seconds = [_best(synchronised(lambda: a @ a)), _best(synchronised(lambda: into.copy_(b)))]
    return Ceilings(2.0 * width**3 / seconds[0], 2.0 * copied / seconds[1])


def _best(run: Callable[[], Any], count: int = 7) -> float:
    run()
    return min(timed(run) for _ in range(count))


def torch_device() -> str:
    """Return where the twin runs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_wait() -> None:
    """Wait until the GPU of the twin, if there is one, has done its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host() -> dict[str, Any]:
    """Describe the machine and what runs on it; no names of hosts or users."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "torch", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "load_before": round(os.getloadavg()[0], 2),
    }


def cpu_model(file: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor."""
    if file.is_file():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Return the memory of the machine in GiB, None where the system does not say."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None
