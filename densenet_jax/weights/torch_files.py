"""The two formats of torch.save: a zip file, and the one before PyTorch 1.6.

Both are memory-mapped: the values of a tensor are read from disk when they are
used.
"""

import functools
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from densenet_jax.weights.torch_objects import Storage
from densenet_jax.weights.torch_pickle import Interpreter

# What a file in the old format begins with: a number, pickled.
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_LEGACY_PROTOCOL = 1001


def load_zip(path: str | Path) -> tuple[Any, list[str]]:
    """Reads what torch.save has written since PyTorch 1.6.

    Returns:
      Nested dicts, lists, numbers, `Tensor`s and `Placeholder`s; and remarks.

    Raises:
      ValueError: the file is truncated, damaged or contradicts itself.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    return _Archive(path, entries).load()


class _Archive:
    """The entries of one zip file, memory-mapped."""

    def __init__(self, path, entries):
        self._bytes = np.memmap(path, mode="r", dtype=np.uint8)
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) < len(entries):
            raise ValueError("The zip file holds two entries of one name.")
        pickles = [
            name
            for name in self._entries
            if name == "data.pkl" or name.endswith("/data.pkl")
        ]
        if len(pickles) != 1:
            raise ValueError(
                "The zip file was not written by torch.save: it holds "
                f"{len(pickles)} entries */data.pkl, expected 1."
            )
        self._root = pickles[0].removesuffix("data.pkl")
        # torch.serialization.set_crc32_options(False) writes zeros.
        self._checks = any(entry.CRC for entry in entries)
        self._checked = {}

    def load(self):
        if self._root + "constants.pkl" in self._entries:
            raise ValueError(
                "The file is a TorchScript program. Save its tensors alone: "
                "torch.save(torch.jit.load(OLD).state_dict(), NEW)."
            )
        byteorder = self._root + "byteorder"
        if byteorder in self._entries:
            found = self.read(byteorder).tobytes()
            if found != b"little":
                raise ValueError(
                    f"The file's byte order is {found[:16]!r}: only b'little' "
                    "is read."
                )
        program = self.read(self._root + "data.pkl").tobytes()
        remarks = [] if self._checks else ["The file has no checksums."]
        return Interpreter(self._storage).run(program), remarks

    def read(self, name):
        """The bytes of an entry, a view of the file."""
        if name not in self._checked:
            content = self._bytes[self._place(name)]
            expected = self._entries[name].CRC
            if self._checks and zlib.crc32(content) != expected:
                raise ValueError(
                    f"Entry {name!r} is damaged: its checksum does not fit. "
                    "Copy or download the file again."
                )
            self._checked[name] = content
        return self._checked[name]

    def _place(self, name):
        """Where the bytes of an entry lie."""
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"The zip file has no entry {name!r}.")
        if entry.flag_bits & 1:
            raise ValueError(f"Entry {name!r} is encrypted.")
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.compress_size != entry.file_size
        ):
            raise ValueError(
                f"Entry {name!r} is compressed ({entry.compress_size} bytes "
                f"that claim to be {entry.file_size}). torch.save compresses "
                "nothing: the file was packed by something else. Unpacked, it "
                "could fill the memory."
            )
        start, header = entry.header_offset, 30
        lengths = self._bytes[start + 26 : start + header].tobytes()
        if len(lengths) < 4:
            raise ValueError(f"Entry {name!r} lies outside the file.")
        start += header + sum(struct.unpack("<HH", lengths))
        if start + entry.file_size > self._bytes.size:
            raise ValueError(
                f"Entry {name!r} claims {entry.file_size} bytes, more than "
                "the file has left."
            )
        return slice(start, start + entry.file_size)

    def _storage(self, dtype, key, count, view):
        if view is not None:
            raise TypeError
        name = f"{self._root}data/{key}"
        place = self._place(name)
        size = place.stop - place.start
        if size != count * dtype.itemsize:
            raise ValueError(
                f"Storage {key!r} has {size} bytes, but {count} values of "
                f"{dtype} were declared."
            )
        return Storage(dtype, count, lambda: self.read(name).view(dtype))


def load_legacy(path: str | Path) -> tuple[Any, list[str]]:
    """Reads what torch.save wrote before PyTorch 1.6.

    Five pickles: a magic number, the protocol, the system, the object, and the
    keys of its storages. Then for each key the number of its values as int64,
    and the values. There are no checksums.

    Returns and raises: as `load_zip`.
    """
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream,
    ):
        stream.seek(len(LEGACY_MAGIC))
        protocol = _plain(stream)
        if protocol != _LEGACY_PROTOCOL:
            raise ValueError(
                f"The file's protocol is {protocol!r:.40}: expected "
                f"{_LEGACY_PROTOCOL}."
            )
        system = _plain(stream)
        if not isinstance(system, dict) or not system.get("little_endian"):
            raise ValueError("The file's byte order is not little-endian.")
        storages = _Storages(path)
        tree = Interpreter(storages.declare).run(stream)
        storages.find(_plain(stream), stream.tell())
    return tree, []


def _plain(stream):
    """What a pickle without tensors holds."""
    return Interpreter(_no_storage).run(stream)


def _no_storage(*_):
    raise ValueError("The file is damaged: there is a tensor in its header.")


class _Storages:
    """The values behind the pickles of a file in the old format."""

    def __init__(self, path):
        self._bytes = np.memmap(path, mode="r", dtype=np.uint8)
        self._declared = {}
        self._starts = {}

    def declare(self, dtype, key, count, view):
        """A storage whose place in the file will be known later."""
        if self._declared.setdefault(key, (dtype, count)) != (dtype, count):
            raise ValueError(f"Storage {key!r:.80} is declared in two ways.")
        storage = Storage(dtype, count, functools.partial(self._read, key))
        if view is None:
            return storage
        _, offset, size = view
        return storage.part(offset, size)

    def find(self, keys, position):
        """Follows the blobs from a position to the end of the file."""
        if (
            not isinstance(keys, list)
            or not all(isinstance(key, str) for key in keys)
            or sorted(keys) != sorted(self._declared)
        ):
            raise ValueError(
                "The file is damaged: its storages are not those that its "
                "tensors name."
            )
        for key in keys:
            dtype, count = self._declared[key]
            head = self._bytes[position : position + 8].tobytes()
            end = position + 8 + count * dtype.itemsize
            if len(head) < 8 or end > self._bytes.size:
                raise ValueError(
                    f"The file is truncated: it has {self._bytes.size:,} "
                    f"bytes, storage {key!r:.80} ends at {end:,}."
                )
            found = int.from_bytes(head, "little", signed=True)
            if found != count:
                raise ValueError(
                    f"Storage {key!r:.80} has {found} values, but {count} were "
                    "declared."
                )
            self._starts[key] = position + 8
            position = end
        if position != self._bytes.size:
            raise ValueError(
                f"The file is damaged: {self._bytes.size - position:,} bytes "
                "follow its last storage."
            )

    def _read(self, key):
        dtype, count = self._declared[key]
        start = self._starts[key]
        return self._bytes[start : start + count * dtype.itemsize].view(dtype)
