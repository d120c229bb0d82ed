"""What TPU chips can do, and the slices of them that there are."""

import dataclasses
import math

from densenet_jax.choices import check_choice

_SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# 1x1x1 is not for rent: it is the plan for one chip.
_SLICES_3D = (
    *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    *("4x4x4", "4x4x8", "4x8x8", "8x8x8"),
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPU. Figures are of one chip.

    Attributes:
      peak: bfloat16 FLOP/s.
      bandwidth: of the memory (HBM), bytes/s.
      memory: HBM, bytes. A part is the system's: programs get what the
        compiler says, on v5e 15.75 of 16 GiB.
      slices: chips along each side.
      source: of these figures.
      mode: the compiler's name for how a chip is used; 'megacore' makes one
        device of two cores.
    """

    peak: float
    bandwidth: float
    memory: int
    slices: tuple[str, ...]
    source: str
    mode: str = "default"


_SOURCE = "https://docs.cloud.google.com/tpu/docs/"

CHIPS = {
    "v4": Chip(
        275e12, 1200e9, 32 << 30, _SLICES_3D, f"{_SOURCE}v4", "megacore"
    ),
    "v5e": Chip(197e12, 819e9, 16 << 30, _SLICES_2D, f"{_SOURCE}v5e"),
    "v5p": Chip(459e12, 2765e9, 95 << 30, _SLICES_3D, f"{_SOURCE}v5p"),
    "v6e": Chip(918e12, 1638e9, 32 << 30, _SLICES_2D, f"{_SOURCE}v6e"),
}


def topologies(generation: str) -> tuple[str, ...]:
    """The names of a generation's slices, as 'v5e:2x4'."""
    return tuple(f"{generation}:{s}" for s in CHIPS[generation].slices)


def find_chip(topology: str) -> Chip:
    """The chip of a topology, as 'v5e:2x4'.

    Raises:
      ValueError: an unknown topology; the message names those there are.
    """
    generation = topology.partition(":")[0]
    check_choice("TPU", generation, CHIPS)
    check_choice("topology", topology, topologies(generation))
    return CHIPS[generation]


def num_chips(topology: str) -> int:
    """The number of chips of a topology, as 8 of 'v5e:2x4'."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))
