"""The pickles in files of torch.save, read without running them.

A pickle is a program, and Python's unpickler runs it. `Interpreter` follows the
instructions that build containers and tensors. It imports nothing and calls
nothing but the functions of this file: whatever else a pickle asks for becomes
a `Placeholder`, a record of what was asked.
"""

import math
import pickletools
from collections.abc import Callable
from typing import IO, Any

import ml_dtypes
import numpy as np

from densenet_jax.weights.torch_objects import (
    Dict,
    Global,
    Placeholder,
    Storage,
    Tensor,
)

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

# No weight of a net for images or volumes has more than five.
_MOST_AXES = 8


def _empty_dict(*_):
    return Dict()


def _rebuild_tensor(storage, offset, size, stride, *_):
    if isinstance(storage, Placeholder):
        return storage  # Of a type that no weight has.
    if not isinstance(storage, Storage):
        raise ValueError("A tensor is not made of a storage.")
    if len(size) > _MOST_AXES:
        raise ValueError(f"A tensor has {len(size)} axes.")
    for number in (offset, *size, *stride):
        if number < 0:
            raise ValueError("A tensor has a negative size, stride or offset.")
        if number >= 2**48:
            raise ValueError("A number is too large for the size of a tensor.")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    count = math.prod(size)
    # More values than the storage has (a stride of 0) would be made of a few
    # bytes: a bomb.
    if count > storage.count or (count and last >= storage.count):
        raise ValueError(
            f"A tensor of shape {size} does not fit into its storage of "
            f"{storage.count} values."
        )
    return Tensor(storage, offset, tuple(size), tuple(stride))


def _first(tensor, *_):
    return tensor


def _of_type(function, kind, arguments, *_):
    """A tensor of a subclass."""
    if function not in _FUNCTIONS:
        return Placeholder(str(kind))
    return _FUNCTIONS[function](*arguments)


_FUNCTIONS = {
    "collections.OrderedDict": _empty_dict,
    "collections.defaultdict": _empty_dict,
    "torch.Size": lambda size=(): tuple(size),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}


_PUSH_ARGUMENT = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "BINUNICODE8",
    "SHORT_BINUNICODE",
    # Bytes, and Python 2's strings.
    "BINBYTES",
    "BINBYTES8",
    "SHORT_BINBYTES",
    "BYTEARRAY8",
    "BINSTRING",
    "SHORT_BINSTRING",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Placeholder("set"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_DAMAGE = (IndexError, KeyError, TypeError, AttributeError, OverflowError)


def _instructions(program):
    """As genops, which checks every length against the program's."""
    instructions = pickletools.genops(program)
    while True:
        try:
            instruction = next(instructions, None)
        except ValueError as error:
            raise ValueError(
                f"The pickle is damaged: {error!s:.100}."
            ) from error
        if instruction is None:
            return
        yield instruction


class Interpreter:
    """A stack machine for the pickle instructions of torch.save."""

    def __init__(self, storage: Callable[..., Storage]):
        """`storage` is called as storage(dtype, key, count, view or None)."""
        self._storage = storage
        self._stack = []
        self._marks = []
        self._memo = {}

    def run(self, program: bytes | IO[bytes]) -> Any:
        """What one pickle builds; a file is read to its end, no further.

        Raises:
          ValueError: it is damaged, or holds what is never read.
        """
        opcode = None
        try:
            for opcode, argument, _ in _instructions(program):
                self._step(opcode.name, argument)
            return self._stack.pop()
        except _DAMAGE as error:
            raise ValueError(
                f"The pickle is damaged: {type(error).__name__} in its "
                f"instruction {opcode and opcode.name}."
            ) from error

    def _step(self, name, argument):
        push, pop = self._stack.append, self._stack.pop
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
        elif name == "FROZENSET":
            push(Placeholder("frozenset", tuple(self._pop_to_mark())))
        elif name in _TUPLES:
            push(tuple(pop() for _ in range(_TUPLES[name]))[::-1])
        elif name == "POP":
            pop()
        elif name in ("POP_MARK", "ADDITEMS"):
            self._pop_to_mark()
        elif name == "APPEND":
            self._append([pop()])
        elif name == "APPENDS":
            self._append(self._pop_to_mark())
        elif name == "SETITEM":
            value, key = pop(), pop()
            self._set_items([key, value])
        elif name == "SETITEMS":
            self._set_items(self._pop_to_mark())
        elif name == "GLOBAL":
            push(Global(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = pop(), pop()
            push(Global(f"{module:s}.{attribute:s}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = pop(), pop()
            push(self._call(function, arguments))
        elif name == "NEWOBJ_EX":
            _, arguments, function = pop(), pop(), pop()
            push(self._call(function, arguments))
        elif name == "BINPERSID":
            push(self._persistent(pop()))
        elif name == "BUILD":
            state = pop()
            if isinstance(self._stack[-1], Placeholder | Dict):
                self._stack[-1].state = state
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(
                f"The pickle holds the instruction {name}, which torch.save "
                "does not write. Nothing was run."
            )

    def _pop_to_mark(self):
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _append(self, values):
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Placeholder):
            raise TypeError

    def _set_items(self, items):
        target = self._stack[-1]
        if isinstance(target, Placeholder):
            target = target.items
        if not isinstance(target, dict):
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of tuples of tuples can take for ever.
            parts = key if isinstance(key, tuple) else (key,)
            if any(isinstance(part, tuple) for part in parts):
                raise ValueError("The pickle has a tuple of tuples as a key.")
            if key in target:
                raise ValueError(f"{key!r:.80} is in the file twice.")
            target[key] = value

    def _call(self, function, arguments):
        if not isinstance(function, Global | Placeholder):
            raise ValueError("The pickle calls what is not a function.")
        if not isinstance(arguments, tuple):
            raise TypeError
        if isinstance(function, Global) and function in _FUNCTIONS:
            return _FUNCTIONS[function](*arguments)
        name = getattr(function, "name", function)
        return Placeholder(str(name), arguments)

    def _persistent(self, reference):
        """What a persistent id stands for: a storage, or a module's class."""
        match reference:
            case ("module", Global() as name, *_):
                return name
            # The zip format's have no view.
            case ("storage", Global(), str(), _, int(), *view):
                (view,) = view or (None,)
                _, kind, key, _, count, *_ = reference
            case _:
                raise TypeError
        dtype = _DTYPES.get(kind.rpartition(".")[2])
        if dtype is None or not kind.startswith("torch."):
            return Placeholder(str(kind))
        if count < 0:
            raise ValueError(f"Storage {key!r:.80} has {count} values.")
        return self._storage(dtype, key, count, view)
