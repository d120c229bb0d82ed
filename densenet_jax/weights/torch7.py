"""DenseNets of Lua Torch (.t7), as the authors' code saves them.

github.com/liuzhuang13/DenseNet, models/densenet.lua: an nn.Sequential of
cudnn's or nn's layers. A dense layer is nn.Concat(2) of nn.Identity and an
nn.Sequential, or the class nn.DenseConnectLayerCustom.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from densenet_jax.runs.description import Description
from densenet_jax.weights.layer_sequence import (
    Layer,
    Recognised,
    recognise_layers,
)
from densenet_jax.weights.tensor_file import StoredTensor, TensorFile
from densenet_jax.weights.torch7_objects import Module, load

_CONVOLUTIONS = ("SpatialConvolution", "SpatialConvolutionMM")
_NORMS = ("SpatialBatchNormalization",)
_AFFINE = ("weight", "bias")
_POOLS = {
    "SpatialMaxPooling": "max_pool",
    "SpatialAveragePooling": "average_pool",
}
# What changes no value, or only the logits' scale after the last layer.
_PASSING = ("Identity", "Reshape", "View", "JoinTable", "Contiguous", "Copy")
_SOFTMAX = ("SoftMax", "LogSoftMax")

# What the authors' data sets subtract and divide by, in their
# datasets/{imagenet,cifar10,cifar100}.lua, as mean and std of 0 ... 255.
_IMAGENET = {
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
    "image_size": 224,
    "resize_size": 256,
}
_CIFAR = {
    10: {"mean": (125.3, 123.0, 113.9), "std": (63.0, 62.1, 66.7)},
    100: {"mean": (129.3, 124.1, 112.4), "std": (68.2, 65.4, 70.4)},
}


def read(path: str | Path) -> TensorFile:
    """Reads the DenseNet in a .t7 file. Nothing in it is executed.

    Raises:
      ValueError: the file is damaged, or holds no DenseNet.
    """
    net, remarks = _net(load(path))
    net = recognise_layers(list(_layers(net, "net", set())))
    description, changes = _description(net)
    return TensorFile(
        net.tensors,
        "t7",
        (*remarks, *net.remarks),
        (*net.changes, *changes),
        attributes=net.attributes,
        description=description,
    )


def _net(value) -> tuple[Module, list[str]]:
    """The net itself, or the one in a table of a training script."""
    if isinstance(value, Module):
        return value, []
    fields = value if isinstance(value, dict) else {}
    nets = [k for k, v in fields.items() if isinstance(v, Module)]
    if len(nets) != 1:
        raise ValueError(
            "The .t7 file holds no net, or several: expected an nn.Sequential, "
            "or a table with one in it; found "
            f"{', '.join(map(_short, [*fields][:20])) or type(value).__name__}."
        )
    return fields[nets[0]], [f"The net is under the key {_short(nets[0])}."]


def _short(key) -> str:
    return repr(key)[:60]


def _layers(module, path, seen) -> Iterator[Layer]:
    """The layers in the order in which they run.

    Args:
      path: of the module in the net, for names.
      seen: ids of the modules before that have tensors or modules: a net that
        uses one of them twice is none here.
    """
    if not isinstance(module, Module):
        raise ValueError(f"{path} is no module, but {type(module).__name__}.")
    if id(module.fields) in seen:
        raise ValueError(f"{path} is used twice in the net.")
    if not module.fields.keys().isdisjoint(("weight", "modules")):
        seen.add(id(module.fields))
    package, _, kind = module.name.rpartition(".")
    name = f"{path}:{kind}"
    if package not in ("nn", "cudnn"):
        kind = ""
    if kind == "Sequential":
        for i, child in _children(module, path):
            yield from _layers(child, f"{path}/{i}", seen)
    elif kind == "DataParallelTable":
        for _, net in _children(module, path)[:1]:  # The rest are copies.
            yield from _layers(net, path, seen)
    elif kind == "Concat":
        yield from _concat(module, path, seen)
        yield Layer(name, "concat")
    elif kind == "DenseConnectLayerCustom":
        for i, child in _children(module, path):
            yield from _layers(child, f"{path}/{i}", seen)
        yield Layer(name, "concat")
    elif kind in _CONVOLUTIONS:
        yield _convolution(module, name)
    elif kind in _NORMS:
        yield _norm(module, name)
    elif kind == "ReLU":
        yield Layer(name, "relu")
    elif kind in _POOLS:
        yield _pool(module, name, _POOLS[kind])
    elif kind == "Linear":
        leaves = {leaf: _tensor(module, leaf, name) for leaf in _AFFINE}
        yield Layer(name, "linear", leaves)
    elif kind == "Dropout" and module.fields.get("v2") is not True:
        raise ValueError(
            f"{name} scales in evaluation, as the first version of nn.Dropout: "
            "that is not read."
        )
    elif kind not in (*_PASSING, *_SOFTMAX, "Dropout"):
        raise ValueError(
            f"{path} is a {_short(module.name)}, which a DenseNet does not "
            "have."
        )


def _children(module, path) -> list[tuple[int, object]]:
    children = module.fields.get("modules")
    if not isinstance(children, dict) or any(
        i not in children for i in range(1, len(children) + 1)
    ):
        raise ValueError(f"{path} has no list of modules.")
    return [(i, children[i]) for i in range(1, len(children) + 1)]


def _concat(module, path, seen) -> Iterator[Layer]:
    """The layers of the second branch; the first is the input itself."""
    children = [child for _, child in _children(module, path)]
    names = [_short(getattr(child, "name", None)) for child in children[:4]]
    dimension = _whole(module, "dimension")
    if len(children) != 2 or names[0] != "'nn.Identity'" or dimension != 2:
        raise ValueError(
            f"{path} concatenates {', '.join(names)} on axis {dimension}: a "
            "dense layer concatenates nn.Identity and what it adds on axis 2."
        )
    yield from _layers(children[1], f"{path}/2", seen)


def _convolution(module, name) -> Layer:
    weight = _tensor(module, "weight", name)
    window = _window(module, name)
    if _whole(module, "groups", 1) != 1:
        raise ValueError(f"{name} is a grouped convolution.")
    if len(weight.shape) == 2:  # [out, in * height * width]
        outputs, flat = weight.shape
        shape = (outputs, flat // window[0] ** 2, window[0], window[0])
        if flat % window[0] ** 2:
            raise ValueError(f"{name}'s weights are {list(weight.shape)}.")
        values = weight.read
        weight = StoredTensor(
            shape, weight.dtype, lambda: values().reshape(shape)
        )
    bias = module.fields.get("bias")
    if isinstance(bias, np.ndarray) and bias.any():
        raise ValueError(
            f"{name} adds a bias; the convolutions of a DenseNet here do not."
        )
    return Layer(name, "conv", {"weight": weight}, window)


def _norm(module, name) -> Layer:
    epsilon = module.fields.get("eps", 1e-5)
    if not isinstance(epsilon, int | float) or not epsilon > 0:
        raise ValueError(f"{name}'s eps is {epsilon!r}.")
    if "running_std" in module.fields:  # 1 / sqrt(variance + eps), to 2015
        stored = _tensor(module, "running_std", name)
        variance = StoredTensor(
            stored.shape,
            stored.dtype,
            lambda: _variance(stored.read(), epsilon),
        )
    else:
        variance = _tensor(module, "running_var", name)
    leaves = {leaf: _tensor(module, leaf, name) for leaf in _AFFINE}
    leaves["running_mean"] = _tensor(module, "running_mean", name)
    leaves["running_var"] = variance
    return Layer(name, "norm", leaves, epsilon=float(epsilon))


def _variance(inverse_std, epsilon) -> np.ndarray:
    with np.errstate(all="ignore"):
        return inverse_std ** inverse_std.dtype.type(-2) - epsilon


def _tensor(module, field, name) -> StoredTensor:
    value = module.fields.get(field)
    if not isinstance(value, np.ndarray):
        raise ValueError(
            f"{name} has no {field}, but {type(value).__name__}: expected a "
            "tensor."
        )
    return StoredTensor(value.shape, value.dtype, lambda: value)


def _pool(module, name, kind) -> Layer:
    # nn's averages were sums before it had this field.
    if module.name == "nn.SpatialAveragePooling" and (
        module.fields.get("divide") is not True
    ):
        raise ValueError(f"{name} sums its window, where a DenseNet averages.")
    rounds_up = module.fields.get("ceil_mode") is True
    return Layer(name, kind, window=_window(module, name), rounds_up=rounds_up)


def _window(module, name) -> tuple[int, int, int]:
    """Size, stride and padding of a square window."""
    window = []
    for key, default in (("k", None), ("d", 1), ("pad", 0)):
        width, height = (_whole(module, f"{key}{x}", default) for x in "WH")
        if width != height or width is None:
            raise ValueError(f"{name} has no square window ({key}W, {key}H).")
        window.append(width)
    size, stride, padding = window
    if not size:
        raise ValueError(f"{name} has a window of size 0.")
    # One field for both axes, to 2015, which counts.
    return size, stride, _whole(module, "padding", padding)


def _whole(module, field, default=None) -> int | None:
    """A field that is a number of pixels or the like; `default` if absent."""
    value = module.fields.get(field)
    if value is None:
        return default
    if not isinstance(value, int) or not 0 <= value < 1000:
        raise ValueError(
            f"The {field} of a {_short(module.name)} is not a whole number "
            "below 1000."
        )
    return value


def _description(net: Recognised) -> tuple[Description, list[str]]:
    """The preprocessing of the authors' code, which the file leaves out."""
    classes = net.attributes["num_classes"]
    if net.attributes["stem"] == "imagenet":
        preprocessing, data = _IMAGENET, "ImageNet"
    elif classes in _CIFAR:
        preprocessing, data = _CIFAR[classes], f"CIFAR-{classes}"
    else:
        return Description(), []
    return Description(preprocessing=preprocessing), [
        "The file names no preprocessing: taken to be that of the authors' "
        f"code for {data}."
    ]
