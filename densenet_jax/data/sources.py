"""A data set's name -> its examples by index."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from densenet_jax.choices import check_choice
from densenet_jax.data.examples import Source, check_remarks
from densenet_jax.data.images import read_file
from densenet_jax.data.tfds import open_tfds
from densenet_jax.files import as_path, in_bucket, walk

# Those that torchvision's ImageFolder reads.
_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff"),
    ".webp",
)


def open_source(
    name: str,
    split: str,
    data_dir: str | None = None,
    on_error: str = "raise",
    splits: Sequence[str] = (),
) -> Source:
    """Opens one split of a data set.

    Args:
      name: 'digits' (scikit-learn's 1,797 handwritten digits), 'folder' (image
        files data_dir/split/class/*, at any depth) or a TFDS data set, 'name',
        'name/config' or 'name/config:version'.
      split: 'train' or 'test' for the digits, a folder of data_dir, or in
        TFDS's notation.
      data_dir: of the image folders, or where TFDS prepared the data set;
        gs://BUCKET/NAME too. None is TFDS's own choice, the environment's
        TFDS_DATA_DIR or ~/tensorflow_datasets.
      on_error: 'raise', or 'skip' to open what has empty parts.
      splits: all that are in use. A folder's classes are those of all of them,
        so that a label means one class in each; by default those of `split`.

    Raises:
      NotPreparedError: a data set that TFDS has yet to prepare.
      ValueError: no such data set or split, stored in a format that cannot be
        read by index, or with empty files or classes, or without a class that
        another of `splits` has.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    if name == "digits":
        return _digits(split)
    if name == "folder":
        return _folder(split, data_dir, on_error, splits)
    return open_tfds(name, split, data_dir, on_error)


def _digits(split: str) -> Source:
    from sklearn.datasets import load_digits

    if split not in ("train", "test"):
        raise ValueError(f"digits has no split {split!r}: use train or test.")
    images, labels = load_digits(return_X_y=True)
    # Ink counts 0 ... 16 become 0 ... 255. Every fifth digit is held out.
    images = np.round(images * (255 / 16)).astype(np.uint8)
    held_out = np.arange(len(labels)) % 5 == 0
    chosen = np.flatnonzero(held_out == (split == "test"))
    examples = [
        {"image": images[i].reshape(8, 8, 1), "label": int(labels[i])}
        for i in chosen
    ]
    return Source(examples, num_classes=10, image_shape=(8, 8, 1))


def _folder(
    split: str, data_dir: str | None, on_error: str, splits: Sequence[str]
) -> Source:
    if data_dir is None:
        raise ValueError(
            "The data set 'folder' needs dataset.data_dir, a directory with "
            "images as SPLIT/CLASS/NAME.jpg."
        )
    root = as_path(data_dir)
    if not root.is_dir():
        raise ValueError(
            f"{root} is no directory: dataset.data_dir is to hold images as "
            "SPLIT/CLASS/NAME.jpg."
        )
    present = _directories(root)
    if split not in present:
        raise ValueError(
            f"{root} has no directory {split!r}, but: "
            f"{', '.join(present) or 'none at all'}."
        )
    # Of all splits in use, so that a label means one class in each.
    split_of = {}
    for used in (*splits, split):
        if used in present:
            split_of |= dict.fromkeys(_directories(root / used), used)
    classes = sorted(split_of)
    paths, labels = [], []
    remarks = [] if in_bucket(root) else _broken_links(_visible(root / split))
    for label, name in enumerate(classes):
        if split_of[name] != split:
            remarks.append(
                f"{root / split} has no folder {name!r}, a class of "
                f"{root / split_of[name]}."
            )
            continue
        found, problems = _image_files(root, split, name)
        paths += found
        labels += [label] * len(found)
        remarks += problems
    if not paths:
        raise ValueError(
            f"{root / split} holds no image files: expected CLASS/NAME.jpg."
        )
    check_remarks(remarks, on_error)
    return Source(
        _Files(paths, labels),
        len(classes),
        (None, None, 3),
        tuple(classes),
        tuple(remarks),
    )


def _directories(path: Path | epath.Path) -> list[str]:
    if in_bucket(path):
        _, directories, _ = next(walk(path))
        return sorted(filter(_is_visible, directories))
    return [e.name for e in _visible(path) if _is_directory(e)]


def _visible(path: str | Path) -> list[os.DirEntry]:
    """A directory's entries, in order, without those that systems hide."""
    with os.scandir(path) as entries:
        visible = [entry for entry in entries if _is_visible(entry.name)]
    return sorted(visible, key=lambda entry: entry.name)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _is_directory(entry: os.DirEntry) -> bool:
    if entry.is_symlink():  # entry.is_dir() raises where one leads to itself
        return os.path.isdir(entry.path)
    return entry.is_dir()


def _broken_links(entries: Sequence[os.DirEntry]) -> list[str]:
    return [
        f"{entry.path} is a broken link, to {os.readlink(entry.path)}."
        for entry in entries
        if entry.is_symlink() and not os.path.exists(entry.path)
    ]


def _image_files(
    root: Path, split: str, name: str
) -> tuple[list[str], list[str]]:
    """A class's files with an image's suffix, in order, and what is wrong."""
    folder = root / split / name
    if in_bucket(root):
        paths = sorted(_objects(folder))
        return paths, [] if paths else [f"{folder} holds no image file."]
    above = (_identity(root), _identity(root / split))
    paths, others = [], []
    for entry in _walk(folder, above):
        if entry.name.lower().endswith(_SUFFIXES):
            paths.append(entry.path)
        else:
            others.append(entry)
    # Broken links to images are found when they are read: there may be many.
    remarks = _broken_links(others)
    if not paths:
        remarks.append(f"{folder} holds no image file.")
    return sorted(paths), remarks


def _walk(
    folder: str | Path, above: tuple[tuple[int, int], ...]
) -> Iterator[os.DirEntry]:
    """All but the folders in it and below; links are followed, save upwards."""
    here = _identity(folder)
    if here in above:
        return
    for entry in _visible(folder):
        if _is_directory(entry):
            yield from _walk(entry.path, (*above, here))
        else:
            yield entry


def _objects(folder: epath.Path) -> Iterator[str]:
    """The images of a folder in a bucket, at any depth."""
    for path, directories, names in walk(folder):
        directories[:] = filter(_is_visible, directories)
        for name in names:
            if _is_visible(name) and name.lower().endswith(_SUFFIXES):
                yield str(path / name)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


class _Files:
    """Image files and their labels."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]):
        self._paths = paths
        self._labels = labels

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        image = read_file(self._paths[index], channels=3)
        return {"image": image, "label": self._labels[index]}
