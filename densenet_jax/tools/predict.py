"""Classifies image files: the five likeliest classes of each.

python -m densenet_jax.tools.predict --weights=densenet121.safetensors *.jpg

Images are read as torchvision reads them: as RGB (or grey, for a net of one
channel), EXIF orientation ignored, the shorter side resized, the centre
cropped. The defaults are those of torchvision's DenseNets for ImageNet.
"""

import argparse
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from densenet_jax.checkpoints.torch_weights import load_weights
from densenet_jax.tools import command

_GUESSES = 5


def imagenet_classes() -> list[str]:
    """ImageNet's 1,000 class names in the order of PyTorch's and Keras's nets.

    Source: torchvision/models/_meta.py (BSD 3-Clause License, Copyright (c)
    Soumith Chintala 2016), `_IMAGENET_CATEGORIES` of torchvision 0.29.1.
    """
    file = resources.files("densenet_jax.tools") / "imagenet_classes.txt"
    return file.read_text().splitlines()


def predict(arguments: argparse.Namespace) -> None:
    """Prints the likeliest classes and their probabilities for each file."""
    model, variables, remarks, changes = load_weights(arguments.weights)
    for line in remarks + changes:
        print(line)
    names = _class_names(arguments.classes, model.num_classes)
    channels = variables["params"]["conv0"]["kernel"].shape[2]
    images = _images(arguments, channels)

    @jax.jit
    def top(image):
        logits = model.apply(variables, image[None])[0]
        guesses = min(_GUESSES, model.num_classes)
        return jax.lax.top_k(jax.nn.softmax(logits), guesses)

    for path, image in zip(arguments.images, images):
        print(path)
        for probability, index in zip(*top(image)):
            print(f"  {probability:6.1%}  {names[index]}")


def _class_names(file: Path | None, num_classes: int) -> list[str]:
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


def _images(
    arguments: argparse.Namespace, channels: int
) -> Iterator[np.ndarray]:
    """Each file as float32 [crop, crop, channels]."""
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(
            f"The net reads images of {channels} channels: image files have 1 "
            "or 3."
        )
    preprocessing = command.preprocessing(arguments, channels)
    for path in arguments.images:
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert(modes[channels]))
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path}: {error}") from error
        yield preprocessing.evaluate(pixels.reshape(*pixels.shape[:2], -1))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("predict", __doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    command.add_weights(parser)
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
    return command.run(parser, predict, argv)


if __name__ == "__main__":
    sys.exit(main())
