"""What the makers state of chips, named groups of them, and the least time that work takes there.

Sources: NVIDIA's data sheets (dense bf16, without sparsity; NVLink and PCIe in one direction, half
of the stated sum; networks of the DGX systems) and Google's pages of each TPU version (ICI of a
chip in one direction, half of the stated bidirectional figure).
"""

import dataclasses
import math
import re
from typing import NamedTuple

from gidd_jax.errors import InputError

MAX_DEVICES = 1024


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    kinds: parts of jax's device_kind, any of them. peak_flops: dense bf16 FLOP/s. memory in bytes
    (a GB is 1e9) and memory_bandwidth in bytes/s, read and written together. link: bytes/s that a
    device sends to others of its node (GPUs) or slice (TPUs); node: how many those are; network:
    bytes/s that a device sends to other nodes, 0 where the maker has no such system. torus: axes
    of a TPU slice, 0 for GPUs; cores: how many a chip counts for in a slice's name.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    node: int
    network: float = 0.0
    torus: int = 0
    cores: int = 1

    def bandwidth(self, stride: int, size: int) -> float:
        """Bytes/s that a device sends in a ring over `size` devices, `stride` places apart.

        Between nodes a ring for each member that a node has shares the work.
        """
        if stride * size <= self.node:
            return self.link
        return min(self.link, self.network * max(1, self.node // stride))


# The first with a part of the device's kind counts.
CHIPS = (
    Chip("B200", ("B200",), 2250e12, 180e9, 7.7e12, 900e9, 8, 50e9),
    Chip("H200", ("H200",), 989e12, 141e9, 4.8e12, 450e9, 8, 50e9),
    Chip("H100-PCIe", ("H100 PCIe",), 756e12, 80e9, 2.0e12, 64e9, 8),
    Chip("H100-NVL", ("H100 NVL",), 835e12, 94e9, 3.9e12, 64e9, 8),
    Chip("H100", ("H100",), 989e12, 80e9, 3.35e12, 450e9, 8, 50e9),
    Chip("A100-40GB", ("A100-SXM4-40GB",), 312e12, 40e9, 1.555e12, 300e9, 8, 25e9),
    Chip("A100", ("A100",), 312e12, 80e9, 2.039e12, 300e9, 8, 25e9),
    Chip("L40S", ("L40S",), 362e12, 48e9, 0.864e12, 32e9, 8),
    Chip("v6e", ("TPU v6",), 918e12, 32e9, 1.6e12, 400e9, 256, torus=2),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 0.819e12, 200e9, 256, torus=2),
    Chip("v5p", ("TPU v5",), 459e12, 95e9, 2.765e12, 600e9, MAX_DEVICES, torus=3, cores=2),
    Chip("v4", ("TPU v4",), 275e12, 32e9, 1.2e12, 300e9, MAX_DEVICES, torus=3, cores=2),
    # A device is one of the chip's two cores.
    Chip("v3", ("TPU v3",), 61.5e12, 16e9, 0.45e12, 164e9, MAX_DEVICES, torus=2),
)
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


def find_chip(device_kind: str) -> Chip | None:
    """Return the chip of a device by jax's name for it, None where unknown."""
    return next((chip for chip in CHIPS if any(k in device_kind for k in chip.kinds)), None)


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
