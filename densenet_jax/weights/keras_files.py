"""Keras's .h5, .weights.h5 and .keras, read by h5py."""

import functools
import io
import zipfile
from pathlib import Path
from typing import IO

from densenet_jax.weights.tensor_file import StoredTensor, TensorFile

# What a .keras archive keeps its weights in.
ARCHIVED = "model.weights.h5"


def open_archive(path: str | Path) -> TensorFile:
    """Opens the weights in a .keras archive.

    Raises:
      ValueError: it is damaged, or compressed.
    """
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(ARCHIVED)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(
                f"{ARCHIVED} in the archive is compressed, which Keras does "
                "not do: unpacked, it could fill the memory. Unpack it, and "
                "give that file."
            )
        try:
            content = archive.read(entry)
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise ValueError(
                f"The .keras archive is truncated or damaged ({error})."
            ) from error
    return open_h5(io.BytesIO(content))


def open_h5(source: str | Path | IO[bytes]) -> TensorFile:
    """Opens a .h5 or .weights.h5.

    Raises:
      ValueError: it is damaged, or its values lie elsewhere.
    """
    import h5py  # Only Keras files need it.

    tensors = {}

    def visit(name, item):
        # Links are not followed by visititems.
        if name.startswith("optimizer") or isinstance(item, h5py.Group):
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
        tensors[_name(name, item.parent)] = StoredTensor(
            item.shape,
            item.dtype,
            functools.partial(_guarded, item.__getitem__, ()),
        )

    file = _guarded(h5py.File, source)
    _guarded(file.visititems, visit)
    return TensorFile(tensors, "keras")


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


def _name(path, group):
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
