"""This project's variables as files with torchvision's names."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import flax
import jax
import numpy as np
from safetensors.numpy import save_file

from densenet_jax.files import replacing
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.models.options import unseen_differences
from densenet_jax.runs.description import Description
from densenet_jax.weights import config_json
from densenet_jax.weights.architecture import infer_architecture
from densenet_jax.weights.layouts import torch_leaf

TORCH_SUFFIXES = (".pth", ".pt", ".bin")


def save_torch(variables: Mapping, path: str | Path) -> None:
    """Writes variables as PyTorch reads them, in torchvision's names.

    >>> save_torch(variables, "densenet.safetensors")

    `torchvision.models.densenet121().load_state_dict(
    safetensors.torch.load_file("densenet.safetensors"))` takes it as it is, if
    the net is a densenet121; `load_pretrained` gives the same variables back.
    What the names do not say is not in the file (see `unsaid`), as the norms'
    epsilon: `save_pretrained` keeps it. Deep stems have timm's names.

    Args:
      variables: {'params', 'batch_stats'} of a `DenseNet`.
      path: of the new file: .safetensors; or .pth, .pt or .bin, which need
        PyTorch installed.

    Raises:
      ValueError: another suffix, no PyTorch, or variables that are not those
        of a DenseNet.
    """
    path = Path(path).expanduser()
    tensors = to_torch(variables)
    save = _writer(path)
    with replacing(path) as temporary:
        save(tensors, temporary)


def save_pretrained(
    model: DenseNet,
    variables: Mapping,
    directory: str | Path,
    *,
    description: Description | None = None,
) -> None:
    """Writes a directory that `load_pretrained`, timm and their hub read.

    >>> flowers = Description(class_names=("daisy", "rose"))
    >>> save_pretrained(model, variables, "flowers", description=flowers)
    >>> model, variables = load_pretrained("flowers")

    `timm.create_model("local-dir:flowers", pretrained=True)` is the same net,
    if timm can build it: config.json has its architecture, preprocessing and
    names of classes, and all attributes of the model. model.safetensors has
    torchvision's names, or this project's own where there are none.

    Args:
      directory: new, or empty.
      description: of the net; what it does not say the directory does not.

    Raises:
      ValueError: the directory holds something; the variables or the
        description are of another net; the norms are folded.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not (
        directory.is_dir() and not any(directory.iterdir())
    ):
        raise ValueError(f"{directory} exists: choose another name.")
    description = description or Description()
    in_channels = _check(model, variables, description)
    if model.norm == "batch" and not model.squeeze_excite:
        tensors = _torch_names(variables)
    else:
        tensors = {
            ".".join(path.rsplit("/", 1)): np.asarray(value)
            for path, value in _flatten(variables).items()
        }
    config = config_json.write(model, in_channels, description)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replacing(directory) as temporary:
        temporary.mkdir()
        _save_safetensors(tensors, temporary / config_json.WEIGHTS[0])
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (temporary / config_json.CONFIG).write_text(text, encoding="utf-8")


def _check(model, variables, description) -> int:
    """Raises ValueError for what does not fit together.

    Returns:
      The number of channels of the images.
    """
    if model.folded:
        raise ValueError(
            "The norms are folded into the convolutions: save the model and "
            "variables that were given to fold_norms."
        )
    shapes = {path: np.shape(x) for path, x in _flatten(variables).items()}
    kernel = shapes.get("conv0/kernel", ())
    in_channels = kernel[2] if len(kernel) == 4 else 0
    if shapes != tensor_shapes(model, in_channels):
        raise ValueError("The variables are those of another model.")
    names = description.class_names
    if names and len(names) != model.num_classes:
        raise ValueError(
            f"The description names {len(names)} classes, the model has "
            f"{model.num_classes}."
        )
    for key in ("mean", "std"):
        values = (description.preprocessing or {}).get(key)
        if values and len(values) not in (1, in_channels):
            raise ValueError(
                f"The description's {key} has {len(values)} values, the model "
                f"reads {in_channels} channels."
            )
    return in_channels


def _writer(path: Path) -> Callable[[Mapping[str, np.ndarray], Path], None]:
    """What writes tensors to a file as its suffix says."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _save_safetensors
    if suffix not in TORCH_SUFFIXES:
        raise ValueError(
            f"{path.name} ends in {suffix or 'no suffix'}: give .safetensors, "
            f"or one of {', '.join(TORCH_SUFFIXES)} where PyTorch is installed."
        )
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"Writing {suffix} needs PyTorch: give a .safetensors name "
            "instead, or install torch (pip install torch)."
        ) from error
    return lambda tensors, path: torch.save(as_torch(tensors), path)


def _save_safetensors(tensors, path):
    save_file(tensors, path, metadata={"format": "pt"})


def as_torch(tensors: Mapping[str, np.ndarray]) -> dict:
    """numpy arrays as tensors of PyTorch, which must be installed."""
    import torch

    return {name: torch.from_numpy(x.copy()) for name, x in tensors.items()}


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
    return _torch_names(variables)


def _torch_names(variables) -> dict[str, np.ndarray]:
    state_dict = {}
    for path, value in _flatten(variables).items():
        module, _, leaf = path.rpartition("/")
        module = module if module == "classifier" else f"features/{module}"
        value = np.asarray(value)
        name, axes = torch_leaf(leaf, value.ndim)
        state_dict[f"{module.replace('/', '.')}.{name}"] = np.ascontiguousarray(
            value.transpose(axes)
        )
    return state_dict


def _flatten(variables) -> dict[str, jax.Array]:
    """Parameters and statistics in one dict; their leaves' names differ."""
    flat = {}
    for collection in ("params", "batch_stats"):
        leaves = variables.get(collection, {})
        flat |= flax.traverse_util.flatten_dict(leaves, sep="/")
    return flat
