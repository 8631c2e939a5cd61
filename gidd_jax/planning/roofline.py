"""Named groups of chips, and the least time that work takes there."""

import math
import re
from typing import NamedTuple

from gidd_jax.errors import InputError
from gidd_jax.hardware import CHIPS, MAX_DEVICES, Chip

_GPUS = {chip.name: chip for chip in CHIPS if not chip.torus}
_TPUS = {chip.name: chip for chip in CHIPS if chip.torus and chip.name != "v3"}


class Topology(NamedTuple):
    """A named group of devices; chip None: CPU devices, of which nothing is known.

    shape: chips along each axis of a TPU slice, such as 4x8; empty for others. here: the devices
    are those of this machine.
    """

    name: str
    chip: Chip | None
    devices: int
    shape: str = ""
    here: bool = False


def parse_topology(name: str) -> Topology:
    """Return the topology that a name such as 8xH200, v5e-256, v4-128 or cpu-8 stands for.

    The number in the name of a v4 or v5p slice counts cores, two to a chip, as in Google's names.
    Raises InputError that lists the legal forms.
    """
    found = re.fullmatch(r"([1-9]\d*)x(.+)|(.+)-([1-9]\d*)", name)
    if found:
        count, kind = int(found[1] or found[4]), found[2] or found[3]
        if found[1] and kind in _GPUS:
            chip = _GPUS[kind]
            many = chip.network and count % chip.node == 0 and count <= MAX_DEVICES
            if count <= chip.node or many:
                return Topology(name, chip, count)
        elif found[4] and kind in _TPUS and count % _TPUS[kind].cores == 0:
            chip = _TPUS[kind]
            chips = count // chip.cores
            shape = _slice_shape(chips, chip.torus)
            if shape and chips <= chip.node:
                return Topology(name, chip, chips, shape)
        elif found[4] and kind == "cpu" and count <= MAX_DEVICES:
            return Topology(name, None, count)
    raise InputError(
        f"--plan={name}: use Nx{'|'.join(_GPUS)} with N up to 8, or a multiple of 8 up to "
        f"{MAX_DEVICES} where 8 share NVLink (8xH200); v5e-N, v6e-N with N 1, 4, 8, 16 ... 256 "
        f"chips; v4-N, v5p-N with N 8, 16, 32 ... {2 * MAX_DEVICES} cores; cpu-N with N up to "
        f"{MAX_DEVICES}; or --plan alone for the devices of this machine"
    )


def _slice_shape(chips: int, axes: int) -> str:
    """Return the most even torus of a power of two of chips, such as 4x8; '' if there is none."""
    if axes == 2 and chips == 1:
        return "1x1"
    if chips < 4 or chips.bit_count() != 1:
        return ""
    sizes = [2, 2] + [1] * (axes - 2)
    while math.prod(sizes) < chips:
        sizes[max(i for i in range(axes) if sizes[i] == min(sizes))] *= 2
    return "x".join(map(str, sizes))


class Sent(NamedTuple):
    """Bytes that each device sends in collectives over `size` devices, `stride` places apart."""

    what: str
    stride: int
    size: int
    bytes: float


class Roofline(NamedTuple):
    """Least seconds of a step by what limits it; a perfect overlap makes their maximum the step."""

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        return max(self)

    @property
    def limit(self) -> str:
        """The name of what limits the step."""
        return self._fields[self.index(self.step)]


def roofline(chip: Chip, flops: float, bytes_moved: float, sent: list[Sent]) -> Roofline:
    """Return the least time of a step, from what one device computes, moves and sends.

    step = max(flops / peak_flops, bytes_moved / memory_bandwidth, sum(bytes / bandwidth)), with
    the last over the collectives. Latencies, and products that do not fill the chip, only add.
    """
    return Roofline(
        compute=flops / chip.peak_flops,
        memory=bytes_moved / chip.memory_bandwidth,
        interconnect=sum(s.bytes / chip.bandwidth(s.stride, s.size) for s in sent if s.bytes),
    )
