"""A list of the files of a checkpoint, to name the one that is damaged.

It is looked at before they are read: of a damaged file libraries say what they
like, on many lines. Fingerprints are of what was to be saved, and are checked
after; these sums are of what was written. Buckets keep sums themselves.
"""

import json
import os
import zlib
from pathlib import Path

from densenet_jax.files import replacing
from densenet_jax.runs.fingerprints import digest

FILE_LIST = "files.json"
_MiB = 1 << 20


def write_file_list(directory: str | os.PathLike) -> None:
    """Lists what is in the directory of a step in a file there."""
    files = _list_files(Path(directory))
    text = json.dumps({"files": files, "list": digest(files)})
    with replacing(Path(directory) / FILE_LIST) as temporary:
        temporary.write_text(text)


def changed_files(directory: str | os.PathLike) -> list[str]:
    """What has happened to each file since it was listed, if anything.

    Raises:
      FileNotFoundError: there is no list.
    """
    directory = Path(directory)
    try:
        stated = json.loads((directory / FILE_LIST).read_text())
        saved = stated["files"]
        if stated["list"] != digest(saved):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        return [f"{FILE_LIST} is not as it was saved"]
    found = _list_files(directory)
    return [
        f"{name} is {'not as it was saved' if name in found else 'missing'}"
        for name in sorted(saved)
        if found.get(name) != saved[name]
    ]


def _list_files(directory):
    return {
        str(path.relative_to(directory)): _size_and_sum(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != FILE_LIST
    }


def _size_and_sum(path):
    size = total = 0
    with path.open("rb") as file:
        while part := file.read(_MiB):
            size, total = size + len(part), zlib.crc32(part, total)
    return [size, total]
