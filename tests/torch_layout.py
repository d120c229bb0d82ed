"""Torchvision's names and layouts, for tests that compare with it."""

from collections.abc import Mapping

import flax
import numpy as np


def to_variables(state_dict: Mapping[str, np.ndarray]) -> dict:
    """Torchvision's DenseNet state_dict, as arrays, in the layout of ours.

    Convolutions go from OIHW to HWIO, linear layers are transposed, and the
    counters num_batches_tracked, which have no counterpart, are left out.
    """
    tree = {}
    for name, value in state_dict.items():
        *path, kind = name.removeprefix("features.").split(".")
        if kind == "num_batches_tracked":
            continue
        if kind in ("running_mean", "running_var"):
            leaf = ("batch_stats", *path, kind.removeprefix("running_"))
        elif kind == "bias":
            leaf = ("params", *path, "bias")
        elif value.ndim == 1:
            leaf = ("params", *path, "scale")
        else:
            leaf = ("params", *path, "kernel")
            value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0))
        tree[leaf] = value
    return flax.traverse_util.unflatten_dict(tree)
