"""The two processes of a comparison: one runs JAX, one runs PyTorch, and never both at once.

Each serves requests over a pipe: make a subject, run it once, drop it. The command asks them in
turn, so that what disturbs the machine for a while disturbs both sides alike.
"""

import abc
import gc
import importlib
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import measure
from benchmarks.plan import COMPILED, OURS, Case, Ceilings, Subject


class Worker:
    """A process of one side, seen from the command. Raises RuntimeError for what fails in it."""

    def __init__(self, side: str, virtual_devices: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=serve, args=(other, side, virtual_devices), daemon=True
        )
        self._process.start()
        other.close()

    def ask(self, *request: Any) -> Any:
        """Send a request and wait for its answer."""
        self._pipe.send(request)
        try:
            failed, answer = self._pipe.recv()
        except EOFError as error:
            self._process.join()
            raise RuntimeError(
                f"a worker ended with exit code {self._process.exitcode} at {request[0]}: "
                "most likely for want of memory"
            ) from error
        if failed:
            raise RuntimeError(f"in a worker, at {request}:\n{answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()


def serve(pipe: Connection, side: str, virtual_devices: int) -> None:
    """Answer requests until the other end closes."""
    server = JaxServer(virtual_devices) if side == OURS else TorchServer()
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, getattr(server, name)(*arguments)))
        except Exception:  # goes to the other side of the pipe, which raises it
            pipe.send((True, traceback.format_exc()))


class Server(abc.ABC):
    """What both sides do; each request is a method, its answer the result."""

    def __init__(self) -> None:
        self._subjects: dict[str, Subject] = {}
        self._repeats: dict[str, int] = {}

    def make(self, suite: str, case: Case, variant: str) -> dict[str, Any]:
        """Build and compile a variant and run it to warm up; answer its facts."""
        module = importlib.import_module(f"benchmarks.{suite}")
        make = module.ours if variant == OURS else lambda c: module.twin(c, variant == COMPILED)
        subject = make(case)
        warm_up = subject.warm_up or subject.run
        seconds = first = measure.timed(warm_up)
        if first < 1.0 or variant == COMPILED:  # torch compiles in the first run
            seconds = measure.timed(warm_up)
        self._subjects[variant] = subject
        self._repeats[variant] = measure.repeats_for(seconds)
        return {"first_run_seconds": first, **subject.facts}

    def time(self, variant: str) -> tuple[float, int | None]:
        """Run a variant; answer its seconds and peak memory."""
        subject = self._subjects[variant]
        gc.collect()
        memory = subject.memory() if subject.memory else self._memory(subject)
        seconds = measure.timed(subject.run, self._repeats[variant])
        return seconds, memory.peak()

    def drop(self) -> None:
        """Forget all subjects."""
        self._subjects.clear()
        self._forget()
        gc.collect()

    @abc.abstractmethod
    def ceilings(self, dtype: str) -> Ceilings:
        """Measure the ceilings of this machine."""

    @abc.abstractmethod
    def _memory(self, subject: Subject) -> Any:
        """Begin to watch the memory of a run."""

    @abc.abstractmethod
    def _forget(self) -> None:
        """Drop what the library keeps."""


class JaxServer(Server):
    """gidd_jax."""

    def __init__(self, virtual_devices: int) -> None:
        super().__init__()
        # Both sides share a GPU: JAX must not take most of its memory at the start.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        if virtual_devices > 1:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", virtual_devices)
        # Compile times are reported: nothing may come from an earlier run.
        jax.config.update("jax_enable_compilation_cache", False)
        self._jax = jax

    def device(self) -> tuple[str, str]:
        """Answer the platform ('cpu', 'gpu', ...) and the name of the device."""
        first = self._jax.devices()[0]
        return first.platform, first.device_kind

    def ceilings(self, dtype: str) -> Ceilings:
        return measure.jax_ceilings(*_ceiling_size(self.device()[0]), dtype)

    def _memory(self, subject: Subject) -> Any:
        on_cpu = self.device()[0] == "cpu"
        return measure.ProcessMemory() if on_cpu else measure.XlaMemory(subject)

    def _forget(self) -> None:
        self._jax.clear_caches()


class TorchServer(Server):
    """The PyTorch twin."""

    def ceilings(self, dtype: str) -> Ceilings:
        kind = "gpu" if measure.torch_device() == "cuda" else "cpu"
        return measure.torch_ceilings(*_ceiling_size(kind), dtype)

    def _memory(self, subject: Subject) -> Any:
        del subject
        on_cpu = measure.torch_device() == "cpu"
        return measure.ProcessMemory() if on_cpu else measure.TorchGpuMemory()

    def _forget(self) -> None:
        import torch

        torch.compiler.reset()


def _ceiling_size(platform: str) -> tuple[int, int]:
    """Width of the product and bytes of the copy that reach the ceilings."""
    return (2048, 1 << 28) if platform == "cpu" else (8192, 1 << 32)
