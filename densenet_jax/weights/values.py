"""The values of a file's tensors, checked, as this project's variables."""

import collections
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.weights.names import Placed
from densenet_jax.weights.tensor_file import TensorFile
from densenet_jax.weights.text import listed

_STATISTICS = ("mean", "var")


def read(
    file: TensorFile,
    placed: Mapping[str, Placed],
    channels: Mapping[str, np.ndarray],
    changes: list[str],
) -> dict[str, jax.Array]:
    """Reads the tensors one by one: float32, on the device.

    Args:
      channels: for some modules, the indices that put their input channels
        into our order.
    """
    flat, dtypes, bad = {}, collections.Counter(), []
    for target, (name, axes, _) in placed.items():
        dtype = file.tensors[name].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name} is {dtype}: expected floats.")
        dtypes[str(dtype)] += 1
        values = file.tensors[name].read().transpose(axes)
        module, _, leaf = target.rpartition("/")
        if module in channels and target != "classifier/bias":
            axis = -2 if leaf == "kernel" else 0
            values = values.take(channels[module], axis)
        with np.errstate(over="ignore"):
            single = np.array(values, np.float32, order="C")
        if dtype.itemsize > 4 and (np.isinf(single) & ~np.isinf(values)).any():
            raise ValueError(f"{name} has values beyond float32's.")
        bad += _bad_values(name, leaf, single)
        flat[target] = jax.device_put(single)
    if bad:
        raise ValueError(
            "The file holds values that no net computes with (compilers can "
            f"turn NaN into 0, so that outputs look right): {listed(bad)}."
        )
    for dtype, count in dtypes.items():
        if dtype != "float32":
            changes.append(f"{count} tensors were {dtype}, now float32.")
    return flat


def _bad_values(name, leaf, values) -> list[str]:
    """What is wrong with the values of a tensor."""
    if not np.isfinite(values).all():
        count = np.count_nonzero(~np.isfinite(values))
        return [f"{name} has {count} NaN or infinite of {values.size}"]
    if leaf == "var" and (values < 0).any():
        return [f"{name} has {np.count_nonzero(values < 0)} negative variances"]
    return []


def to_tree(flat: Mapping[str, jax.Array]) -> dict:
    """{'params', 'batch_stats'} of arrays by path."""
    tree = {
        collection: {
            path: value
            for path, value in flat.items()
            if (path.rpartition("/")[2] in _STATISTICS)
            == (collection == "batch_stats")
        }
        for collection in ("params", "batch_stats")
    }
    return {
        collection: flax.traverse_util.unflatten_dict(leaves, sep="/")
        for collection, leaves in tree.items()
    }


def adapt_stem(
    flat: dict[str, jax.Array], in_channels: int, changes: list[str]
) -> None:
    """timm's adapt_input_conv, for any number of channels."""
    kernel = flat["conv0/kernel"]  # [height, width, in, out]
    before = kernel.shape[2]
    if in_channels == before:
        return
    if in_channels == 1:
        adapted = kernel.sum(axis=2, keepdims=True)
    else:
        repeats = -(-in_channels // before)
        adapted = jnp.tile(kernel, (1, 1, repeats, 1))[:, :, :in_channels]
        adapted *= before / in_channels
    flat["conv0/kernel"] = adapted
    changes.append(
        f"The stem's kernel is adapted from {before} to {in_channels} input "
        "channels."
    )
