"""What a file is that holds no weights, by its first bytes."""

import stat
from pathlib import Path

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
}

# Enough for the signature of a tar file, which stands at its 257th byte.
LENGTH = 512


def check_regular(path: Path) -> None:
    """Raises ValueError for a pipe or a device, which may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("It is a pipe or a device, expected a regular file.")


def foreign(start: bytes) -> str:
    """One sentence on a file that is none of weights, and what to do.

    Args:
      start: its first LENGTH bytes.
    """
    if not start:
        return "The file is empty: download or copy it again."
    if start.startswith(b"version https://git-lfs"):
        return (
            "The file is a Git LFS pointer, not the weights: fetch them with "
            "git lfs pull, or download the file itself."
        )
    if start.lstrip().startswith(b"<"):
        return (
            "The file is a web page or an XML document, as servers send in "
            "place of a file that needs a login or a confirmation: open it in "
            "a text editor to see why, and download the file itself."
        )
    for signature, name in _COMPRESSED.items():
        if start.startswith(signature):
            return f"The file is compressed ({name}): unpack it first."
    if start[257:262] == b"ustar":
        return "The file is a tar archive: unpack it first."
    if start.startswith(b"\x80"):
        return (
            "The file is a pickle, and none of torch.save: reading it would "
            "run it. Save its arrays as .safetensors where they come from."
        )
    return (
        f"The file begins with {start[:16]!r}: it is neither a file of "
        "torch.save, nor .safetensors, nor a Keras .h5 or .keras, a Caffe "
        ".caffemodel or a Torch7 .t7."
    )
