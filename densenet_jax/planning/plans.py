"""How compiled training steps use the devices they are for: tables, JSON."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from densenet_jax.analysis import tables
from densenet_jax.planning.chips import Chip
from densenet_jax.planning.compiled import Program


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices to compile for.

    Attributes:
      name: of a topology, or 'cpu'.
      devices: of this machine, or described by their compiler.
      memory: bytes a device.
      chip: its figures, where they are known.
    """

    name: str
    devices: Sequence[jax.Device]
    memory: int
    chip: Chip | None


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What compiling a step came to.

    Attributes:
      program: None where the compiler found that it does not fit.
      problem: what the compiler said then.
      seconds: that it took.
    """

    program: Program | None
    problem: str | None
    seconds: float

    def fits(self, target: Target) -> bool:
        """Whether the step fits a device's memory."""
        program = self.program
        return program is not None and program.total_bytes <= target.memory


def least_seconds(program: Program, chip: Chip) -> tuple[float, str]:
    """The time a chip's figures allow, and what sets it: 'FLOPs' or 'bytes'."""
    return max(
        (program.flops / chip.peak, "FLOPs"),
        (program.bytes_accessed / chip.bandwidth, "bytes"),
    )


def largest_that_fits(
    fits: Callable[[int], bool], *, start: int, unit: int, limit: int
) -> int:
    """The largest batch size that fits, found by doubling and bisection.

    Args:
      fits: whether a batch size does; none does beyond one that does not.
      start: where to begin, a multiple of unit.
      unit: only its multiples are tried.
      limit: nothing larger is tried, but for start.

    Returns:
      0 where not even unit fits.
    """
    largest = max(start, limit // unit * unit)
    fitting, failing, size = 0, None, start
    while failing is None and fitting < largest:
        if fits(size):
            fitting, size = size, min(2 * size, largest)
        else:
            failing = size
    while failing is not None and failing - fitting > unit:
        middle = (fitting + failing) // (2 * unit) * unit
        if fits(middle):
            fitting = middle
        else:
            failing = middle
    return fitting


def state_table(state_bytes: Mapping[str, int]) -> str:
    """What a device holds between steps: one line a part."""
    heading, cells = scaled(list(state_bytes.values()), "B")
    return tables.text(
        ("a device holds", heading),
        list(zip(state_bytes, cells)),
        left_columns=1,
    )


def policy_table(compiled: Mapping[str, Compilation], target: Target) -> str:
    """Memory, work and least time of a step: one line a remat policy."""
    programs = [t.program for t in compiled.values() if t.program is not None]
    columns = [
        scaled([p.temp_bytes for p in programs], "B", "temp "),
        scaled([p.total_bytes for p in programs], "B", "total "),
        (
            "of memory",
            [f"{p.total_bytes / target.memory:.1%}" for p in programs],
        ),
        scaled([p.flops for p in programs], "FLOP"),
        scaled([p.bytes_accessed for p in programs], "B", "moved "),
        ("FLOP/B", [f"{p.intensity:.1f}" for p in programs]),
    ]
    if target.chip is not None:
        columns.append(scaled([p.cycles for p in programs], "cycles"))
        least = [least_seconds(p, target.chip) for p in programs]
        heading, cells = scaled([seconds for seconds, _ in least], "s")
        by = [f"{cell} {what}" for cell, (_, what) in zip(cells, least)]
        columns.append((f"least {heading} by", by))
    cells = zip(*(cells for _, cells in columns))
    return tables.text(
        ("remat", *(heading for heading, _ in columns), "compile s"),
        [
            (
                policy,
                *(next(cells) if compilation.program else ["-"] * len(columns)),
                f"{compilation.seconds:,.0f}",
            )
            for policy, compilation in compiled.items()
        ],
        left_columns=1,
    )


def cycles_table(program: Program, title: str, num_lines: int) -> str:
    """The layers that the compiler estimates to take the most cycles."""
    parts = list(program.layer_cycles.items())
    rest = sum(cycles for _, cycles in parts[num_lines:])
    parts = [*parts[:num_lines], *([("the rest", rest)] if rest else [])]
    heading, cells = scaled([cycles for _, cycles in parts], "cycles")
    return tables.text(
        (title, heading, "share"),
        [
            (name, cell, f"{cycles / program.cycles:.1%}")
            for (name, cycles), cell in zip(parts, cells)
        ],
        left_columns=1,
    )


def largest_table(largest: Mapping[str, int], target: Target) -> str:
    """The largest batches that fit: one line a remat policy."""
    return tables.text(
        ("remat", "largest batch", "on a device"),
        [
            (policy, f"{size:,}", f"{size // len(target.devices):,}")
            for policy, size in largest.items()
        ],
        left_columns=1,
    )


def scaled(
    values: Sequence[float], unit: str, prefix: str = ""
) -> tuple[str, list[str]]:
    """A column's heading and cells, in the multiple of a unit that suits all.

    >>> scaled([1.5e6, 2e5], "B", "temp ")
    ('temp MB', ['1.50', '0.20'])
    """
    scales = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")]
    if unit == "s":
        scales = [(1, ""), (1e-3, "m"), (1e-6, "u")]
    largest = max(values, default=0)
    scale, letter = next((s for s in scales if largest >= s[0]), scales[-1])
    decimals = 2 if largest < 100 * scale else 1
    cells = [f"{value / scale:,.{decimals}f}" for value in values]
    return f"{prefix}{letter}{unit}", cells


def target_json(target: Target) -> dict[str, Any]:
    """What there is to say of the devices, in bytes, FLOP/s and bytes/s."""
    chip = target.chip
    return {
        "name": target.name,
        "devices": len(target.devices),
        "device_kind": target.devices[0].device_kind,
        "memory_bytes": target.memory,
        "peak_flops": chip and chip.peak,
        "bytes_per_second": chip and chip.bandwidth,
        "source": chip and chip.source,
    }


def compilation_json(
    compilation: Compilation, target: Target
) -> dict[str, Any]:
    """The attributes of `Program`, and what else is known."""
    found = {
        "fits": compilation.fits(target),
        "problem": compilation.problem,
        "compile_seconds": compilation.seconds,
    }
    program = compilation.program
    if program is not None:
        found |= dataclasses.asdict(program)
        found["total_bytes"] = program.total_bytes
        found["intensity"] = program.intensity
        if target.chip is not None:
            least = least_seconds(program, target.chip)
            found["least_seconds"], found["least_seconds_by"] = least
    return found
