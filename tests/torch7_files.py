"""Writes .t7 files as Lua Torch does, good ones and bad ones.

The format is that of torch7's File.lua and generic/{Tensor,Storage}.c; the nets
are those of the authors' models/densenet.lua and models/DenseConnectLayer.lua.
"""

import itertools
import struct
from typing import Any, NamedTuple

import numpy as np

_KINDS = {
    np.dtype(np.float32): "Float",
    np.dtype(np.float64): "Double",
    np.dtype(np.float16): "Half",
    np.dtype(np.int64): "Long",
}


class Object(NamedTuple):
    """An object of a Lua class."""

    name: str
    fields: dict[str, Any]


class View(NamedTuple):
    """A tensor in a storage that others share."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: str | None = None  # 'Cuda' for 'torch.CudaTensor'


class Function(NamedTuple):
    """A Lua function with one upvalue."""

    code: bytes
    upvalue: Any


def write(path, value):
    """Writes a value: None, bool, number, str, dict, list, array or the above.

    What is there twice is written once, and then by its number.
    """
    path.write_bytes(_Writer().dump(value))
    return path


class _Writer:
    def __init__(self):
        self._indices = {}
        self._kept = []  # So that no two objects have one id.
        self._numbers = itertools.count(1)

    def dump(self, value) -> bytes:
        match value:
            case None:
                return _int(0)
            case bool():
                return _int(5) + _int(value)
            case int() | float():
                return _int(1) + struct.pack("<d", value)
            case str():
                return _int(2) + _text(value.encode())
            case Object():
                return self._indexed(4, value.fields, self._object, value)
            case dict():
                return self._indexed(3, value, self._table, value)
            case list():
                numbered = dict(enumerate(value, 1))
                return self._indexed(3, value, self._table, numbered)
            case np.ndarray():
                array = np.ascontiguousarray(value)
                strides = tuple(s // array.itemsize for s in array.strides)
                view = View(array, 0, array.shape, strides)
                return self._indexed(4, value, self._tensor, view)
            case View():
                return self._indexed(4, value, self._tensor, value)
            case Function():
                return self._indexed(8, value, self._function, value)
        raise TypeError(type(value))

    def _indexed(self, tag, identity, content, value):
        # A tensor and its storage can be one array.
        key = id(identity), content.__name__
        if key in self._indices:
            return _int(tag) + _int(self._indices[key])
        index = self._indices[key] = next(self._numbers)
        self._kept.append(identity)
        return _int(tag) + _int(index) + content(value)

    def _object(self, value):
        return _class(value.name) + self.dump({**value.fields})

    def _table(self, value):
        items = itertools.chain.from_iterable(value.items())
        return _int(len(value)) + b"".join(map(self.dump, items))

    def _function(self, value):
        upvalues = [{"name": "x", "value": value.upvalue}]
        return _text(value.code) + self.dump(upvalues)

    def _tensor(self, view):
        kind = view.kind or _KINDS[view.storage.dtype]
        longs = (*view.shape, *view.strides, view.offset + 1)
        return (
            _class(f"torch.{kind}Tensor")
            + _int(len(view.shape))
            + struct.pack(f"<{len(longs)}q", *longs)
            + self._indexed(
                4, view.storage, self._storage, (kind, view.storage)
            )
        )

    def _storage(self, value):
        kind, array = value
        return (
            _class(f"torch.{kind}Storage")
            + struct.pack("<q", array.size)
            + array.tobytes()
        )


def _int(value):
    return struct.pack("<i", value)


def _text(raw):
    return _int(len(raw)) + raw


def _class(name):
    return _text(b"V 1") + _text(name.encode())


def net(state, block_layers, *, custom=False, package="cudnn", size=7):
    """The authors' net with the weights of a state dict in torchvision's names.

    Args:
      custom: dense layers of the class of -optMemory 3.
      size: of the last map.
    """
    state = {k.removeprefix("features."): v for k, v in state.items()}

    def module(kind, owner=package, **fields):
        common = {"_type": "torch.FloatTensor", "train": False}
        return Object(f"{owner}.{kind}", {**common, **fields})

    def conv(name, size, stride=1, padding=0):
        weight = state[f"{name}.weight"]
        return module(
            "SpatialConvolution",
            nInputPlane=weight.shape[1],
            nOutputPlane=weight.shape[0],
            **_window(size, stride, padding),
            groups=1,
            weight=weight,
            gradWeight=np.zeros_like(weight),
        )

    def norm(name):
        return [
            module(
                "SpatialBatchNormalization",
                eps=1e-5,
                momentum=0.1,
                affine=True,
                weight=state[f"{name}.weight"],
                bias=state[f"{name}.bias"],
                running_mean=state[f"{name}.running_mean"],
                running_var=state[f"{name}.running_var"],
            ),
            module("ReLU", inplace=True),
        ]

    def sequential(children):
        return module("Sequential", "nn", modules=children)

    def dense_layer(name):
        first = norm(f"{name}.norm1")
        if f"{name}.conv2.weight" in state:
            second = [
                conv(f"{name}.conv1", 1),
                *norm(f"{name}.norm2"),
                conv(f"{name}.conv2", 3, padding=1),
            ]
        else:
            second = [conv(f"{name}.conv1", 3, padding=1)]
        if custom:
            nets = [sequential(first), sequential(second)]
            return module(
                "DenseConnectLayerCustom",
                "nn",
                net1=nets[0],
                net2=nets[1],
                modules=nets,
            )
        branches = [
            module("Identity", "nn"),
            sequential([*first, *second, module("Dropout", "nn", v2=True)]),
        ]
        concat = module("Concat", "nn", dimension=2, modules=branches)
        return sequential([concat])

    def pool(kind, owner=package, **window):
        return module(
            f"Spatial{kind}Pooling",
            owner,
            **_window(**window),
            ceil_mode=False,
            divide=True,
        )

    if state["conv0.weight"].shape[-1] == 7:
        children = [
            conv("conv0", 7, 2, 3),
            *norm("norm0"),
            pool("Max", "nn", size=3, stride=2, padding=1),
        ]
    else:
        children = [conv("conv0", 3, padding=1)]
    for block, num_layers in enumerate(block_layers, 1):
        for layer in range(1, num_layers + 1):
            children.append(dense_layer(f"denseblock{block}.denselayer{layer}"))
        if custom:
            children.append(module("JoinTable", "nn", dimension=2))
        if block < len(block_layers):
            children += norm(f"transition{block}.norm")
            children.append(conv(f"transition{block}.conv", 1))
            children.append(pool("Average", size=2, stride=2))
    children += [
        *norm("norm5"),
        pool("Average", size=size, stride=size),
        module("Reshape", "nn", nelement=state["norm5.weight"].size),
        module(
            "Linear",
            "nn",
            weight=state["classifier.weight"],
            bias=state["classifier.bias"],
        ),
    ]
    return sequential(children)


def _window(size, stride=1, padding=0):
    values = {"k": size, "d": stride, "pad": padding}
    return {f"{k}{axis}": v for k, v in values.items() for axis in "WH"}
