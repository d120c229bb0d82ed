"""What loading a file of weights costs.

    python -m benchmarks.load densenet201.pth

Prints the seconds from the call of load_pretrained until the weights are on
the device, and the peak of resident memory above that of the process before,
in multiples of the file's size. Memory-mapped pages of the file count. Linux.
"""

import argparse
import time
from pathlib import Path

import jax

from densenet_jax import load_pretrained


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file

    jax.block_until_ready(jax.device_put(1.0))  # Starts the backend.
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    start = time.perf_counter()
    _, variables = load_pretrained(path)
    jax.block_until_ready(variables)
    seconds = time.perf_counter() - start
    ratio = (_memory("VmHWM") - before) / path.stat().st_size
    print(f"{'file':<32}{'seconds':>10}{'memory / file':>16}")
    print(f"{path.name:<32}{seconds:>10.2f}{ratio:>16.2f}")


def _memory(name):
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}.")


if __name__ == "__main__":
    main()
