"""The arithmetic of a DenseNet: its layers in order, channels and sizes.

`walk` is the one place that counts channels; tensor shapes, summaries, folding,
feature reuse, file layouts and size checks read it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from densenet_jax.models.options import NetAttributes

Shape = tuple[int, ...]

STATISTICS = ("mean", "var")


class Block(NamedTuple):
    """A dense block and who reads the whole of it.

    Attributes:
      name: 'denseblock1', ...
      inputs: channels of x_0.
      growth_rates: channels that each layer adds.
      reader: the path of the transition's convolution, or 'classifier'.
      compressed: channels after the transition; None after the last block.
    """

    name: str
    inputs: int
    growth_rates: tuple[int, ...]
    reader: str
    compressed: int | None

    @property
    def reader_norm(self) -> str:
        """The path of the norm in front of the reader."""
        if self.reader == "classifier":
            return "norm5"
        return self.reader.removesuffix("conv") + "norm"


class Operation(NamedTuple):
    """One operation of a net.

    Attributes:
      path: in the parameter tree; of an operation without parameters, what
        would be its path.
      kind: 'conv', 'norm', 'linear', 'max_pool', 'average_pool', 'blur_pool' or
        'mean' (over height and width).
      inputs, outputs: channels.
      size, stride, padding: of the window. Where the stem pads as TensorFlow's
        'same', outputs have the same size.
      folds_into: of a norm, the path of the convolution that it alone reads.
    """

    path: str
    kind: str
    inputs: int
    outputs: int
    size: int = 1
    stride: int = 1
    padding: int = 0
    folds_into: str | None = None

    @property
    def stage(self) -> str:
        """'stem', 'denseblock1', 'transition1', ..., 'head'."""
        first, _, rest = self.path.partition("/")
        if rest:
            return first
        return "head" if first in ("norm5", "pool5", "classifier") else "stem"

    def output_size(self, size: int) -> int:
        """Pixels of the output's height or width for those of the input."""
        if self.kind == "mean":
            return 1
        if self.kind == "blur_pool" and size < 2:
            return 0  # There is nothing to mirror.
        return (size + 2 * self.padding - self.size) // self.stride + 1


def growth_rates(
    block_layers: Sequence[int], growth_rate: int | Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """The growth rate of each layer of each block.

    Args:
      block_layers: the number of layers of each block.
      growth_rate: one number, one a block, or one a layer.

    Raises:
      ValueError: not integers, or another number of them.
    """
    total = sum(block_layers)
    expected = (
        f"expected one number, {len(block_layers)} (one a block) or {total} "
        "(one a layer)"
    )
    rates = (
        tuple(growth_rate)
        if isinstance(growth_rate, (tuple, list))
        else (growth_rate,) * total
    )
    if not all(isinstance(rate, (int, np.integer)) for rate in rates):
        raise ValueError(f"growth_rate is {growth_rate!r}: {expected}.")
    if len(rates) == len(block_layers):
        return tuple((k,) * n for k, n in zip(rates, block_layers))
    if len(rates) != total:
        raise ValueError(
            f"growth_rate {tuple(rates)} has {len(rates)} values: {expected}."
        )
    ends = np.cumsum(block_layers)
    return tuple(rates[end - n : end] for end, n in zip(ends, block_layers))


def compressed(channels: int, compression: float) -> int:
    """Channels after a transition: floor(theta m) (paper, "Compression")."""
    # 0.29 * 100 is 28.999999999999996 in binary and 29 on paper.
    kept = math.floor(round(channels * compression, 6))
    if not kept:
        raise ValueError(
            f"compression {compression} leaves none of {channels} channels: "
            f"must be at least 1/{channels}."
        )
    return kept


def stem_widths(model: "NetAttributes") -> tuple[int, ...]:
    """The channels that each convolution of a model's stem makes."""
    given = model.stem_features
    if isinstance(given, (tuple, list)):
        return tuple(given)
    first = growth_rates(model.block_layers, model.growth_rate)[0][0]
    widths = (first, first, 2 * first if given is None else given)
    return widths if model.stem == "deep" else widths[-1:]


def blocks(model: "NetAttributes") -> list[Block]:
    """The dense blocks of a model, with their channels."""
    rates = growth_rates(model.block_layers, model.growth_rate)
    channels = stem_widths(model)[-1]
    found = []
    for i, block_rates in enumerate(rates, 1):
        name, reader, reduced = f"denseblock{i}", "classifier", None
        if i < len(rates):
            reader = f"transition{i}/conv"
            outputs = channels + sum(block_rates)
            reduced = compressed(outputs, model.compression)
        found.append(Block(name, channels, block_rates, reader, reduced))
        channels = reduced
    return found


def walk(model: "NetAttributes", in_channels: int = 3) -> Iterator[Operation]:
    """The operations of a model, in the order in which they run.

    ReLUs, dropout and concatenations are left out: they change no shape that a
    norm, convolution or pool does not.

    Args:
      in_channels: of the images.
    """
    yield from stem(model, in_channels)
    for block in blocks(model):
        channels = block.inputs
        for i, growth_rate in enumerate(block.growth_rates, 1):
            path = f"{block.name}/denselayer{i}"
            yield from _dense_layer(model, path, channels, growth_rate)
            channels += growth_rate
        if block.compressed is not None:
            yield Operation(block.reader_norm, "norm", channels, channels)
            reduced = block.compressed
            yield Operation(block.reader, "conv", channels, reduced)
            path = block.reader.replace("conv", "pool")
            if model.blur_pool == "all":
                yield Operation(path, "blur_pool", reduced, reduced, 3, 2, 1)
            else:
                yield Operation(path, "average_pool", reduced, reduced, 2, 2)
    yield Operation("norm5", "norm", channels, channels)
    yield Operation("pool5", "mean", channels, channels)
    yield Operation("classifier", "linear", channels, model.num_classes)


def stem(model: "NetAttributes", in_channels: int = 3) -> Iterator[Operation]:
    """The operations of a model's stem, as in `walk`."""
    size = 7 if model.stem == "imagenet" else 3
    stride, channels = stem_stride(model), in_channels
    for i, width in enumerate(stem_widths(model)):
        conv, padding = f"conv{i}", size // 2
        yield Operation(conv, "conv", channels, width, size, stride, padding)
        if model.stem_norm:
            yield Operation(f"norm{i}", "norm", width, width, folds_into=conv)
        stride, channels = 1, width
    if not has_stem_pool(model):
        return
    blurs = model.blur_pool != "none"
    stride = 1 if blurs else 2
    yield Operation("pool0", "max_pool", channels, channels, 3, stride, 1)
    if blurs:
        yield Operation("blur0", "blur_pool", channels, channels, 3, 2, 1)


def stem_stride(model: "NetAttributes") -> int:
    """The stride of the stem's first convolution."""
    return model.stem_stride or (1 if model.stem == "cifar" else 2)


def has_stem_pool(model: "NetAttributes") -> bool:
    """Whether the stem ends in a max pool."""
    if model.stem_pool is None:
        return model.stem != "cifar"
    return model.stem_pool


def _dense_layer(model, path, channels, growth_rate) -> Iterator[Operation]:
    yield Operation(f"{path}/norm1", "norm", channels, channels)
    last = "conv1"
    if model.bottleneck_width:
        width = model.bottleneck_width * growth_rate
        conv = f"{path}/conv1"
        yield Operation(conv, "conv", channels, width)
        yield Operation(f"{path}/norm2", "norm", width, width, folds_into=conv)
        channels, last = width, "conv2"
    yield Operation(f"{path}/{last}", "conv", channels, growth_rate, 3, 1, 1)
    if model.squeeze_excite:
        width = squeezed(growth_rate, model.squeeze_excite)
        yield Operation(f"{path}/se/squeeze", "linear", growth_rate, width)
        yield Operation(f"{path}/se/excite", "linear", width, growth_rate)


def squeezed(channels: int, reduction: int) -> int:
    """Channels between the two layers of squeeze-and-excitation."""
    return max(1, channels // reduction)


def tensor_shapes(model: "NetAttributes", in_channels: int) -> dict[str, Shape]:
    """The shape of every parameter and statistic of a model, by path.

    The same as tracing `model.init`, which takes seconds for a deep net.
    """
    shapes = {}
    for operation in walk(model, in_channels):
        for leaf, shape in leaf_shapes(model, operation).items():
            shapes[f"{operation.path}/{leaf}"] = shape
    return shapes


def leaf_shapes(
    model: "NetAttributes", operation: Operation
) -> dict[str, Shape]:
    """The shapes of an operation's parameters and statistics, by leaf."""
    _, kind, inputs, outputs, size, *_ = operation
    if kind == "conv":
        return {"kernel": (size, size, inputs, outputs)}
    if kind == "linear":
        return {"kernel": (inputs, outputs), "bias": (outputs,)}
    if kind != "norm":
        return {}
    if model.folded and operation.folds_into:
        return {"bias": (outputs,)}
    statistics = STATISTICS if model.norm == "batch" else ()
    return dict.fromkeys(("scale", "bias", *statistics), (outputs,))


def output_size(model: "NetAttributes", size: int) -> int:
    """Pixels of the last feature map's height or width; below 1: none."""
    for operation in walk(model):
        if operation.kind == "mean":
            break
        size = operation.output_size(size)
    return size


def min_image_size(model: "NetAttributes") -> int:
    """The smallest height or width that leaves a pixel to the last block."""
    size = 1
    while output_size(model, size) < 1:
        size += 1
    return size
