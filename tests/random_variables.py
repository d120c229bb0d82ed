"""Variables with a random value everywhere, made without tracing a net."""

import flax
import numpy as np

from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes


def random_variables(model: DenseNet, in_channels: int = 3) -> dict:
    """numpy arrays in 0.5 ... 1.5, scaled to keep signals in range."""
    rng = np.random.default_rng(0)
    leaves = {}
    for path, shape in tensor_shapes(model, in_channels).items():
        *modules, leaf = path.split("/")
        collection = "batch_stats" if leaf in ("mean", "var") else "params"
        value = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        if leaf == "kernel":
            value /= np.float32(np.prod(shape[:-1]))
        leaves[(collection, *modules, leaf)] = value
    return flax.traverse_util.unflatten_dict(leaves)
