"""What is measured, what came out, and whether it is enough: plain values without heavy imports."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

OURS, EAGER, COMPILED = "ours", "eager", "compiled"
TWIN = (EAGER, COMPILED)  # the PyTorch twin, plain and under torch.compile
SCALES = ("cpu", "gpu", "small")  # sizes of the cases; small: for trying out, without targets
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work at one size.

    kind: what is done, a key of the suite; shape: its sizes and settings. tokens, flops (of the
    matrix products that any version needs) and bytes_moved (memory traffic that none can avoid;
    0: not counted) are those of one run. sweep: the size that varies along a series of cases.
    virtual_devices: into how many devices the CPU of the JAX side is divided. rounds: how often it
    is timed.
    """

    kind: str
    name: str
    shape: Mapping[str, Any]
    tokens: int
    flops: float = 0.0
    bytes_moved: float = 0.0
    variants: tuple[str, ...] = (OURS,)
    sweep: str = ""
    virtual_devices: int = 1
    rounds: int = ROUNDS


@dataclasses.dataclass(frozen=True)
class Subject:
    """Something to time in a worker: `run` returns when its work is done.

    facts: numbers found while it was made (compile_seconds, xla_temp_bytes, ...). warm_up: what
    is run before the first measurement, where a part of the work is enough. memory: begins to watch
    the memory of a run, where that is not the memory of this process.
    """

    run: Callable[[], Any]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    warm_up: Callable[[], Any] | None = None
    memory: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: FLOP/s of a large product, bytes/s (read + written) of a copy."""

    matmul: float
    copy: float


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The figures of one variant of a case; times in seconds, memory in bytes.

    peak_bytes: the most memory during a run beyond what was held before it (of the process, or of
    the GPU); None where the system does not say. matmul_fraction: FLOP/s over the measured ceiling
    (the MFU); copy_fraction: bytes/s over that of a copy; roofline_fraction: the time that the
    larger of both limits allows over the time taken.
    """

    case: str
    variant: str
    kind: str
    shape: Mapping[str, Any]
    sweep: str
    seconds: float
    all_seconds: list[float]
    tokens: int
    tokens_per_second: float
    peak_bytes: int | None
    flops: float
    bytes_moved: float
    matmul_fraction: float
    copy_fraction: float
    roofline_fraction: float
    facts: Mapping[str, Any]


def measurement(
    case: Case,
    variant: str,
    all_seconds: list[float],
    peak_bytes: int | None,
    facts: Mapping[str, Any],
    ceilings: Ceilings,
) -> Measurement:
    """Return the figures that follow from the times of the runs of a case."""
    seconds = median(all_seconds)
    matmul, copy = case.flops / ceilings.matmul, case.bytes_moved / ceilings.copy
    return Measurement(
        case=case.name,
        variant=variant,
        kind=case.kind,
        shape=dict(case.shape),
        sweep=case.sweep,
        seconds=seconds,
        all_seconds=all_seconds,
        tokens=case.tokens,
        tokens_per_second=case.tokens / seconds,
        peak_bytes=peak_bytes,
        flops=case.flops,
        bytes_moved=case.bytes_moved,
        matmul_fraction=matmul / seconds,
        copy_fraction=copy / seconds,
        roofline_fraction=max(matmul, copy) / seconds,
        facts=dict(facts),
    )


def median(values: list[float]) -> float:
    """Return the median; the mean of the middle two of an even number of values."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return 0.5 * (ordered[middle] + ordered[~middle])


class Found:
    """The measurements of a suite by case and variant; what was not measured is None."""

    def __init__(self, measurements: list[Measurement]):
        self._by_name = {(m.case, m.variant): m for m in measurements}

    def get(self, case: str, variant: str = OURS) -> Measurement | None:
        return self._by_name.get((case, variant))

    def fact(self, case: str, name: str) -> Any:
        found = self.get(case)
        return None if found is None else found.facts.get(name)

    def speed_up(self, case: str, over: str) -> float | None:
        """How many times faster ours is than a variant of the twin."""
        ours, other = self.get(case), self.get(case, over)
        return None if ours is None or other is None else other.seconds / ours.seconds

    def memory_share(self, case: str, over: str) -> float | None:
        """The peak memory of ours over that of a variant of the twin."""
        ours, other = self.get(case), self.get(case, over)
        if ours is None or other is None or ours.peak_bytes is None or not other.peak_bytes:
            return None
        return ours.peak_bytes / other.peak_bytes


@dataclasses.dataclass(frozen=True)
class Check:
    """A target beside what was measured: at least, or at most, `bound`.

    measured None: not measured; bound None: told, not judged. `met` is None for both.
    """

    name: str
    measured: float | None
    bound: float | None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None or self.bound is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def ratio_checks(
    found: Found,
    case: str,
    speed_ups: Mapping[str, float],
    memory_shares: Mapping[str, float] | None = None,
) -> list[Check]:
    """Return the checks of a case: least speed-ups over the twin, largest shares of its memory."""
    checks = [
        Check(f"{case}: speed-up over {over}", found.speed_up(case, over), bound)
        for over, bound in speed_ups.items()
    ]
    checks += [
        Check(f"{case}: memory / {over}", found.memory_share(case, over), bound, at_most=True)
        for over, bound in (memory_shares or {}).items()
    ]
    return checks
