"""Runs of several processes, one for each host (or GPU): JAX's own distributed runtime.

Imports jax only when it is started, so that `--help` answers at once.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from absl.flags import FlagHolder

from gidd_jax.cli import CommandFlags
from gidd_jax.errors import InputError, first_line


class DistributedFlags(NamedTuple):
    """The flags of a command that may be one of several processes."""

    distributed: FlagHolder[bool]
    coordinator_address: FlagHolder[str | None]
    num_processes: FlagHolder[int | None]
    process_id: FlagHolder[int | None]

    def start(self) -> bool:
        """Join the other processes, if the flags say so; before anything touches a device.

        Return whether this is the process that prints and writes files. Raises InputError when
        flags are missing, or no cluster is found.
        """
        address = {
            "coordinator_address": self.coordinator_address.value,
            "num_processes": self.num_processes.value,
            "process_id": self.process_id.value,
        }
        given = [name for name, value in address.items() if value is not None]
        if not self.distributed.value:
            if given:
                raise InputError(f"--{given[0]} needs --distributed")
            return True
        if given and len(given) < len(address):
            missing = ", ".join(f"--{name}" for name in address if name not in given)
            raise InputError(f"--{given[0]} needs {missing} too; or give none of them on a cluster")
        return _initialize(address) == 0


def distributed_flags(flags: CommandFlags) -> DistributedFlags:
    """Define `--distributed` and what goes with it among the flags of a command."""
    return DistributedFlags(
        flags.DEFINE_bool(
            "distributed",
            False,
            "Run as one of several processes with the same command. JAX finds the others on TPU "
            "pods, SLURM, Open MPI and Kubernetes; elsewhere also give --coordinator_address, "
            "--num_processes and --process_id.",
        ),
        flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0."),
        flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1),
        flags.DEFINE_integer(
            "process_id", None, "Number of this process, counted from 0.", lower_bound=0
        ),
    )


def _initialize(address: dict[str, str | int | None]) -> int:
    import jax
    from absl import logging

    count, number = address["num_processes"], address["process_id"]
    if count is not None and number is not None and int(number) >= int(count):
        raise InputError(f"--process_id={number}: must be less than --num_processes={count}")
    try:
        jax.distributed.initialize(**address)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"--distributed: {first_line(error)}; on a cluster that JAX does not know give "
            "--coordinator_address=HOST:PORT, --num_processes and --process_id"
        ) from error
    logging.info(
        "Process %d of %d with %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )
    return jax.process_index()


_LONGEST = 2000  # bytes of an error that processes tell each other


@contextlib.contextmanager
def refused_together() -> Iterator[None]:
    """Let all processes end when one of them raises InputError in the block: none waits for it.

    Every process must enter it. Raises InputError: its own, or that of the first to have one.
    """
    error = None
    try:
        yield
    except InputError as caught:
        error = caught
    said = _told([str(error).encode()[:_LONGEST].ljust(_LONGEST) if error else b" " * _LONGEST])
    if error is not None:
        raise error
    for number, (text,) in enumerate(said):
        if text.strip():
            raise InputError(f"process {number}: {text.decode(errors='replace').strip()}")


def check_same(facts: Mapping[str, str]) -> None:
    """Raise InputError, on all processes, that names what of `facts` differs between them.

    The keys are the same everywhere.
    """
    said = _told([hashlib.sha256(value.encode()).digest() for value in facts.values()])
    different = [
        f"{name} is {value} on this process"
        for name, value, *digests in zip(facts, facts.values(), *said, strict=True)
        if len(set(digests)) > 1
    ]
    if different:
        raise InputError(
            f"the processes of this run were started differently ({'; '.join(different)}): start "
            "all of them with the same flags and the same files"
        )


def _told(words: Sequence[bytes]) -> list[list[bytes]]:
    """Return the words, all of one length, of each process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [list(words)]
    own = np.stack([np.frombuffer(word, np.uint8) for word in words])
    return [[row.tobytes() for row in rows] for rows in multihost_utils.process_allgather(own)]
