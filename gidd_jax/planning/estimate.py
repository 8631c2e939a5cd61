"""The time of a compiled program by its compiler's own estimate, operation by operation.

The TPU's compiler writes the cycles that it expects of each operation into the program's text. It
says nothing of Pallas kernels: their products and arrays are counted in the program as JAX sees it.
Traffic between devices is in neither; `plan.py` sets it beside the estimate.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jax.interpreters.partial_eval import dce_jaxpr

from gidd_jax.hardware import Chip

KERNEL_SHARE = 0.5  # of a chip's peak, or bandwidth, at which kernels are assumed to run
NOWHERE = "no source line"
# Not where an operation was asked for: what this package's own frames call on their way.
_LIBRARIES = ("site-packages", "dist-packages", "<frozen")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) .*\{$", re.MULTILINE)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONSTANT = re.compile(r"%(\S+) = [su]32\[\]\S* constant\((\d+)\)")
_COMPARED = re.compile(r"ROOT .* compare\(%([^\s,]+), %([^\s,)]+)\), direction=LT")
_TUPLE = re.compile(r"ROOT .* tuple\((.*?)\)(?:, |$)", re.MULTILINE)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_FUSED = re.compile(r" fusion\(.*calls=%([^\s,]+)")
_WHILE = re.compile(r" while\(.*condition=%([^\s,]+), body=%([^\s,]+)")
_CALL = re.compile(r" call\(.*to_apply=%([^\s,]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([^\s,]+)")


class Kernel(NamedTuple):
    """A Pallas kernel: how often it runs; FLOPs of its products, bytes in and out of one run."""

    name: str
    calls: float
    flops: float
    bytes: float

    def seconds(self, chip: Chip) -> float:
        """Return the assumed time of all runs: at KERNEL_SHARE of what limits one."""
        limits = self.flops / chip.peak_flops, self.bytes / chip.memory_bandwidth
        return self.calls * max(limits) / KERNEL_SHARE


class Operation(NamedTuple):
    """What the operations that one source line asked for cost together; what: the costliest."""

    source: str
    what: str
    cycles: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A program's cycles on one device, by source line, the costliest first.

    unknown: loops whose number of rounds the program does not say, counted once. kernels: those
    of Pallas, of which the compiler has no estimate.
    """

    cycles: float
    operations: list[Operation]
    unknown: int
    kernels: list[Kernel]

    def seconds(self, chip: Chip) -> float:
        """Return the estimated time: cycles at the chip's clock, and the kernels'."""
        return self.cycles / (1e9 * chip.ghz) + self.kernel_seconds(chip)

    def kernel_seconds(self, chip: Chip) -> float:
        return sum(kernel.seconds(chip) for kernel in self.kernels)


def read_estimate(text: str, kernels: list[Kernel]) -> Estimate | None:
    """Return the estimate in the text of a compiled program; None where there is none in it."""
    if not _CYCLES.search(text):
        return None
    program = _Program(text)
    by_source: dict[str, dict[str, float]] = collections.defaultdict(
        lambda: collections.defaultdict(float)
    )
    for line, cycles in program.costs(program.entry, 1.0):
        name = found[1] if (found := _OP_NAME.search(line)) else ""
        by_source[program.source(line)][name.rsplit("/", 1)[-1]] += cycles
    operations = [
        Operation(source, max(costs, key=lambda name: costs[name]), sum(costs.values()))
        for source, costs in by_source.items()
    ]
    operations.sort(key=lambda operation: -operation.cycles)
    total = sum(operation.cycles for operation in operations)
    return Estimate(total, operations, len(program.unknown), kernels)


class _Program:
    """The computations of a program's text, and the tables that say where lines come from."""

    def __init__(self, text: str) -> None:
        starts = list(_COMPUTATION.finditer(text))
        # Up to the next one, for a kernel's own text may hold a brace at the beginning of a line.
        ends = [*(m.start() for m in starts[1:]), len(text)]
        self.lines = {
            m[1]: text[m.end() : end].splitlines() for m, end in zip(starts, ends, strict=True)
        }
        self.entry = next(m[1] for m in starts if m[0].startswith("ENTRY"))
        self.unknown: set[str] = set()
        self._files = dict(re.findall(r'^(\d+) "(.*)"$', _table(text, "FileNames"), re.MULTILINE))
        self._locations = _rows(_table(text, "FileLocations"), "file_name_id", "line")
        self._frames = _rows(_table(text, "StackFrames"), "file_location_id", "parent_frame_id")

    def costs(self, name: str, times: float) -> Iterator[tuple[str, float]]:
        """Go through the lines with an estimate, each with its cycles in all of its rounds."""
        for line in self.lines[name]:
            if found := _CYCLES.search(line):
                yield line, times * int(found[1])
            elif found := _WHILE.search(line):
                yield from self.costs(found[2], times * self._rounds(*found.groups()))
            elif found := _CALL.search(line):
                yield from self.costs(found[1], times)
            elif " conditional(" in line:
                names = "".join(f"{many},%{one}," for many, one in _BRANCHES.findall(line))
                branches = [list(self.costs(n, times)) for n in re.findall(r"%([^\s,]+)", names)]
                yield from max(branches, key=lambda costs: sum(cycles for _, cycles in costs))

    def _rounds(self, condition: str, body: str) -> int:
        """Return how often a loop's counter goes up from 0 until it reaches a known integer.

        1 where limit or step are not to be found.
        """
        head, rounds = ("\n".join(self.lines[name]) for name in (condition, body))
        limits, steps = dict(_CONSTANT.findall(head)), dict(_CONSTANT.findall(rounds))
        compared, results = _COMPARED.search(head), _TUPLE.search(rounds)
        if compared and results and compared[2] in limits:
            counter = re.search(rf"%{re.escape(compared[1])} = .*index=(\d+)", head)
            names = re.findall(r"%([^\s,]+)", results[1])
            changed = counter and re.escape(names[int(counter[1])])
            added = re.search(rf"%{changed} = \S+ add\(%[^\s,]+, %([^\s,)]+)\)", rounds)
            if added and added[1] in steps:
                return math.ceil(int(limits[compared[2]]) / int(steps[added[1]]))
        self.unknown.add(condition)
        return 1

    def source(self, line: str) -> str:
        """Return FILE:LINE of the innermost frame that is no library's, or NOWHERE.

        An operation that the compiler fused without a name for the whole has its result's.
        """
        if not (found := _FRAME.search(line)) and (fused := _FUSED.search(line)):
            inner = [found for line in self.lines[fused[1]] if (found := _FRAME.search(line))]
            found = inner[-1] if inner else None
        frame = found[1] if found else ""
        while frame in self._frames:
            location, parent = self._frames[frame]
            file, number = self._locations[location]
            path = self._files[file]
            if not any(part in path for part in _LIBRARIES):
                return f"{path.rpartition('gidd_jax/')[2]}:{number}"
            frame = str(int(parent) - 1)  # written with one added: 1 stands for no parent
        return NOWHERE


def _table(text: str, name: str) -> str:
    found = re.search(rf"^{name}\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def _rows(table: str, *fields: str) -> dict[str, tuple[str, ...]]:
    pattern = r"^(\d+) \{.*?" + ".*?".join(rf"\b{field}=(\d+)" for field in fields)
    return {row[0]: row[1:] for row in re.findall(pattern, table, re.MULTILINE)}


def find_kernels(jaxpr: Any, unit: int) -> list[Kernel]:
    """Return the Pallas kernels of a program as JAX sees it, with their work on one device.

    jaxpr: a closed one. The sizes of a product count as multiples of the `unit` rows and columns
    of a matrix unit: smaller ones leave the rest of it idle. A branch counts as its costliest, a
    loop without a known number of rounds once.
    """
    # What a layer computes again is written down whole, and the compiler leaves out what of it
    # nothing reads: so do we.
    needed, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    calls: collections.Counter[Kernel] = collections.Counter()
    for kernel in _kernels(needed, unit, 1):
        calls[kernel._replace(calls=1)] += int(kernel.calls)
    return [kernel._replace(calls=count) for kernel, count in calls.items()]


def _kernels(program: Any, unit: int, times: int) -> Iterator[Kernel]:
    for eqn in program.eqns:
        if eqn.primitive.name == "pallas_call":
            rounds = math.prod(eqn.params["grid_mapping"].grid)
            flops = rounds * sum(_flops(inner, unit) for inner in _programs(eqn.params.values()))
            arrays = [v.aval for v in (*eqn.invars, *eqn.outvars)]
            size = float(sum(a.size * a.dtype.itemsize for a in arrays))
            yield Kernel(str(eqn.params["name"]), times, flops, size)
            continue
        parts = [
            list(_kernels(inner, unit, times * _length(eqn)))
            for inner in _programs(eqn.params.values())
        ]
        if eqn.primitive.name == "cond":
            parts = [max(parts, key=lambda kernels: sum(k.flops + k.bytes for k in kernels))]
        for kernels in parts:
            yield from kernels


def _flops(program: Any, unit: int) -> float:
    """Return the FLOPs of the products in one round of a kernel."""
    total = 0.0
    for eqn in program.eqns:
        parts = [_flops(inner, unit) for inner in _programs(eqn.params.values())]
        inner = max(parts) if eqn.primitive.name == "cond" else sum(parts)
        total += _length(eqn) * inner
        if eqn.primitive.name == "dot_general":
            total += _flops_of_whole_units(eqn, unit)
    return total


def _length(eqn: Any) -> int:
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _programs(values: Iterable[Any]) -> Iterator[Any]:
    """Go through the programs among an operation's parameters, closed or open."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _programs(value)
        elif hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
            yield inner


def _flops_of_whole_units(eqn: Any, unit: int) -> float:
    left, right = (v.aval.shape for v in eqn.invars)
    (contracted, right_contracted), (batch, right_batch) = eqn.params["dimension_numbers"]
    free = [i for i in range(len(left)) if i not in (*contracted, *batch)]
    right_free = [i for i in range(len(right)) if i not in (*right_contracted, *right_batch)]
    sizes = [(left, contracted), (left, free), (right, right_free)]
    whole = [unit * -(-math.prod(shape[i] for i in axes) // unit) for shape, axes in sizes]
    return 2.0 * math.prod(whole) * math.prod(left[i] for i in batch)
