"""Image files and class names, for the commands that take them."""

import argparse
from importlib import resources
from pathlib import Path

import numpy as np

from densenet_jax.data.images import read_file
from densenet_jax.tools import command


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds IMAGE..., --classes, and torchvision's preprocessing."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names of the classes, one a line (ImageNet's for 1,000 classes)",
    )
    command.add_preprocessing(
        parser,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        image_size=224,
        resize_size=256,
    )


def imagenet_classes() -> list[str]:
    """ImageNet's 1,000 class names in the order of PyTorch's and Keras's nets.

    Source: torchvision/models/_meta.py (BSD 3-Clause License, Copyright (c)
    Soumith Chintala 2016), `_IMAGENET_CATEGORIES` of torchvision 0.29.1.
    """
    file = resources.files("densenet_jax.tools") / "imagenet_classes.txt"
    return file.read_text().splitlines()


def class_names(file: Path | None, num_classes: int) -> list[str]:
    """The lines of a file; without one, ImageNet's names or 'class 0', ...

    Raises:
      ValueError: the file has not one line for each class.
    """
    if file is not None:
        names = file.read_text().splitlines()
    elif num_classes == 1000:
        names = imagenet_classes()
    else:
        names = [f"class {i}" for i in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(
            f"{file} has {len(names)} lines: expected one for each of the "
            f"{num_classes} classes."
        )
    return names


def read_image(path: Path, channels: int) -> np.ndarray:
    """A file as uint8 [height, width, channels], RGB or grey.

    Raises:
      ValueError: no image can be read there, or channels is not 1 or 3.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"The net reads images of {channels} channels: image files have 1 "
            "or 3."
        )
    return read_file(path, channels).decode()
