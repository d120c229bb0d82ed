"""Image files, class names and tasks, for the commands that take them."""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import jax
import numpy as np

from densenet_jax.data.images import read_file
from densenet_jax.data.preprocessing import Preprocessing
from densenet_jax.runs.description import TASKS, Description
from densenet_jax.tools import command
from densenet_jax.tools.preprocessing import add_preprocessing

# Logits -> probabilities.
PROBABILITIES = {
    "classification": jax.nn.softmax,
    "multilabel": jax.nn.sigmoid,
}


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds IMAGE..., --classes, --task, and the options of preprocessing."""
    parser.add_argument("images", nargs="+", type=command.path, metavar="IMAGE")
    parser.add_argument(
        "--classes",
        type=command.path,
        metavar="FILE",
        help="names of the classes, one a line (the run's or the file's own, "
        "or ImageNet's for 1,000 classes)",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="one class an image (softmax), or many labels, each with a "
        "probability of its own (sigmoid); (as the run or the file says, or "
        "else classification)",
    )
    add_preprocessing(parser)


def choose_task(
    task: str | None, description: Description, num_classes: int
) -> str:
    """The option's, the description's or else classification; says a guess.

    Args:
      task: of the option --task.
      description: of the net.
      num_classes: of the net. 1,000 are ImageNet's: no guess.
    """
    chosen = task or description.task
    if chosen is None and num_classes != 1000:
        print(
            "The file does not say whether an image has one class or many "
            "labels. Assumed --task=classification (softmax); a net of many "
            "labels, as for chest X-rays, needs --task=multilabel (sigmoid)."
        )
    return chosen or "classification"


def _lines(name: str) -> list[str]:
    file = resources.files("densenet_jax.tools") / name
    return file.read_text().splitlines()


def imagenet_classes() -> list[str]:
    """ImageNet's 1,000 class names in the order of PyTorch's and Keras's nets.

    Source: torchvision/models/_meta.py (BSD 3-Clause License, Copyright (c)
    Soumith Chintala 2016), `_IMAGENET_CATEGORIES` of torchvision 0.29.1.
    """
    return _lines("imagenet_classes.txt")


@functools.cache
def imagenet_synsets() -> Mapping[str, str]:
    """The names of ImageNet's folders, 'n01440764', in order -> class names."""
    return dict(zip(_lines("imagenet_synsets.txt"), imagenet_classes()))


def class_names(
    file: Path | None, description: Description, num_classes: int
) -> list[str]:
    """The lines of a file, or else what the description says.

    Without either ImageNet's names for 1,000 classes, or 'class 0', ...

    Raises:
      ValueError: there is not one name for each class.
    """
    if file is not None:
        names, origin = file.read_text().splitlines(), f"{file} has"
    elif description.class_names is not None:
        names, origin = description.class_names, "The file of the weights has"
    elif num_classes == 1000:
        return imagenet_classes()
    else:
        names = [""] * num_classes
    if len(names) != num_classes:
        raise ValueError(
            f"{origin} {len(names)} names: expected one for each of the net's "
            f"{num_classes} classes. --classes=FILE has one a line."
        )
    readable = imagenet_synsets()
    return [
        readable.get(name, name) or f"class {i}" for i, name in enumerate(names)
    ]


def for_each(paths: Sequence[Path], do: Callable[[Path], None]) -> None:
    """Calls do(path) for each path; what fails does not stop the others.

    Raises:
      ValueError: after all, that some failed; for a single path, why.
      OSError: a single path cannot be read or written.
    """
    failed = 0
    for path in paths:
        try:
            do(path)
        except (ValueError, OSError) as error:
            if len(paths) == 1:
                raise
            print(error, file=sys.stderr)
            failed += 1
    if failed:
        raise ValueError(f"{failed} of {len(paths)} images failed.")


def read_pixels(
    path: Path,
    channels: int,
    preprocessing: Preprocessing,
    description: Description,
) -> np.ndarray:
    """What the net sees of a file, uint8 [height, width, channels].

    Raises:
      ValueError: as `read_image`; or the image is of another size than those
        of a run that took them as stored.
    """
    pixels = preprocessing.evaluate(read_image(path, channels))
    shape = description.image_shape
    if preprocessing.image_size is None and shape and shape != pixels.shape:
        raise ValueError(
            f"{path} is {pixels.shape[1]}x{pixels.shape[0]}: the net was "
            f"trained on {shape[1]}x{shape[0]}. Resize it, or give "
            "--image_size."
        )
    return pixels


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
