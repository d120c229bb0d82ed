"""Writes files like torch.save's without torch, good ones and bad ones."""

import struct
import zipfile
from typing import NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}


class Raw(bytes):
    """Pickle instructions that are written as they are."""


class Items(list):
    """(key, value) pairs of a dict in which a key may be twice."""


class Object(NamedTuple):
    """An instance of a class, as modules are saved."""

    kind: str  # module.name
    state: dict


class StateDict(NamedTuple):
    """An OrderedDict of tensors, and the names of modules kept beside them."""

    tensors: dict
    modules: list[str]


def call(module: str, name: str, *arguments) -> Raw:
    """The instructions that call module.name with arguments."""
    return Raw(_global(module, name) + _dump(arguments, []) + b"R")


def write(path, tree, *, edit=None, compress=(), archive="archive"):
    """Writes tree (dicts, lists, numbers, arrays, Raw) as torch.save does.

    Args:
      edit: called with the dict of zip entries before they are written.
      compress: endings of the names of entries to deflate.
    """
    storages = []
    program = b"\x80\x02" + _dump(tree, storages) + b"."
    entries = {
        "data.pkl": program,
        "byteorder": b"little",
        "version": b"3\n",
    }
    for key, storage in enumerate(storages):
        entries[f"data/{key}"] = storage.tobytes()
    if edit:
        edit(entries)
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            deflate = name.endswith(tuple(compress))
            kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
            file.writestr(f"{archive}/{name}", content, compress_type=kind)
    return path


def write_legacy(
    path, tree, *, storages=None, keys=None, counts=None, more=b""
):
    """Writes tree as torch.save did before PyTorch 1.6.

    Args:
      storages: that instructions in tree refer to, in place of those of the
        arrays in it.
      keys: the keys that are written, in place of the storages'.
      counts: key -> the count that is written, in place of the storage's.
      more: bytes at the end.
    """
    found = []
    program = _dump(tree, found)
    storages = found if storages is None else storages
    magic = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
    system = {"protocol_version": 1001, "little_endian": True}
    keys = [str(i) for i in range(len(storages))] if keys is None else keys
    pickles = [magic, _dump(1001, []), _dump(system, []), program]
    pickles.append(_dump(keys, []))
    content = b"".join(b"\x80\x02" + part + b"." for part in pickles)
    for i, storage in enumerate(storages):
        count = (counts or {}).get(str(i), storage.size)
        content += struct.pack("<q", count) + storage.tobytes()
    path.write_bytes(content + more)
    return path


def _global(module, name):
    return f"c{module}\n{name}\n".encode()


def _dump(value, storages):
    match value:
        case Raw():
            return bytes(value)
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case Object(kind, state):
            module, _, name = kind.rpartition(".")
            made = _global(module, name) + b")\x81"
            return made + _dump(state, storages) + b"b"
        case StateDict(tensors, modules):
            items = _dump(tensors, storages).removeprefix(b"}")
            names = {"_metadata": {name: {} for name in modules}}
            made = _global("collections", "OrderedDict") + b")R" + items
            return made + _dump(names, storages) + b"b"
        case tuple():
            return b"(" + b"".join(_dump(v, storages) for v in value) + b"t"
        case Items() | dict():
            items = value.items() if isinstance(value, dict) else value
            pairs = (_dump(k, storages) + _dump(v, storages) for k, v in items)
            return b"}(" + b"".join(pairs) + b"u"
        case list():
            return b"](" + b"".join(_dump(v, storages) for v in value) + b"e"
        case np.ndarray():
            return _dump_tensor(value, storages)
    raise TypeError(type(value))


def _dump_tensor(array, storages):
    array = np.ascontiguousarray(array)
    strides = tuple(s // array.itemsize for s in array.strides)
    return tensor(array, 0, array.shape, strides, storages)


def tensor(storage, offset, shape, strides, storages, *view):
    """The instructions for a view of a storage.

    Args:
      view: in the old format (key, offset, size) of a part of the storage, or
        None.
    """
    kind = Raw(_global("torch", _STORAGES[storage.dtype]))
    key = str(len(storages))
    storages.append(storage)
    persistent = ("storage", kind, key, "cpu", storage.size, *view)
    reference = Raw(_dump(persistent, []) + b"Q")
    hooks = call("collections", "OrderedDict")
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        reference,
        offset,
        shape,
        strides,
        False,
        hooks,
    )
