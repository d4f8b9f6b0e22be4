"""What accelerators can do, and how they are wired. Vendors' figures; each line names its source.

Rates are per second and per device, one direction for links. `attainable` is not a vendor's figure: it is the share of
the peak that the matrix products of a large model reach, set so that published training speeds come out
(`tests/planning/test_plan.py` has them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mimo_jax.config import ConfigError

_GIB = 2**30
_MOST_DEVICES = 2**20


@dataclass(frozen=True)
class Chip:
    """An accelerator."""

    kind: str  # how JAX calls it: the beginning of `device_kind`
    peak_flops: float  # bfloat16 FLOP/s
    hbm_bytes: int  # memory that a program can use of one device
    hbm_rate: float  # bytes/s of its memory
    link_rate: float  # bytes/s of one link in one direction; for GPUs of all links to the switch
    network_rate: float  # bytes/s to other slices (TPU) or other hosts (GPU)
    attainable: float  # share of `peak_flops`
    torus: int = 0  # axes of its torus; 0 for GPUs
    wraps: int = 0  # length whose multiples close an axis of the torus to a ring
    devices: int = 1  # JAX devices of a chip. The figures above are those of one device.
    host: int = 8  # devices of one host


# TPU: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}; usable memory as the compiler states it. The ICI figures there
# are for both directions of all links of a chip (6 in a 3D torus, 4 in a 2D one).
# GPU: data sheets, without sparsity; usable memory as the driver reports it; 400 Gbit/s of network per GPU.
CHIPS: Mapping[str, Chip] = {
    "a100": Chip("NVIDIA A100", 312e12, int(79.1 * _GIB), 2.04e12, 300e9, 25e9, 0.45),
    "h100": Chip("NVIDIA H100", 989e12, int(79.1 * _GIB), 3.35e12, 450e9, 50e9, 0.45),
    "h200": Chip("NVIDIA H200", 989e12, int(139.8 * _GIB), 4.8e12, 450e9, 50e9, 0.45),
    "b200": Chip("NVIDIA B200", 2250e12, int(178.0 * _GIB), 8.0e12, 900e9, 50e9, 0.45),
    "v5e": Chip("TPU v5 lite", 197e12, int(15.75 * _GIB), 0.819e12, 50e9, 3.1e9, 0.80, 2, 16, host=4),
    "v5p": Chip("TPU v5", 459e12, int(95.74 * _GIB), 2.765e12, 100e9, 6.25e9, 0.80, 3, 4, host=4),
    "v6e": Chip("TPU v6 lite", 918e12, int(31.25 * _GIB), 1.638e12, 100e9, 12.5e9, 0.80, 2, 16, host=4),
    "tpu7x": Chip("TPU7x", 1153.5e12, int(94.75 * _GIB), 3.69e12, 50e9, 6.25e9, 0.80, 3, 4, devices=2),
}


@dataclass(frozen=True)
class Topology:
    """Devices that a job runs on."""

    name: str  # `v5p:8x8x4`, `h100:64`
    chip: Chip
    bounds: tuple[int, ...]  # chips along each axis of the torus of a slice; for GPUs (hosts, GPUs of a host)
    slices: int = 1  # slices that the data-centre network connects

    @property
    def chips(self) -> int:
        n = self.slices
        for bound in self.bounds:
            n *= bound
        return n

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def is_tpu(self) -> bool:
        return self.chip.torus > 0

    def torus_rate(self, places: Sequence[int]) -> float:
        """Bytes/s that a device sends in rings over so many places along each axis of its torus.

        An axis that is taken whole, and is closed, is a ring that runs both ways round.
        """
        pairs = zip(places, self.bounds, strict=False)  # of a torus of two axes, the third has length 1
        # Three axes are closed by switches between cubes, so all of them or none.
        cubes = self.chip.torus == 2 or all(bound % self.chip.wraps == 0 for bound in self.bounds)
        ways = (2 if cubes and n == bound and bound % self.chip.wraps == 0 else 1 for n, bound in pairs if n > 1)
        return self.chip.link_rate * max(1, sum(ways))


def parse_topology(name: str, slices: int = 1) -> Topology:
    """`KIND:AxBxC` (TPU) or `KIND:N` (GPU, N devices). Raises ConfigError: it is neither."""
    kind, _, shape = name.partition(":")
    numbers = shape.split("x")
    if kind not in CHIPS or not all(n.isascii() and n.isdecimal() and int(n) > 0 for n in numbers):
        kinds = ", ".join(CHIPS)
        raise ConfigError(f"--topology={name}: expected KIND:AxB[xC] (TPUs) or KIND:NUMBER (GPUs), KIND one of {kinds}")
    chip, bounds = CHIPS[kind], tuple(map(int, numbers))
    if not chip.torus:
        if len(bounds) != 1 or slices != 1:
            raise ConfigError(f"--topology={name}: expected one number of GPUs and one slice, got {shape}, {slices}")
        count = bounds[0]
        if count > chip.host and count % chip.host:
            raise ConfigError(f"--topology={name}: expected whole hosts of {chip.host} GPUs")
        bounds = (max(1, count // chip.host), min(count, chip.host))
    elif slices < 1 or len(bounds) != chip.torus:
        expected = f"a torus of {chip.torus} axes and at least one slice"
        raise ConfigError(f"--topology={name}, --slices={slices}: expected {expected}")
    topology = Topology(name, chip, bounds, slices)
    if topology.devices > _MOST_DEVICES:
        raise ConfigError(f"--topology={name}, --slices={slices}: expected at most {_MOST_DEVICES} devices")
    return topology


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so, if it is known."""
    matches = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(matches, key=lambda chip: len(chip.kind)) if matches else None
