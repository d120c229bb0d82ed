"""Nets whose files say what their layers do, as Caffe's and Torch7's.

Such files hold the layers in the order in which they run, with windows,
strides and epsilons. So a `DenseNet` is recognised without a table of names,
and nothing but what the file leaves out is a guess: every layer is compared
with the one that this project would run in its place.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from densenet_jax.models import geometry
from densenet_jax.models.densenet import DenseNet
from densenet_jax.weights import layouts
from densenet_jax.weights.architecture import infer_architecture
from densenet_jax.weights.structure import match_structure
from densenet_jax.weights.tensor_file import StoredTensor

_HOW = "The layers were recognised one by one, by what the file says they do."


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a foreign net.

    Attributes:
      name: in the file, for messages; no two layers share one.
      kind: a kind of `geometry.Operation`, 'relu' or 'concat' (of what a dense
        layer read and what it made, in this order).
      tensors: by PyTorch's leaf (weight, bias, running_mean, running_var), in
        PyTorch's order of axes.
      window: size, stride and padding; None where the file does not say.
      epsilon: of a norm.
      rounds_up: whether a pool's output size is rounded up.
    """

    name: str
    kind: str
    tensors: Mapping[str, StoredTensor] = dataclasses.field(
        default_factory=dict
    )
    window: tuple[int, int, int] | None = None
    epsilon: float | None = None
    rounds_up: bool = False


@dataclasses.dataclass(frozen=True)
class Recognised:
    """A foreign net as one of this project.

    Attributes:
      tensors: names are `module.leaf`, with this project's modules.
      attributes: of the `DenseNet`.
      remarks, changes: as those of `TensorFile`.
    """

    tensors: dict[str, StoredTensor]
    attributes: dict[str, Any]
    remarks: tuple[str, ...]
    changes: tuple[str, ...]


def recognise_layers(layers: Sequence[Layer]) -> Recognised:
    """The `DenseNet` that runs exactly these layers.

    Args:
      layers: all of them, in order. Where none is a pool, the file holds only
        the layers that have tensors, and the rest is taken to be this
        project's, which `changes` says.

    Raises:
      ValueError: there is no such DenseNet.
    """
    layers = _with_mean(layers)
    with_tensors = [layer for layer in layers if layer.tensors]
    paths = match_structure(
        {
            f"{layer.name}.{leaf}": tensor.shape
            for layer in with_tensors
            for leaf, tensor in layer.tensors.items()
        }
    )
    tensors = {
        f"{paths[layer.name]}.{leaf}": tensor
        for layer in with_tensors
        for leaf, tensor in layer.tensors.items()
    }
    shapes = dict(map(_our_shape, tensors.items()))
    attributes = infer_architecture(shapes)
    attributes["norm_epsilon"] = _epsilon(with_tensors)
    # No guesses: what follows compares them with the file's layers.
    attributes |= dict(stem_stride=None, stem_pool=None, blur_pool="none")
    complete = any(layer.kind.endswith("pool") for layer in layers)
    expected = list(_expected(DenseNet(**attributes), shapes))
    if not complete:
        layers = with_tensors
        expected = [layer for layer in expected if layer[0] in paths.values()]
        expected = [layer for layer in expected if layer[1] != "relu"]
    _compare(layers, expected)
    remarks, changes = _notes(layers, complete)
    return Recognised(tensors, attributes, (_HOW, *remarks), changes)


def _with_mean(layers) -> list[Layer]:
    """Takes a pool in front of the classifier for the mean of a whole map.

    Its window is the last map of the images that the net was trained with.
    """
    return [
        dataclasses.replace(layer, kind="mean", window=None)
        if layer.kind == "average_pool" and after and after.kind == "linear"
        else layer
        for layer, after in zip(layers, [*layers[1:], None])
    ]


def _our_shape(item):
    name, tensor = item
    module, _, leaf = name.rpartition(".")
    rank = len(tensor.shape)
    axes = layouts.to_our_axes(leaf, rank)
    path = f"{module}/{layouts.our_leaf(leaf, rank)}"
    return path, tuple(tensor.shape[axis] for axis in axes)


def _epsilon(layers) -> float:
    """The one epsilon of all norms, as the decimal that was meant."""
    found = {
        layer.epsilon: layer.name for layer in layers if layer.kind == "norm"
    }
    if len(found) != 1 or not 0 < min(found) < 1:
        some = list(found.items())[:3]
        raise ValueError(
            "A DenseNet here has one epsilon below 1 for all norms: found "
            + ", ".join(f"{value} ({name})" for value, name in some)
        )
    # Caffe stores 1e-5 in 32 bits, which is 9.99999974e-06 in 64.
    return float(str(np.float32(*found)))


def _expected(model, shapes) -> Iterator[tuple[str, str, tuple | None]]:
    """(path, kind, window) of what this project would run."""
    in_channels = shapes["conv0/kernel"][2]
    for operation in geometry.walk(model, in_channels):
        path, kind, size = operation.path, operation.kind, operation.size
        windowed = kind in ("conv", "max_pool", "average_pool")
        window = (size, operation.stride, operation.padding)
        yield path, kind, window if windowed else None
        if kind == "norm":
            yield path, "relu", None
        elif kind == "conv" and size == 3 and path != "conv0":
            yield path.rpartition("/")[0], "concat", None


def _compare(layers, expected) -> None:
    """Raises ValueError at the first layer that is not the expected one."""
    end = ("the end", "end", None)
    for at in range(max(len(layers), len(expected))):
        layer = layers[at] if at < len(layers) else Layer(*end[:2])
        path, kind, window = expected[at] if at < len(expected) else end
        if layer.kind != kind:
            raise ValueError(
                f"{layer.name} is a {layer.kind}; a DenseNet has here a "
                f"{kind} ({path})."
            )
        if window and layer.window not in (None, window):
            size, stride, padding = layer.window
            raise ValueError(
                f"{layer.name} is a {kind} of {size}x{size}, stride {stride}, "
                f"padding {padding}; {path} is one of {window[0]}x{window[0]}, "
                f"stride {window[1]}, padding {window[2]}."
            )


def _notes(layers, complete) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The remarks and the changes."""
    if not complete:
        return (), (
            "The file holds no pools, ReLUs and concatenations: they are taken "
            "to be those of this project. Check the outputs.",
        )
    remarks, changes = [], []
    rounded = {layer.kind: layer for layer in layers if layer.rounds_up}
    if "max_pool" in rounded:
        changes.append(
            f"{rounded['max_pool'].name} rounds its output's size up in the "
            "file (57 of 112 pixels), down here (56): the logits differ a "
            "little."
        )
    if "average_pool" in rounded:
        remarks.append(
            "The transitions' pools round sizes up in the file, down here: the "
            "logits are equal where every map that they halve has an even size."
        )
    return tuple(remarks), tuple(changes)
