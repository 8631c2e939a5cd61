"""How many bytes a compiled program sums over or moves between devices, read out of its text."""

import functools
import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(
    r" = (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def total_bytes(text: str) -> int:
    """Return the bytes of the results of all collectives, [] counted as often as loops run them.

    text: a compiled HLO module, as `compiled.as_text()` of JAX gives it.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = computations.setdefault(start[1], [])
            entry = start[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)

    @functools.cache
    def total(name: str) -> int:
        count = 0
        for line in computations[name]:
            moved = _COLLECTIVE.search(line)
            count += array_bytes(moved[1]) if moved else 0
            trips = _TRIPS.search(line) if " while(" in line else None
            inside = [n for n in re.findall(r"%([\w.\-]+)", line) if n in computations]
            count += sum(map(total, inside)) * (int(trips[1]) if trips else 1)
        return count

    return total(entry)


def array_bytes(shape: str) -> int:
    """Return the bytes of an HLO shape, such as 'f32[2,3]{1,0}' or a tuple of them."""
    count = 0
    for kind, bits, sizes in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        size = 1 if kind == "pred" else int(bits) // 8
        count += size * math.prod(int(n) for n in sizes.split(",") if n)
    return count
