"""Classifies image files: the likeliest classes of each.

python -m densenet_jax.tools.predict --weights=densenet121.safetensors *.jpg

Images are read as torchvision reads them: as RGB (or grey, for a net of one
channel), EXIF orientation ignored, the shorter side resized, the centre
cropped. A run's directory says how, what its classes are called, and whether
an image has one (five are printed) or many labels (twenty). Of another file
what it does not say is assumed, and printed.

A file that holds no image is an error, and the others are classified.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax

from densenet_jax.models.ops import compiler_options
from densenet_jax.tools import command, images, preprocessing

_GUESSES = {"classification": 5, "multilabel": 20}


def predict(arguments: argparse.Namespace) -> None:
    """Prints the likeliest classes and their probabilities for each file."""
    model, variables, description = command.load(arguments.weights, arguments)
    names = images.class_names(
        arguments.classes, description, model.num_classes
    )
    task = images.choose_task(arguments.task, description, model.num_classes)
    channels = variables["params"]["conv0"]["kernel"].shape[2]
    prepare = preprocessing.choose(arguments, model, channels, description)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def top(pixels):
        image = prepare.normalize(pixels)
        logits = model.apply(variables, image[None])[0]
        guesses = min(_GUESSES[task], model.num_classes)
        return jax.lax.top_k(images.PROBABILITIES[task](logits), guesses)

    def show(path: Path) -> None:
        guesses = top(images.read_pixels(path, channels, prepare, description))
        print(path)
        for probability, index in zip(*guesses):
            print(f"  {probability:6.1%}  {names[index]}")

    images.for_each(arguments.images, show)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("predict", __doc__)
    command.add_weights(parser)
    images.add_images(parser)
    return command.run(parser, predict, argv)


if __name__ == "__main__":
    sys.exit(main())
