"""Any file of weights, as named tensors that are read when they are needed."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from densenet_jax.runs.description import Description, of_config
from densenet_jax.weights import torch_pickle

# Where training scripts keep the state dict, in the order of preference.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")

_SAFETENSORS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


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
      container: 'torch', 'safetensors', 'keras' or 'run'.
      remarks: what a user should know, one sentence each.
      attributes: of the model, for `create_model` with their name or else
        for `DenseNet`, where the file states them.
      description: of the net, as far as the file states it.
      modules: the names of all modules, also of those without tensors; empty
        where the container does not name these.
    """

    tensors: Mapping[str, StoredTensor]
    container: str
    remarks: tuple[str, ...] = ()
    attributes: Mapping[str, Any] | None = None
    description: Description = dataclasses.field(default_factory=Description)
    modules: frozenset[str] = frozenset()


def open_tensors(path: str | Path) -> TensorFile:
    """Opens a file of weights; what it is, is read off its first bytes.

    A directory is that of a training run, or made by `tools.convert`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a file of weights, or one that is not read: the message
        says what to do.
    """
    if Path(path).is_dir():
        return _open_run(Path(path))
    with open(path, "rb") as file:
        start = file.read(16)
    opened = None
    if start.startswith(b"PK"):
        opened = _open_torch(path)
    elif start.startswith(b"\x89HDF\r\n\x1a\n"):
        opened = _open_keras(path)
    elif start[8:9] == b"{":
        opened = _open_safetensors(path)
    if opened is not None:
        _check_size(opened, Path(path).stat().st_size)
        return opened
    if start.startswith(b"\x80") or Path(path).name.endswith(".tar"):
        raise ValueError(
            "The file is a pickle in PyTorch's format from before version "
            "1.6, which is not read here: reading it would run it. "
            + torch_pickle.WAY_OUT
        )
    raise ValueError(
        f"The file begins with {start!r}: it is neither a zip file of "
        "torch.save, nor .safetensors, nor a Keras .h5."
    )


def _check_size(file: TensorFile, size: int) -> None:
    """Raises ValueError where tensors share bytes, or hold what is not there.

    A small file could fill the memory.
    """
    claimed = sum(
        math.prod(tensor.shape) * tensor.dtype.itemsize
        for tensor in file.tensors.values()
    )
    if claimed > size:
        raise ValueError(
            f"The tensors claim {claimed:,} bytes that are not in this file "
            f"of {size:,}."
        )


def _open_torch(path):
    tree = torch_pickle.load(path)
    remarks = []
    # As many turns as there are wrappers: a dict can hold itself.
    for _ in range(len(WRAPPERS) + 1):
        if not isinstance(tree, dict):
            raise ValueError(
                f"The file holds a {type(tree).__name__}, expected a dict of "
                "tensors."
            )
        inner = [k for k in WRAPPERS if isinstance(tree.get(k), dict)]
        if not inner:
            break
        remarks.append(f"The weights are under the key {inner[0]!r}.")
        tree = tree[inner[0]]
    others = [
        f"{name} ({type(value).__name__})"
        for name, value in tree.items()
        if not isinstance(value, np.ndarray)
    ]
    if others or not tree:
        raise ValueError(
            "The file holds no dict of tensors, plain or under one of the "
            f"keys {', '.join(WRAPPERS)}. What is no tensor: "
            f"{', '.join(others[:20]) or 'the dict is empty'}."
        )
    tensors = {
        str(name): StoredTensor(
            value.shape, value.dtype, lambda value=value: value
        )
        for name, value in tree.items()
    }
    return TensorFile(tensors, "torch", tuple(remarks))


def _open_safetensors(path):
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"The .safetensors file is truncated or damaged ({error})."
        ) from error
    tensors = {}
    for name in file.keys():  # noqa: SIM118 (not a dict)
        part = file.get_slice(name)
        dtype = _SAFETENSORS.get(part.get_dtype())
        if dtype is None:
            raise ValueError(
                f"{name} is {part.get_dtype()}: expected one of "
                f"{', '.join(_SAFETENSORS)}."
            )
        tensors[name] = StoredTensor(
            tuple(part.get_shape()),
            dtype,
            functools.partial(file.get_tensor, name),
        )
    return TensorFile(tensors, "safetensors")


def _open_keras(path):
    import h5py  # Only Keras files need it.

    tensors, modules = {}, set()

    def visit(name, item):
        # Links are not followed by visititems.
        if name.startswith("optimizer"):
            return
        if isinstance(item, h5py.Group):
            modules.add(name)
            return
        # Keras writes its weights contiguously, into the file itself.
        if (
            item.is_virtual
            or item.external
            or item.chunks
            or item.dtype.hasobject
        ):
            raise ValueError(
                f"{name!r} holds values that are not in this file as they are."
            )
        tensors[_keras_name(name, item.parent)] = StoredTensor(
            item.shape,
            item.dtype,
            functools.partial(_guarded, item.__getitem__, ()),
        )

    file = _guarded(h5py.File, path)
    _guarded(file.visititems, visit)
    return TensorFile(tensors, "keras", modules=frozenset(modules))


def _guarded(call, *arguments):
    """call(*arguments), where h5py fails in its many ways as ValueError."""
    try:
        return call(*arguments)
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise ValueError(
            f"The .h5 file is truncated or damaged ({error})."
        ) from error


def _keras_name(path, group):
    """`layer.leaf` for a dataset of a Keras file.

    .h5 has .../layer/leaf (Keras 2 adds :0 to the leaf). .weights.h5 has
    layers/class_number/vars/index, and the layer's name as an attribute.
    """
    layer, _, leaf = path.rpartition("/")
    if leaf.isdigit() and "name" in group.attrs:
        layer = group.attrs["name"]
        leaves = ("gamma", "beta", "moving_mean", "moving_variance")
        leaves = leaves if len(group) == len(leaves) else ("kernel", "bias")
        leaf = leaves[int(leaf)] if int(leaf) < len(leaves) else leaf
    return f"{layer}.{leaf.removesuffix(':0')}"


def _open_run(directory):
    from densenet_jax.runs import (
        checkpoints as manager,  # Orbax takes long to import.
    )

    step, variables, config = manager.load_variables(directory)
    tensors = {}
    for collection in variables.values():
        for path, value in flax.traverse_util.flatten_dict(
            collection, sep="/"
        ).items():
            module, _, leaf = path.rpartition("/")
            tensors[f"{module}.{leaf}"] = StoredTensor(
                value.shape, value.dtype, functools.partial(np.asarray, value)
            )
    return TensorFile(
        tensors,
        "run",
        (f"The weights are those of step {step}.",),
        config["model"],
        of_config(config),
    )
