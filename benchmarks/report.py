"""What the benchmarks print."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from densenet_jax.data.pipeline import usable_cores

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "torch", "torchvision")


def environment() -> dict[str, Any]:
    """Versions of what is installed, the platform and the processor."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = {"cpu": _cpu(), "cores": usable_cores()}
    device = jax.devices()[0]
    return {
        "versions": versions,
        "platform": device.platform,
        "device": device.device_kind,
        "machine": machine,
    }


def describe(environment: Mapping[str, Any]) -> str:
    """`environment()` in one line."""
    versions = ", ".join(
        f"{name} {version}" for name, version in environment["versions"].items()
    )
    device, machine = environment["device"], environment["machine"]
    return f"{device}, {machine['cpu']}, {machine['cores']} cores; {versions}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table to read and to paste; all but the first column are numbers."""
    columns = list(zip(header, *rows))
    widths = [max(3, *map(len, column)) for column in columns]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells):
        first, *numbers = zip(cells, widths)
        aligned = [first[0].ljust(first[1])]
        aligned += [cell.rjust(width) for cell, width in numbers]
        return f"| {' | '.join(aligned)} |"

    return "\n".join(map(line, [header, rule, *rows]))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
