"""The layers of a Caffe net: what they read, and what is done to images."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from densenet_jax.runs.description import Description
from densenet_jax.weights.protobuf import Message, damaged

# What makes images and labels, and what reads the logits.
_SOURCES = (
    "Data",
    "DummyData",
    "HDF5Data",
    "ImageData",
    "Input",
    "MemoryData",
)
_ENDS = (
    "Accuracy",
    "Sigmoid",
    "SigmoidCrossEntropyLoss",
    "Silence",
    "Softmax",
    "SoftmaxWithLoss",
)
# What a layer does beside its blobs: the field of its parameters.
_KINDS = {
    "BatchNorm": 139,
    "Concat": 104,
    "Convolution": 106,
    "InnerProduct": 117,
    "Pooling": 121,
    "ReLU": 123,
    "Scale": 142,
}
# A DenseNet-264 has some 1,500.
_MOST_LAYERS = 10_000

# What changes no value in evaluation.
_PASSING = ("Dropout", "Flatten", "Reshape", "Split")

# What github.com/shicai/DenseNet-Caffe says of its nets: the means to subtract
# and the scale, of images in 0 ... 255.
_IMAGENET = {
    "mean": (123.68, 116.78, 103.94),
    "std": (1 / 0.017,) * 3,
    "image_size": 224,
    "resize_size": 256,
}
_TASKS = {
    "Softmax": "classification",
    "SoftmaxWithLoss": "classification",
    "Sigmoid": "multilabel",
    "SigmoidCrossEntropyLoss": "multilabel",
}


class Entry(NamedTuple):
    """A layer of the file.

    Attributes:
      name, kind: Caffe's.
      bottoms, tops: the names of what it reads and makes.
      blobs: its tensors.
      parameters: what it does; None where the file does not say.
      transform: the preprocessing of a source.
    """

    name: str
    kind: str
    bottoms: list[str]
    tops: list[str]
    blobs: list[Message]
    parameters: Message | None
    transform: Message | None


def read_entries(net: Message) -> list[Entry]:
    """The layers of a NetParameter, in order.

    Raises:
      ValueError: there are none, or some that a DenseNet does not have.
    """
    layers = net.messages(100)
    if len(layers) > _MOST_LAYERS:
        raise damaged(f"{len(layers):,} layers")
    entries = [_entry(layer) for layer in layers]
    if not entries:
        if net.messages(2):
            raise ValueError(
                "The .caffemodel is of Caffe's first version: rewrite it with "
                "Caffe's upgrade_net_proto_binary OLD NEW."
            )
        raise ValueError("The .caffemodel holds no layers.")
    names = {entry.name for entry in entries if entry.blobs}
    if len(names) < sum(bool(entry.blobs) for entry in entries):
        raise ValueError("Two layers of the .caffemodel have one name.")
    return entries


def _entry(layer: Message) -> Entry:
    name, kind = (["", *layer.texts(number)][-1] for number in (1, 2))
    if kind not in (*_SOURCES, *_KINDS, *_PASSING, *_ENDS):
        raise ValueError(
            f"The layer {name!r} is a {kind!r}, which a DenseNet does not have."
        )
    return Entry(
        name,
        kind,
        layer.texts(3),
        layer.texts(4),
        layer.messages(7),
        layer.message(_KINDS[kind]) if kind in _KINDS else None,
        layer.message(100),
    )


def check_wiring(entries: Sequence[Entry]) -> bool:
    """Whether the file says what its layers read.

    Raises:
      ValueError: it says so, and that is not a chain in which each dense layer
        concatenates what it read and what it made, in this order.
    """
    chain = [e for e in entries if e.kind not in (*_SOURCES, *_ENDS)]
    if not any(e.bottoms for e in chain):
        return False
    same = {}  # What a Split makes is what it reads.
    parts = []  # What the features are made of, one by one.
    before = features = concatenated = last_kind = None
    for entry in chain:
        bottoms = [same.get(bottom, bottom) for bottom in entry.bottoms]
        if not bottoms or not entry.tops:
            raise ValueError(f"{entry.name} reads or makes nothing.")
        if entry.kind == "Split":
            same |= dict.fromkeys(entry.tops, bottoms[0])
            continue
        allowed = [[before]]
        if entry.kind == "Concat":
            _check_axis(entry)
            parts = [*parts, before]
            allowed = [[features, before], parts]
            concatenated = entry.tops[0]
        if before is not None and bottoms not in allowed:
            raise ValueError(
                f"{entry.name} reads {', '.join(bottoms[:4])}: a DenseNet here "
                f"reads {', '.join(map(str, allowed[0]))}, oldest features "
                "first."
            )
        before = entry.tops[0]
        same.pop(before, None)
        if entry.kind in ("Concat", "Pooling"):
            features = None
        elif entry.kind == "BatchNorm" and (
            features is None or last_kind != "Convolution"
        ):
            features = bottoms[0]  # A dense layer may begin here.
            parts = parts if features == concatenated else [features]
        if features == before:  # They are no longer there to concatenate.
            features = f"what {entry.name} has overwritten"
            parts = [features] if parts == [before] else parts
        if entry.kind not in _PASSING:
            last_kind = entry.kind
    return True


def _check_axis(entry):
    if entry.parameters and (
        set(entry.parameters.integers(2) + entry.parameters.integers(1)) - {1}
    ):
        raise ValueError(f"{entry.name} does not concatenate channels.")


def describe(
    entries: Sequence[Entry], blue_first: bool
) -> tuple[Description, list[str]]:
    """What the file says of its net beside the weights, and what of it is new.

    Args:
      blue_first: whether the net reads blue, green, red.
    """
    tasks = {_TASKS[e.kind] for e in entries if e.kind in _TASKS}
    preprocessing, notes = _preprocessing(entries, blue_first)
    task = tasks.pop() if len(tasks) == 1 else None
    return Description(preprocessing, task=task), notes


def _preprocessing(entries, blue_first) -> tuple[dict | None, list[str]]:
    found = [e.transform for e in entries if e.transform]
    if not found:
        if not blue_first:
            return None, []
        return _IMAGENET, [
            "The file names no preprocessing: taken to be that of "
            "github.com/shicai/DenseNet-Caffe."
        ]
    transform = found[-1]
    if transform.texts(4):
        return None, [
            f"The net subtracts the image {transform.texts(4)[0]!r}, which is "
            "not in the file."
        ]
    mean = transform.floats(5) or [0.0]
    mean = mean * 3 if len(mean) == 1 else mean
    scale = (transform.floats(1) or [1.0])[-1]
    if not scale > 0 or not all(map(math.isfinite, (*mean, scale))):
        raise damaged(f"a scale of {scale} and a mean of {mean}")
    return {
        "mean": tuple(reversed(mean) if blue_first else mean),
        "std": (1 / scale,) * len(mean),
        "image_size": transform.integer(3, 0) or None,
        "resize_size": None,
    }, []
