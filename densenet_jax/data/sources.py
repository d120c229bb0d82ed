"""A data set's name -> its examples by index."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from densenet_jax.choices import check_choice
from densenet_jax.data.examples import (
    SKIP_HINT,
    Source,
)
from densenet_jax.data.images import BadRecordError, ImageFile
from densenet_jax.data.tfds import open_tfds

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
) -> Source:
    """Opens one split of a data set.

    Args:
      name: 'digits' (scikit-learn's 1,797 handwritten digits), 'folder' (image
        files data_dir/split/class/*) or a TFDS data set, 'name',
        'name/config' or 'name/config:version'.
      split: 'train' or 'test' for the digits, a folder of data_dir, or in
        TFDS's notation.
      data_dir: of the image folders, or where TFDS prepared the data set; None
        is TFDS's own choice, the environment's TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      on_error: 'raise', or 'skip' to open what has empty parts.

    Raises:
      NotPreparedError: a data set that TFDS has yet to prepare.
      ValueError: no such data set or split, stored in a format that cannot be
        read by index, or with empty files or classes.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    if name == "digits":
        return _digits(split)
    if name == "folder":
        return _folder(split, data_dir, on_error)
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


def _folder(split: str, data_dir: str | None, on_error: str) -> Source:
    if data_dir is None:
        raise ValueError(
            "The data set 'folder' needs dataset.data_dir, a directory with "
            "images as SPLIT/CLASS/NAME.jpg."
        )
    root = Path(data_dir)
    splits = _directories(root)
    if split not in splits:
        raise ValueError(
            f"{root} has no directory {split!r}, but: "
            f"{', '.join(splits) or 'none at all'}."
        )
    # Of all splits, so that a label means one class in each.
    classes = sorted({c for s in splits for c in _directories(root / s)})
    paths, labels, remarks = [], [], []
    for label, name in enumerate(classes):
        found = _image_files(root / split / name)
        paths += found
        labels += [label] * len(found)
        if not found:
            remarks.append(f"{root / split / name} holds no image file.")
    if not paths:
        raise ValueError(
            f"{root / split} holds no image files: expected CLASS/NAME.jpg."
        )
    if remarks and on_error == "raise":
        raise ValueError(f"{' '.join(remarks)} {SKIP_HINT}")
    return Source(
        _Files(paths, labels),
        len(classes),
        (None, None, 3),
        tuple(classes),
        tuple(remarks),
    )


def _directories(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    names = (entry.name for entry in os.scandir(path) if entry.is_dir())
    return sorted(name for name in names if not name.startswith("."))


def _image_files(path: Path) -> list[str]:
    """All files in it and below with an image's suffix, in order."""
    return sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
    )


class _Files:
    """Image files and their labels."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]):
        self._paths = paths
        self._labels = labels

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        path = self._paths[index]
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BadRecordError(f"{path}: {error.strerror}.") from error
        return {
            "image": ImageFile(data, channels=3, name=path),
            "label": self._labels[index],
        }
