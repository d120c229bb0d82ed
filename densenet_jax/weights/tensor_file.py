"""A file of weights as named tensors that are read when they are needed."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from densenet_jax.runs.description import Description


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape and type, and what reads its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """The tensors of a file, by name.

    Attributes:
      tensors: names are `module.leaf`, in the file's order.
      container: 'torch', 'safetensors', 'keras', 'caffe', 't7' or 'run'.
      remarks: what a user should know, one sentence each.
      changes: what differs from the file, or is a guess, one sentence each.
      network: the section `model` of the config of the run that it is.
      attributes: of the model, where the file states some of them.
      description: of the net, as far as the file states it.
      modules: the names of all modules, also of those without tensors; empty
        where the container does not name these.
      key: under which they lie in the file, where it holds more.
      ordered: whether the order of the tensors is that of the layers.
    """

    tensors: Mapping[str, StoredTensor]
    container: str
    remarks: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    network: Mapping[str, Any] | None = None
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    description: Description = dataclasses.field(default_factory=Description)
    modules: frozenset[str] = frozenset()
    key: str = ""
    ordered: bool = False
