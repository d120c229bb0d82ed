"""Files of torch.save, read without torch and without running them.

Such a file is an uncompressed zip. Its entry data.pkl is a pickle that builds
containers and tensors; the entries under data/ hold the tensors' values.
A pickle is a program, and Python's unpickler runs it. `_Interpreter` knows the
few instructions that torch.save writes for tensors and plain containers: it
imports nothing and calls nothing but three functions of this file.
"""

import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}

WAY_OUT = (
    "If you trust the file, save its tensors alone where PyTorch and the code "
    "that made it are installed:\n"
    "  model = torch.load(OLD, map_location='cpu', weights_only=False)\n"
    "  torch.save(getattr(model, 'state_dict', lambda: model)(), NEW)\n"
    "(for a dict that holds more than tensors: model = model['state_dict'] in "
    "between)."
)


def load(path: str | Path) -> object:
    """Reads what torch.save wrote: nested dicts, lists, numbers and tensors.

    Tensors are read-only numpy views of the memory-mapped file: their values
    are read from disk when they are used.

    Raises:
      ValueError: the file is truncated or contradicts itself, or asks for
        anything but tensors and plain containers. Nothing of it has been run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(
            f"The zip file is truncated or damaged ({error}). Copy or "
            "download it again."
        ) from error
    return _Archive(path, entries).load()


class _Archive:
    """The entries of one file, memory-mapped."""

    def __init__(self, path, entries):
        self._bytes = np.memmap(path, mode="r", dtype=np.uint8)
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) < len(entries):
            raise ValueError("The zip file holds two entries of one name.")
        pickles = [n for n in self._entries if n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(
                "The zip file was not written by torch.save: it holds "
                f"{len(pickles)} entries */data.pkl, expected 1."
            )
        self._root = pickles[0].removesuffix("data.pkl")

    def load(self):
        if self._root + "constants.pkl" in self._entries:
            raise ValueError(
                "The file is a TorchScript program. Save its tensors alone: "
                "torch.save(torch.jit.load(OLD).state_dict(), NEW)."
            )
        byteorder = self._root + "byteorder"
        if byteorder in self._entries:
            found = self.read(byteorder).tobytes()
            if found != b"little":
                raise ValueError(
                    f"The file's byte order is {found[:16]!r}: only b'little' "
                    "is read."
                )
        program = self.read(self._root + "data.pkl").tobytes()
        return _Interpreter(self._storage).run(program)

    def read(self, name):
        """The bytes of an entry, a view of the file."""
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"The zip file has no entry {name!r}.")
        if entry.flag_bits & 1:
            raise ValueError(f"Entry {name!r} is encrypted.")
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.compress_size != entry.file_size
        ):
            raise ValueError(
                f"Entry {name!r} is compressed ({entry.compress_size} bytes "
                f"that claim to be {entry.file_size}). torch.save compresses "
                "nothing: the file was packed by something else. Unpacked, it "
                "could fill the memory."
            )
        start, header = entry.header_offset, 30
        lengths = self._bytes[start + 26 : start + header].tobytes()
        if len(lengths) < 4:
            raise ValueError(f"Entry {name!r} lies outside the file.")
        start += header + sum(struct.unpack("<HH", lengths))
        if start + entry.file_size > self._bytes.size:
            raise ValueError(
                f"Entry {name!r} claims {entry.file_size} bytes, more than "
                "the file has left."
            )
        return self._bytes[start : start + entry.file_size]

    def _storage(self, kind, key, count):
        if kind not in _STORAGES:
            raise ValueError(f"{kind} is no storage that is read here.")
        dtype = _STORAGES[kind]
        content = self.read(f"{self._root}data/{key}")
        if content.size != count * dtype.itemsize:
            raise ValueError(
                f"Storage {key!r} has {content.size} bytes, but {count} "
                f"values of {dtype} were declared."
            )
        return _Storage(content.view(dtype))


class _Storage(NamedTuple):
    """One entry under data/: unlike a tensor, always whole."""

    values: np.ndarray  # [count]


# No weight of a DenseNet has more than four.
_MOST_AXES = 8


def _empty_dict():
    return {}


def _rebuild_tensor(storage, offset, size, stride, *_):
    if not isinstance(storage, _Storage):
        raise ValueError("A tensor is not made of a storage.")
    values = storage.values
    if len(size) > _MOST_AXES:
        raise ValueError(f"A tensor has {len(size)} axes.")
    if any(n < 0 for n in (offset, *size, *stride)):
        raise ValueError("A tensor has a negative size, stride or offset.")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    count = math.prod(size)
    # More values than the storage has (a stride of 0) would be made of a few
    # bytes: a bomb.
    if count > values.size or (count and last >= values.size):
        raise ValueError(
            f"A tensor of shape {size} does not fit into its storage of "
            f"{values.size} values."
        )
    return np.lib.stride_tricks.as_strided(
        values[offset:],
        size,
        [s * values.itemsize for s in stride],
        writeable=False,
    )


def _rebuild_parameter(tensor, *_):
    return tensor


_FUNCTIONS = {
    "collections.OrderedDict": _empty_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}


class _Global(str):
    """The name of a function or storage type in a pickle; never the thing."""


_PUSH_ARGUMENT = (
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


_DAMAGE = (IndexError, KeyError, TypeError, AttributeError, OverflowError)


class _Interpreter:
    """A stack machine for the pickle opcodes of torch.save."""

    def __init__(self, storage):
        self._storage = storage
        self._stack = []
        self._marks = []
        self._memo = {}

    def run(self, program: bytes) -> object:
        try:
            # genops checks every length against the program's.
            for opcode, argument, _ in pickletools.genops(program):
                self._step(opcode.name, argument)
            return self._stack.pop()
        except _DAMAGE as error:
            raise ValueError(
                f"data.pkl is damaged: {type(error).__name__} in its "
                f"instruction {opcode.name}."
            ) from error

    def _step(self, name, argument):
        push, pop = self._stack.append, self._stack.pop
        if isinstance(argument, int) and not -(2**48) < argument < 2**48:
            raise ValueError(
                "data.pkl holds a number too large for the size of a tensor."
            )
        if name in _PUSH_ARGUMENT:
            push(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            push(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name == "TUPLE":
            push(tuple(self._pop_to_mark()))
        elif name in _TUPLES:
            push(tuple(pop() for _ in range(_TUPLES[name]))[::-1])
        elif name == "APPEND":
            value = pop()
            self._stack[-1].append(value)
        elif name == "APPENDS":
            values = self._pop_to_mark()
            self._stack[-1].extend(values)
        elif name == "SETITEM":
            value, key = pop(), pop()
            self._set_items([key, value])
        elif name == "SETITEMS":
            self._set_items(self._pop_to_mark())
        elif name == "GLOBAL":
            push(self._global(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = pop(), pop()
            push(self._global(f"{module}.{attribute}"))
        elif name == "REDUCE":
            arguments, function = pop(), pop()
            if not isinstance(function, _Global):
                raise ValueError("data.pkl calls what is not a function.")
            push(_FUNCTIONS[function](*arguments))
        elif name == "BINPERSID":
            _, kind, key, _, count = pop()
            push(self._storage(kind, key, count))
        elif name == "BUILD":
            pop()  # Attributes of a dict (`_metadata`): not needed.
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(
                f"data.pkl holds the instruction {name}, which torch.save "
                f"does not use for tensors. Nothing was run. {WAY_OUT}"
            )

    def _pop_to_mark(self):
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _set_items(self, items):
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise ValueError(
                    f"data.pkl has a dict key of type {type(key).__name__}: "
                    "expected str or int."
                )
            if key in target:
                raise ValueError(f"{key!r} is in the file twice.")
            target[key] = value

    def _global(self, name):
        if name not in _FUNCTIONS and name not in _STORAGES:
            raise ValueError(
                f"The file asks for {name!r}, which is neither a tensor nor a "
                f"plain container: it holds a whole module, or code. Nothing "
                f"was run. {WAY_OUT}"
            )
        return _Global(name)
