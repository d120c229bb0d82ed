"""Files of Lua Torch (.t7), read without Lua and without running them.

Such a file is one object in Torch7's binary serialisation: a tag and what it
announces, recursively. Tables and tensors are read; classes become their name
and their fields, functions become nothing: their bytecode is skipped.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_NIL, _NUMBER, _STRING, _TABLE, _TORCH, _BOOLEAN, _FUNCTION = range(7)
# Functions with their upvalues, today's and an earlier way.
_CLOSURES = (8, 7)

_TYPES = {
    "Double": "<f8",
    "Float": "<f4",
    "Half": "<f2",
    "Long": "<i8",
    "Int": "<i4",
    "Short": "<i2",
    "Char": "<i1",
    "Byte": "<u1",
    "Cuda": "<f4",
    "CudaDouble": "<f8",
    "CudaHalf": "<f2",
    "CudaLong": "<i8",
    "CudaInt": "<i4",
    "CudaShort": "<i2",
    "CudaChar": "<i1",
    "CudaByte": "<u1",
}
_TENSORS = {f"torch.{k}Tensor": np.dtype(v) for k, v in _TYPES.items()}
_STORAGES = {f"torch.{k}Storage": np.dtype(v) for k, v in _TYPES.items()}

# DenseNets nest some twenty deep and hold some ten thousand values.
_DEEPEST = 100
_MOST_VALUES = 1_000_000
_MOST_AXES = 8


class Module(NamedTuple):
    """An object of a Lua class: never more than its fields."""

    name: str
    fields: dict[Any, Any]


class _Storage(NamedTuple):
    values: np.ndarray  # [count]


def is_torch7(start: bytes) -> bool:
    """Whether a file that begins so is one of Torch7's, in binary.

    Its first object is a table or of a class, and has the number 1.
    """
    return start[:8] in (
        struct.pack("<ii", _TABLE, 1),
        struct.pack("<ii", _TORCH, 1),
    )


def load(path: str | Path) -> object:
    """Reads the object of a file: tables as dicts, tensors, `Module`s.

    Tensors are read-only numpy views of the memory-mapped file.

    Raises:
      ValueError: the file is truncated or contradicts itself.
    """
    return _Reader(np.memmap(path, mode="r", dtype=np.uint8)).value()


class _Reader:
    """Reads values one after another, every length checked against the file."""

    def __init__(self, content):
        self._content = content
        self._bytes = memoryview(content)
        self._at = 0
        self._depth = 0
        self._values = 0
        self._objects = {}

    def value(self) -> object:
        self._depth += 1
        self._values += 1
        if self._depth > _DEEPEST or self._values > _MOST_VALUES:
            raise _damaged(
                f"more than {_DEEPEST} levels or {_MOST_VALUES:,} values"
            )
        tag = self._int()
        if tag == _NIL:
            value = None
        elif tag == _NUMBER:
            value = self._unpack("<d")
            value = int(value) if value.is_integer() else value
        elif tag == _STRING:
            value = self._string()
        elif tag == _BOOLEAN:
            value = self._int() == 1
        elif tag == _FUNCTION:
            value = self._function()
        elif tag in (_TABLE, _TORCH, *_CLOSURES):
            value = self._object(tag)
        else:
            raise _damaged(f"a value of the unknown kind {tag}")
        self._depth -= 1
        return value

    def _object(self, tag):
        index = self._int()
        if index in self._objects:
            return self._objects[index]
        if tag == _TABLE:
            # Entered before it is read, because it may hold itself.
            self._objects[index] = {}
            self._fill(self._objects[index])
        elif tag == _TORCH:
            self._objects[index] = None
            self._torch_object(index)
        else:
            self._objects[index] = None
            self._function()
        return self._objects[index]

    def _fill(self, table):
        size = self._int()
        self._check(size, 2 * 4)  # The least that a key and a value take.
        for _ in range(size):
            key, value = self.value(), self.value()
            if isinstance(key, bool) or not isinstance(key, str | int | float):
                continue  # No field of a module.
            if key in table:
                raise _damaged(f"a table with two fields {key!r}")
            table[key] = value

    def _function(self):
        self._take(self._int(), 1)
        self.value()  # The upvalues.

    def _torch_object(self, index):
        name = self._string()
        if name.startswith("V "):
            name = self._string()
        if name in _STORAGES:
            dtype = _STORAGES[name]
            count = self._unpack("<q")
            start = self._take(count, dtype.itemsize)
            values = np.frombuffer(self._content, dtype, count, start)
            self._objects[index] = _Storage(values)
        elif name in _TENSORS:
            self._objects[index] = self._tensor(_TENSORS[name])
        else:
            fields = {}
            self._objects[index] = Module(name, fields)
            found = None if name.startswith("tds.") else self.value()
            if not isinstance(found, dict):
                raise ValueError(
                    f"The class {name[:60]!r} is stored in a way of its own, "
                    "which is not read here. Save the net alone: "
                    "torch.save(path, net)."
                )
            fields.update(found)

    def _tensor(self, dtype):
        axes = self._int()
        if not 0 <= axes <= _MOST_AXES:
            raise _damaged(f"a tensor of {axes} axes")
        shape = [self._unpack("<q") for _ in range(axes)]
        strides = [self._unpack("<q") for _ in range(axes)]
        offset = self._unpack("<q") - 1
        storage = self.value()
        if storage is None or not axes:
            return np.empty(0, dtype)
        if not isinstance(storage, _Storage) or storage.values.dtype != dtype:
            raise _damaged("a tensor with the storage of another type")
        values = storage.values
        if any(n < 0 for n in (offset, *shape, *strides)):
            raise _damaged("a tensor with a negative size, stride or offset")
        count = math.prod(shape)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
        # More values than stored (a stride of 0) could fill the memory.
        if count > values.size or (count and last >= values.size):
            raise _damaged(
                f"a tensor of shape {shape} in a storage of {values.size} "
                "values"
            )
        if not count:
            return np.empty(0, dtype)
        # The stride of an axis of length 1 may be anything.
        steps = [s * dtype.itemsize * (n > 1) for n, s in zip(shape, strides)]
        return np.lib.stride_tricks.as_strided(
            values[offset:], shape, steps, writeable=False
        )

    def _string(self):
        length = self._int()
        start = self._take(length, 1)
        return bytes(self._bytes[start : start + length]).decode("latin-1")

    def _int(self):
        return self._unpack("<i")

    def _unpack(self, layout):
        start = self._take(1, struct.calcsize(layout))
        return struct.unpack_from(layout, self._bytes, start)[0]

    def _take(self, count, size):
        """Where the next `count` items of `size` bytes begin."""
        self._check(count, size)
        start = self._at
        self._at += count * size
        return start

    def _check(self, count, size):
        left = len(self._bytes) - self._at
        if not 0 <= count * size <= left:
            raise _damaged(
                f"{count} items of {size} bytes where {left} are left"
            )


def _damaged(what):
    return ValueError(f"The .t7 file is truncated or damaged: {what}.")
