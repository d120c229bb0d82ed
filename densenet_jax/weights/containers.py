"""Any file of weights, as named tensors that are read when they are needed."""

import dataclasses
import functools
import math
import zipfile
from pathlib import Path

import flax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from densenet_jax.files import as_path
from densenet_jax.runs.description import of_config
from densenet_jax.weights import (
    caffe,
    config_json,
    keras_files,
    signatures,
    state_dicts,
    torch7,
    torch7_objects,
    torch_files,
)
from densenet_jax.weights.tensor_file import StoredTensor, TensorFile

_SAFETENSORS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def open_tensors(path: str | Path, *, prefix: str | None = None) -> TensorFile:
    """Opens a file of weights; what it is, is read off its first bytes.

    Args:
      path: of a file; or of a directory: that of a training run, one made by
        `tools.convert`, or weights beside a config.json as the Hugging Face hub
        has them. ~ is the home directory.
      prefix: for `state_dicts.find`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a file of weights, or one that is not read: the message
        says what to do.
    """
    path = as_path(path)
    if path.is_dir():
        for name in config_json.WEIGHTS:
            if (path / name).is_file():
                return _open_pretrained(path / name, prefix)
        return _open_run(path)
    signatures.check_regular(path)
    with open(path, "rb") as file:
        start = file.read(signatures.LENGTH)
    if start.startswith(b"PK"):
        opened = _open_zip(path, prefix)
    elif start.startswith(torch_files.LEGACY_MAGIC):
        opened = _open_torch(torch_files.load_legacy(path), prefix)
    elif start.startswith(b"\x89HDF\r\n\x1a\n"):
        opened = keras_files.open_h5(path)
    elif start[8:9] == b"{":
        opened = _open_safetensors(path)
    elif torch7_objects.is_torch7(start):
        opened = torch7.read(path)
    elif caffe.is_caffe(start, path.name):
        opened = caffe.read(path)
    else:
        raise ValueError(signatures.foreign(start))
    _check_size(opened, path.stat().st_size)
    return opened


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


def _open_zip(path, prefix):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(
            f"The zip file is truncated or damaged ({error}). Copy or "
            "download it again."
        ) from error
    if keras_files.ARCHIVED in names:
        return keras_files.open_archive(path)
    return _open_torch(torch_files.load_zip(path), prefix)


def _open_torch(loaded, prefix):
    tree, remarks = loaded
    found = state_dicts.find(tree, prefix)
    tensors = {
        name: StoredTensor(tensor.shape, tensor.dtype, tensor.read)
        for name, tensor in found.tensors.items()
    }
    return TensorFile(
        tensors,
        "torch",
        (*remarks, *found.remarks),
        attributes=found.attributes,
        description=found.description,
        modules=found.modules,
        key=found.key,
        ordered=True,
    )


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


def _open_pretrained(path, prefix):
    """Weights with the config.json beside them, if any."""
    file = open_tensors(path, prefix=prefix)
    config = path.with_name(config_json.CONFIG)
    if not config.is_file():
        return file
    stated = config_json.read(config)
    return dataclasses.replace(
        file,
        remarks=(*file.remarks, *stated.remarks),
        network=stated.network,
        attributes={**file.attributes, **stated.attributes},
        description=stated.description.or_else(file.description),
    )


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
        network=config["model"],
        description=of_config(config),
    )
