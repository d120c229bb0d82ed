"""Keras's .h5, .weights.h5 and .keras, read by h5py."""

import functools
import io
import re
import zipfile
from collections.abc import Mapping
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
        tensors[_name(name, item.parent)] = StoredTensor(
            item.shape,
            item.dtype,
            functools.partial(_guarded, item.__getitem__, ()),
        )

    file = _guarded(h5py.File, source)
    _guarded(file.visititems, visit)
    named = not any(name.startswith("layers/") for name in tensors)
    ordered = None if named else _in_order(tensors)
    return TensorFile(
        ordered or tensors,
        "keras",
        ordered=bool(ordered),
        modules=frozenset(modules),
    )


def _in_order(
    tensors: Mapping[str, StoredTensor],
) -> dict[str, StoredTensor] | None:
    """The tensors in the order of a DenseNet's layers.

    Files without the layers' names count each class of layers by itself:
    conv2d_1, batch_normalization_1.

    Returns:
      None where the numbers of layers are not those of such a net.
    """
    modules = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    kinds = {"conv": [], "norm": [], "linear": []}
    for module, leaves in modules.items():
        axes = len(leaves["kernel"].shape) if "kernel" in leaves else 1
        kinds[{4: "conv", 2: "linear"}.get(axes, "norm")].append(module)
    for found in kinds.values():
        found.sort(key=_number)
    convs, norms = kinds["conv"], kinds["norm"]
    stem = len(norms) + 1 - len(convs)  # norms before the first block, and 1
    if not convs or stem not in (1, 2):
        return None
    order = [convs[0], *norms[: stem - 1]]
    for norm, conv in zip(norms[stem - 1 :], convs[1:]):
        order += [norm, conv]
    order += [norms[-1], *kinds["linear"]]
    return {
        f"{module}.{leaf}": tensor
        for module in order
        for leaf, tensor in modules[module].items()
    }


def _number(module: str) -> int:
    digits = re.search(r"_(\d+)$", module)
    return int(digits[1]) if digits else 0


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
    layers/class_number/vars/index, and in later versions the layer's name as
    an attribute.
    """
    layer, _, leaf = path.rpartition("/")
    if leaf.isdigit():
        layer = group.attrs.get("name", layer.removesuffix("/vars"))
        leaves = ("gamma", "beta", "moving_mean", "moving_variance")
        leaves = leaves if len(group) == len(leaves) else ("kernel", "bias")
        leaf = leaves[int(leaf)] if int(leaf) < len(leaves) else leaf
    return f"{layer}.{leaf.removesuffix(':0')}"
