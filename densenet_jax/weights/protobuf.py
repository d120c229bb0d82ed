"""Protocol buffers without their schema: fields by number.

Only what files of weights need: every length is checked against the file, and
nothing is copied but what is asked for.
"""

import struct
from pathlib import Path

import numpy as np

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# A net has some ten fields a layer.
_MOST_FIELDS = 1_000_000
_LONGEST_TEXT = 1000


def open_message(path: str | Path) -> "Message":
    """The message that a file is, memory-mapped.

    Raises:
      ValueError: the file is no such message.
    """
    content = np.memmap(path, mode="r", dtype=np.uint8)
    return Message(content, 0, content.size, [_MOST_FIELDS])


class Message:
    """The fields of a message, by their numbers.

    Args:
      content: the file's bytes.
      start, end: of the message in it.
      budget: how many more fields may be read, in all messages of the file.

    Raises:
      ValueError: on construction, for what is no message.
    """

    def __init__(self, content, start: int, end: int, budget: list[int]):
        self._content = content
        self._bytes = memoryview(content)
        self._budget = budget
        # Number -> numbers, and the (start, end) of what has a length.
        self._fields = {}
        while start < end:
            start = self._read_field(start, end)

    def messages(self, number: int) -> list["Message"]:
        """A field that holds messages."""
        return [
            Message(self._content, *extent, self._budget)
            for extent in self._extents(number)
        ]

    def message(self, number: int) -> "Message | None":
        """A field that holds one message; None where it is absent."""
        found = self.messages(number)
        if len(found) > 1:
            raise damaged(f"field {number} is there {len(found)} times")
        return found[0] if found else None

    def texts(self, number: int) -> list[str]:
        """A field that holds names."""
        texts = []
        for start, end in self._extents(number):
            if end - start > _LONGEST_TEXT:
                raise damaged(f"a name of {end - start:,} bytes")
            text = bytes(self._bytes[start:end]).decode("utf-8", "replace")
            if not text.isprintable():
                raise damaged(f"the name {text[:60]!r}")
            texts.append(text)
        return texts

    def integers(self, number: int) -> list[int]:
        """A field that holds numbers, packed or one by one."""
        integers = []
        for value in self._fields.get(number, ()):
            if isinstance(value, tuple):
                at, end = value
                while at < end:
                    self._spend()
                    packed, at = self._varint(at, end)
                    integers.append(packed)
            elif isinstance(value, int):
                integers.append(value)
            else:
                raise damaged(f"field {number} is no integer")
        return integers

    def integer(self, number: int, default: int | None = None) -> int | None:
        """A field that holds a number."""
        found = self.integers(number)
        return found[-1] if found else default

    def floats(self, number: int) -> list[float]:
        """A field that holds a few numbers of 32 bits, packed or not."""
        floats = []
        for value in self._fields.get(number, ()):
            if isinstance(value, bytes) and len(value) == 4:
                floats.append(struct.unpack("<f", value)[0])
            elif isinstance(value, tuple) and value[1] - value[0] <= 64:
                raw = bytes(self._bytes[slice(*value)])
                floats += [x for (x,) in struct.iter_unpack("<f", _whole(raw))]
            else:
                raise damaged(f"field {number} is no float")
        return floats

    def array(self, number: int, dtype: str) -> np.ndarray | None:
        """A field that holds many packed numbers, as a view of the file."""
        extents = self._extents(number)
        if not extents:
            return None
        start, end = extents[0]
        count, rest = divmod(end - start, np.dtype(dtype).itemsize)
        if rest or len(extents) > 1:
            raise damaged(f"field {number} is no array of {dtype}")
        if not count:
            return np.empty(0, dtype)
        return np.frombuffer(self._content, dtype, count, start)

    def _extents(self, number):
        extents = self._fields.get(number, [])
        if not all(isinstance(extent, tuple) for extent in extents):
            raise damaged(f"field {number} has no length")
        return extents

    def _read_field(self, at, end) -> int:
        """Reads a field; returns where it ends."""
        self._spend()
        tag, at = self._varint(at, end)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = self._varint(at, end)
        elif wire == _BYTES:
            length, at = self._varint(at, end)
            value = (at, at + length)
            at += length
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
            value = bytes(self._bytes[at : at + length])
            at += length
        else:
            raise damaged(f"a field of the unknown kind {wire}")
        if at > end or not number:
            raise damaged(f"field {number} ends beyond its message")
        self._fields.setdefault(number, []).append(value)
        return at

    def _varint(self, at, end) -> tuple[int, int]:
        """A number of seven bits a byte, and where it ends."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._bytes[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
        raise damaged("a number without an end")

    def _spend(self):
        self._budget[0] -= 1
        if self._budget[0] < 0:
            raise damaged(f"more than {_MOST_FIELDS:,} fields")


def _whole(raw: bytes) -> bytes:
    if len(raw) % 4:
        raise damaged("a list of floats with a part of one")
    return raw


def damaged(what: str) -> ValueError:
    return ValueError(f"The protocol buffer is truncated or damaged: {what}.")
