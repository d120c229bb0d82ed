"""Damages files at random, for readers that must not be fooled by any."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np

from densenet_jax.weights.containers import open_tensors
from densenet_jax.weights.tensor_file import TensorFile

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


def try_mutations(
    path: Path, content: bytes, count: int, *, checksums: bool = False
) -> dict[str, int]:
    """Opens and reads damaged files; what is not a ValueError is raised.

    Args:
      path: to write to.
      content: of a whole file.
      count: how many damaged ones are tried.
      checksums: whether the format has them: what is read must be whole.

    Returns:
      How many were read, and how many refused.

    Raises:
      AssertionError: an error of several lines, or memory of more than thrice
        the file and 8 MB.
    """
    path.write_bytes(content)
    whole = _values(open_tensors(path)) if checksums else None
    rng = np.random.default_rng(0)
    counts = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for _ in range(count):
            path.write_bytes(mutated(content, rng))
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            counts[_try(path, whole)] += 1
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < 3 * len(content) + 8e6
    finally:
        tracemalloc.stop()
    return counts


def _try(path: Path, whole: dict[str, np.ndarray] | None) -> str:
    try:
        values = _values(open_tensors(path))
    except ValueError as error:
        message = str(error)
        assert message
        assert len(message) < 2000
        assert message.isprintable(), message
        return "refused"
    for name, expected in (whole or {}).items():
        np.testing.assert_array_equal(values[name], expected)
    return "read"


def _values(file: TensorFile) -> dict[str, np.ndarray]:
    values = {name: tensor.read() for name, tensor in file.tensors.items()}
    for name, tensor in file.tensors.items():
        assert values[name].shape == tensor.shape
        assert values[name].dtype == tensor.dtype
    return values
