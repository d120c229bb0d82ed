"""Recognising a DenseNet by the order and shapes of its layers alone."""

from collections.abc import Mapping
from typing import NamedTuple

from densenet_jax.models.geometry import Shape

_NORM = {"weight", "bias", "running_mean", "running_var"}


class _Module(NamedTuple):
    name: str
    kind: str  # 'conv', 'norm', 'linear', or 'end' after the last
    inputs: int = 0
    outputs: int = 0
    size: int = 0


class NoMatchError(ValueError):
    """The layers in their order are not those of a DenseNet."""


def match_structure(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Our path of each module of a PyTorch net that no table knows.

    The tensors have to be in the order in which the net uses them. Then the
    chain of channels leaves one reading: whether layers have bottlenecks is
    seen at the first layer; then a 1x1 convolution that is not the first half
    of a bottleneck is a transition.

    Args:
      shapes: name -> shape in PyTorch's layout, in the file's order.

    Raises:
      NoMatchError: the layers do not follow each other as in a DenseNet.
    """
    return _Reader(_modules(shapes)).read()


def _modules(shapes) -> list[_Module]:
    leaves = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, {})[leaf] = shape
    modules = []
    for name, found in leaves.items():
        weight = found.get("weight", ())
        if set(found) == {"weight"} and len(weight) == 4:
            outputs, inputs, height, width = weight
            if height != width:
                raise NoMatchError(f"{name} has a {height}x{width} kernel.")
            modules.append(_Module(name, "conv", inputs, outputs, height))
        elif set(found) == {"weight", "bias"} and len(weight) == 2:
            modules.append(_Module(name, "linear", weight[1], weight[0]))
        elif set(found) == _NORM and len(weight) == 1:
            modules.append(_Module(name, "norm", weight[0], weight[0]))
        else:
            raise NoMatchError(
                f"{name} is no convolution without bias, no batch "
                "normalisation and no linear layer."
            )
    return modules


class _Reader:
    """Reads the modules one by one, following the channels."""

    def __init__(self, modules):
        end = _Module("the end", "end")
        # The longest look ahead is three modules beyond the last.
        self._modules = [*modules, end, end, end, end]
        self._at = 0
        self._paths = {}

    def read(self):
        stem = self._peek()
        self._take("conv", stem.inputs, "conv0")
        channels = stem.outputs
        if self._peek(0).kind == self._peek(1).kind == "norm":
            self._take("norm", channels, "norm0")
        # Plain layers are a norm and a 3x3 conv.
        first_conv = self._peek(1)
        bottleneck = first_conv.size == 1
        growth = self._peek(3 if bottleneck else 1).outputs
        block, layer = 1, 1
        while self._peek(1).kind == "conv":
            conv = self._peek(1)
            if conv.size == 1 and not (bottleneck and self._peek(3).size == 3):
                self._take("norm", channels, f"transition{block}/norm")
                self._take("conv", channels, f"transition{block}/conv")
                channels = conv.outputs
                block, layer = block + 1, 1
                continue
            path = f"denseblock{block}/denselayer{layer}"
            self._take("norm", channels, f"{path}/norm1")
            self._take("conv", channels, f"{path}/conv1")
            if bottleneck:
                self._take("norm", first_conv.outputs, f"{path}/norm2")
                self._take("conv", first_conv.outputs, f"{path}/conv2")
            channels += growth
            layer += 1
        self._take("norm", channels, "norm5")
        if self._peek().kind == "linear":
            self._take("linear", channels, "classifier")
        if self._peek().kind != "end":
            raise NoMatchError(f"{self._peek().name} follows the last layer.")
        return self._paths

    def _peek(self, ahead=0):
        return self._modules[self._at + ahead]

    def _take(self, kind, channels, path):
        module = self._peek()
        if (module.kind, module.inputs) != (kind, channels):
            if module.kind == "end":
                raise NoMatchError(
                    f"The file ends where {path}, a {kind} that reads "
                    f"{channels} channels, was expected."
                )
            raise NoMatchError(
                f"{module.name} is a {module.kind} that reads "
                f"{module.inputs} channels; as {path}, a {kind} that reads "
                f"{channels} was expected."
            )
        self._paths[module.name] = path
        self._at += 1
