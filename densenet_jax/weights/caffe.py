"""DenseNets of Caffe (.caffemodel), read without Caffe.

Such a file is a protocol buffer, a NetParameter of caffe.proto: the layers,
with what they do, and their blobs. The few fields that a DenseNet needs are
read, by their numbers there.

The known nets are those of github.com/shicai/DenseNet-Caffe, converted from the
authors', and of github.com/liuzhuang13/DenseNetCaffe, for CIFAR.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from densenet_jax.weights.caffe_graph import (
    Entry,
    check_wiring,
    describe,
    read_entries,
)
from densenet_jax.weights.layer_sequence import Layer, recognise_layers
from densenet_jax.weights.protobuf import Message, damaged, open_message
from densenet_jax.weights.tensor_file import StoredTensor, TensorFile


def is_caffe(start: bytes, name: str) -> bool:
    """Whether a file is one of Caffe's, by its first bytes and its name.

    A protocol buffer has no mark: a file that begins with a layer, or with the
    length and the letters of the net's name.
    """
    if start[:2] == b"\xa2\x06":
        return True
    return name.endswith(".caffemodel") and start[:1] in (
        b"\x0a",  # name
        b"\x12",  # layers, of Caffe's first version
        b"\x1a",  # input
    )


def read(path: str | Path) -> TensorFile:
    """Reads the DenseNet in a .caffemodel file.

    Raises:
      ValueError: the file is damaged, or holds no DenseNet.
    """
    entries = read_entries(open_message(path))
    wired = check_wiring(entries)
    net = recognise_layers(_with_linear(list(_layers(entries))))
    tensors, changes = dict(net.tensors), list(net.changes)
    if not wired:
        changes.append(
            "The file does not say what its layers read: concatenations are "
            "taken to put the oldest features first. Check the outputs."
        )
    # OpenCV reads ImageNet's files for Caffe, blue first; Caffe's own
    # conversion of CIFAR keeps its order, red first.
    stem = tensors["conv0.weight"]
    blue_first = net.attributes["stem"] == "imagenet" and stem.shape[1] == 3
    if blue_first:
        tensors["conv0.weight"] = dataclasses.replace(
            stem, read=lambda: stem.read()[:, ::-1]
        )
        changes.append(
            "The stem's input channels are put in another order: nets of Caffe "
            "read images of blue, green, red."
        )
    description, notes = describe(entries, blue_first)
    return TensorFile(
        tensors,
        "caffe",
        net.remarks,
        (*changes, *notes),
        attributes=net.attributes,
        description=description,
    )


def _layers(entries: Sequence[Entry]) -> Iterator[Layer]:
    """The layers that change values, each norm with the scale after it."""
    norm = None
    for entry in entries:
        if norm and entry.kind != "Scale":
            break
        parameters = entry.parameters
        if entry.kind == "Convolution":
            yield _convolution(entry)
        elif entry.kind == "BatchNorm":
            norm = entry
        elif entry.kind == "Scale":
            if norm is None:
                raise ValueError(
                    f"{entry.name} scales, but no norm is before it."
                )
            yield _norm(norm, entry)
            norm = None
        elif entry.kind == "InnerProduct":
            if parameters and parameters.integer(6, 0):
                raise ValueError(f"{entry.name}'s weights are transposed.")
            yield Layer(entry.name, "linear", _affine(entry, 2))
        elif entry.kind == "ReLU":
            if parameters and any(parameters.floats(1)):
                raise ValueError(f"{entry.name} has a negative_slope.")
            yield Layer(entry.name, "relu")
        elif entry.kind == "Pooling":
            yield _pool(entry)
        elif entry.kind == "Concat":
            yield Layer(entry.name, "concat")
    if norm:
        raise ValueError(
            f"{norm.name} is a BatchNorm without a Scale after it: the norms "
            "of a DenseNet scale and shift."
        )


def _with_linear(layers: list[Layer]) -> list[Layer]:
    """Takes a last 1x1 convolution with a bias for the classifier that it is.

    Anywhere else a bias has no place.
    """
    found = []
    last = max((i for i, x in enumerate(layers) if x.tensors), default=None)
    for i, layer in enumerate(layers):
        if layer.kind == "conv" and "bias" in layer.tensors:
            weight = layer.tensors["weight"]
            if i != last or weight.shape[2:] != (1, 1):
                raise ValueError(
                    f"{layer.name} adds a bias; the convolutions of a DenseNet "
                    "here do not."
                )
            flat = _stored(weight.read()[:, :, 0, 0])
            tensors = {**layer.tensors, "weight": flat}
            layer = Layer(layer.name, "linear", tensors)
        found.append(layer)
    return found


def _convolution(entry) -> Layer:
    parameters = entry.parameters
    window = None
    if parameters:
        if parameters.integer(5, 1) != 1 or set(parameters.integers(18)) - {1}:
            raise ValueError(f"{entry.name} is grouped or dilated.")
        window = (
            _square(entry, "kernel_size", (4, 11, 12)),
            _square(entry, "stride", (6, 13, 14), 1),
            _square(entry, "pad", (3, 9, 10), 0),
        )
    return Layer(entry.name, "conv", _affine(entry, 4), window)


def _pool(entry) -> Layer:
    parameters = entry.parameters
    if parameters is None or parameters.integer(1, 0) not in (0, 1):
        raise ValueError(f"{entry.name} pools in a way that is not known here.")
    average = parameters.integer(1, 0) == 1
    if parameters.integer(12, 0):
        if not average:
            raise ValueError(f"{entry.name} is the maximum of a whole map.")
        return Layer(entry.name, "mean")
    window = (
        _square(entry, "kernel_size", (2, 5, 6)),
        _square(entry, "stride", (3, 7, 8), 1),
        _square(entry, "pad", (4, 9, 10), 0),
    )
    # Sizes are rounded up unless the file says otherwise, which it does in one
    # of two ways under one number: ceil_mode 0 or round_mode 1.
    return Layer(
        entry.name,
        "average_pool" if average else "max_pool",
        window=window,
        rounds_up=not parameters.integers(13),
    )


def _square(entry, what, numbers, default=None) -> int:
    """A size for both axes, from one field for both or one for each."""
    sizes = {x for n in numbers for x in entry.parameters.integers(n)}
    if len(sizes) > 1 or (not sizes and default is None):
        raise ValueError(
            f"{entry.name}'s {what} is {sorted(sizes)}: expected one number."
        )
    return sizes.pop() if sizes else default


def _norm(entry, scale) -> Layer:
    mean, variance, factor = (blob.ravel() for blob in _blobs(entry, 3))
    gamma, beta = (blob.ravel() for blob in _blobs(scale, 2))
    if factor.shape != (1,) or not factor[0]:
        raise ValueError(
            f"{entry.name}'s third blob, the weight of its statistics, is "
            f"{factor[:4]}: expected one number that is not 0."
        )
    with np.errstate(all="ignore"):
        # Caffe stores sums, and multiplies by the inverse.
        inverse = factor.dtype.type(1) / factor[0]
    epsilon = [1e-5]
    if entry.parameters:
        epsilon = entry.parameters.floats(3) or epsilon
    return Layer(
        entry.name,
        "norm",
        {
            "weight": _stored(gamma),
            "bias": _stored(beta),
            "running_mean": _stored(mean, inverse),
            "running_var": _stored(variance, inverse),
        },
        epsilon=epsilon[-1],
    )


def _affine(entry, rank) -> dict[str, StoredTensor]:
    """The weight, of so many axes, and the bias if there is one."""
    weight, *bias = _blobs(entry, 1, 2)
    # Caffe's first versions gave every blob four axes.
    extra = max(0, weight.ndim - rank)
    if any(n != 1 for n in weight.shape[:extra]):
        raise ValueError(f"{entry.name}'s weights are {list(weight.shape)}.")
    tensors = {"weight": _stored(weight.reshape(weight.shape[extra:]))}
    if bias:
        tensors["bias"] = _stored(bias[0].ravel())
    return tensors


def _blobs(entry, *counts) -> list[np.ndarray]:
    """A layer's tensors, views of the file; one of these numbers of them."""
    if len(entry.blobs) not in counts:
        raise ValueError(
            f"{entry.name} has {len(entry.blobs)} blobs: expected "
            f"{' or '.join(map(str, counts))}."
        )
    return [_blob(message) for message in entry.blobs]


def _blob(message: Message) -> np.ndarray:
    shape = message.message(7)
    if shape is not None:
        shape = shape.integers(1)
    else:
        shape = [message.integer(number, 1) for number in (1, 2, 3, 4)]
    values = message.array(5, "<f4")
    if values is None:
        values = message.array(8, "<f8")
    size = 0 if values is None else values.size
    if not size or math.prod(shape) != size or len(shape) > 8:
        raise damaged(f"a blob of shape {shape[:8]} with {size} values")
    return values.reshape(shape)


def _stored(values: np.ndarray, factor: float = 1) -> StoredTensor:
    def read():
        with np.errstate(all="ignore"):
            return values if factor == 1 else values * factor

    return StoredTensor(values.shape, values.dtype, read)
