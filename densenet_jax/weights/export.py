"""This project's variables as PyTorch files with torchvision's names."""

from collections.abc import Mapping
from pathlib import Path

import flax
import jax
import numpy as np
from safetensors.numpy import save_file

from densenet_jax.files import replacing
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.models.options import unseen_differences
from densenet_jax.weights.architecture import infer_architecture


def save_torch(variables: Mapping, path: str | Path) -> None:
    """Writes variables as .safetensors in torchvision's names and layout.

    >>> save_torch(variables, "densenet.safetensors")

    `torchvision.models.densenet121().load_state_dict(
    safetensors.torch.load_file("densenet.safetensors"))` takes it as it is, if
    the net is a densenet121; `load_pretrained` gives the same variables back.
    What the names do not say is not in the file (see `unsaid`), as the norms'
    epsilon: PyTorch's is 1e-5. Deep stems have timm's names.

    Args:
      variables: {'params', 'batch_stats'} of a `DenseNet`.
      path: of the new file.

    Raises:
      ValueError: variables are not those of a DenseNet.
    """
    tensors = to_torch(variables)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def unsaid(model: DenseNet) -> list[str]:
    """The attributes of a net that its file in torchvision's names loses.

    They are those with another value in the net that the file is read as.
    """
    read = DenseNet(**infer_architecture(tensor_shapes(model, 3)))
    return unseen_differences(model, read)


def to_torch(variables: Mapping) -> dict[str, np.ndarray]:
    """The state dict of torchvision's or, of a deep stem, timm's DenseNet.

    Returns:
      numpy arrays by name.

    Raises:
      ValueError: variables are not those of a DenseNet.
    """
    if not {"params", "batch_stats"} <= set(variables):
        raise ValueError(
            f"Variables have the collections {sorted(variables)}: expected "
            "'params' and 'batch_stats'."
        )
    shapes = {path: value.shape for path, value in _flatten(variables).items()}
    model = DenseNet(**infer_architecture(shapes))
    if shapes != tensor_shapes(model, shapes["conv0/kernel"][2]):
        raise ValueError(
            "The variables are not exactly those of a DenseNet with batch "
            "normalisation and the paper's layers: torchvision has no names "
            "for others."
        )
    leaves = {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    state_dict = {}
    for path, value in _flatten(variables).items():
        module, _, leaf = path.rpartition("/")
        module = module if module == "classifier" else f"features/{module}"
        name = f"{module.replace('/', '.')}.{leaves[leaf]}"
        value = np.asarray(value)
        axes = {"kernel": {4: (3, 2, 0, 1), 2: (1, 0)}}.get(leaf, {})
        order = axes.get(value.ndim, range(value.ndim))
        state_dict[name] = np.ascontiguousarray(value.transpose(order))
    return state_dict


def _flatten(variables) -> dict[str, jax.Array]:
    """Parameters and statistics in one dict; their leaves' names differ."""
    return flax.traverse_util.flatten_dict(
        variables["params"], sep="/"
    ) | flax.traverse_util.flatten_dict(variables["batch_stats"], sep="/")
