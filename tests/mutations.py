"""Damages files at random, for readers that must not be fooled by any."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from densenet_jax.weights.containers import open_tensors

_NUMBERS = (0, 1, 3, 4, 8, 127, 2**15, 2**20, 2**31 - 1, -1, -(2**31))


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to four things wrong."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        # Half of the places in the first part, where the structure is dense.
        end = len(data) if rng.integers(2) else min(len(data), 2000)
        at = int(rng.integers(max(1, end)))
        length = int(rng.integers(1, 9))
        match rng.integers(6):
            case 0:
                data[at : at + 1] = bytes([rng.integers(256)])
            case 1:
                data[at : at + 4] = struct.pack("<i", rng.choice(_NUMBERS))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = rng.bytes(length)
            case 4:
                source = int(rng.integers(len(data)))
                data[at : at + length] = data[source : source + length]
            case 5 if rng.integers(8) == 0:
                del data[at:]
            case _:
                data[at : at + 1] = bytes([data[at] ^ (1 << rng.integers(8))])
        if not data:
            return b"\x00"
    return bytes(data)


def try_mutations(path: Path, content: bytes, count: int) -> dict[str, int]:
    """Opens and reads damaged files; what is not a ValueError is raised.

    Returns:
      How many were read, and how many refused.

    Raises:
      AssertionError: an error of several lines, or memory of more than thrice
        the file and 8 MB.
    """
    rng = np.random.default_rng(0)
    counts = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for _ in range(count):
            path.write_bytes(mutated(content, rng))
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            counts[_try(lambda: open_tensors(path))] += 1
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < 3 * len(content) + 8e6
    finally:
        tracemalloc.stop()
    return counts


def _try(open_file: Callable) -> str:
    try:
        for tensor in open_file().tensors.values():
            values = tensor.read()
            assert values.shape == tensor.shape
            assert values.dtype == tensor.dtype
    except ValueError as error:
        message = str(error)
        assert message
        assert len(message) < 2000
        assert message.isprintable(), message
        return "refused"
    return "read"
