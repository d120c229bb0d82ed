"""What a pickle of torch.save builds here: inert records."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np


class Global(str):
    """The name of a function or class in a pickle; never the thing."""


@dataclasses.dataclass(eq=False)
class Placeholder:
    """What a pickle would have built by calling something.

    Attributes:
      name: of what it would have called.
      arguments: of the call.
      state: what it would have been given then, as an object's attributes.
      items: what would have been put into it, as into a dict.
    """

    name: str
    arguments: tuple = ()
    state: Any = None
    items: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Storage:
    """Values that lie next to each other in a file.

    Attributes:
      dtype: of the values.
      count: of the values.
      read: reads them all, [count].
    """

    dtype: np.dtype
    count: int
    read: Callable[[], np.ndarray]

    def part(self, offset: int, count: int) -> "Storage":
        """A view of consecutive values.

        Raises:
          ValueError: they are not all inside.
        """
        if not 0 <= offset <= offset + count <= self.count:
            raise ValueError(
                f"A view of {count} values from {offset} lies outside its "
                f"storage of {self.count}."
            )

        def read():
            return self.read()[offset : offset + count]

        return Storage(self.dtype, count, read)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, inside its storage; strides are in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def read(self) -> np.ndarray:
        """The values, a read-only view of the file."""
        values = self.storage.read()[self.offset :]
        return np.lib.stride_tricks.as_strided(
            values,
            self.shape,
            [stride * values.itemsize for stride in self.strides],
            writeable=False,
        )


class Dict(dict):
    """An OrderedDict; `state` is what is kept beside its items."""

    state: Any = None


def classes(value: Any, limit: int = 20) -> list[str]:
    """The names of the placeholders in nested containers, sorted.

    Args:
      value: of `Interpreter.run`.
      limit: how many are returned.
    """
    names, seen, todo = set(), set(), [value]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Placeholder):
            names.add(value.name)
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
    return list(itertools.islice(sorted(names), limit))
