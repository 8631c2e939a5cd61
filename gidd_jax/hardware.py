"""What the makers state of chips.

Sources: NVIDIA's data sheets (dense bf16, without sparsity; NVLink and PCIe in one direction, half
of the stated sum; networks of the DGX systems) and Google's pages of each TPU version (ICI of a
chip in one direction, half of the stated bidirectional figure).
"""

import dataclasses

MAX_DEVICES = 1024


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    kinds: parts of jax's device_kind, any of them. peak_flops: dense bf16 FLOP/s. memory in bytes
    (a GB is 1e9) and memory_bandwidth in bytes/s, read and written together. link: bytes/s that a
    device sends to others of its node (GPUs) or slice (TPUs); node: how many those are; network:
    bytes/s that a device sends to other nodes, 0 where the maker has no such system. torus: axes
    of a TPU slice, 0 for GPUs; cores: how many a chip counts for in a slice's name. ghz: the clock
    at which a TPU's matrix units reach the peak; unit: their rows and columns (2 * unit^2 FLOP a
    cycle).
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
    ghz: float = 0.0
    unit: int = 128

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
    Chip("v6e", ("TPU v6",), 918e12, 32e9, 1.6e12, 400e9, 256, torus=2, ghz=1.75, unit=256),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 0.819e12, 200e9, 256, torus=2, ghz=1.5),
    Chip("v5p", ("TPU v5",), 459e12, 95e9, 2.765e12, 6e11, MAX_DEVICES, torus=3, cores=2, ghz=1.75),
    Chip("v4", ("TPU v4",), 275e12, 32e9, 1.2e12, 3e11, MAX_DEVICES, torus=3, cores=2, ghz=1.05),
    # A device is one of the chip's two cores.
    Chip("v3", ("TPU v3",), 61.5e12, 16e9, 0.45e12, 164e9, MAX_DEVICES, torus=2),
)


def device_kind() -> str:
    """Return jax's name for the devices of this process, such as "TPU v5 lite"."""
    import jax

    return jax.local_devices()[0].device_kind


def find_chip(device_kind: str) -> Chip | None:
    """Return the chip of a device by jax's name for it, None where unknown."""
    return next((chip for chip in CHIPS if any(k in device_kind for k in chip.kinds)), None)


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by jax's name for it, None where unknown."""
    chip = find_chip(device_kind)
    return chip.peak_flops if chip else None
