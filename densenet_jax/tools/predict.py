"""Classifies image files: the five likeliest classes of each.

python -m densenet_jax.tools.predict --weights=densenet121.safetensors *.jpg

Images are read as torchvision reads them: as RGB (or grey, for a net of one
channel), EXIF orientation ignored, the shorter side resized, the centre
cropped. The defaults are those of torchvision's DenseNets for ImageNet.
"""

import argparse
import functools
import sys

import jax

from densenet_jax.models.ops import compiler_options
from densenet_jax.tools import command, images
from densenet_jax.weights.load import load_weights

_GUESSES = 5


def predict(arguments: argparse.Namespace) -> None:
    """Prints the likeliest classes and their probabilities for each file."""
    model, variables, remarks, changes, _ = load_weights(arguments.weights)
    for line in remarks + changes:
        print(line)
    names = images.class_names(arguments.classes, model.num_classes)
    channels = variables["params"]["conv0"]["kernel"].shape[2]
    preprocessing = command.preprocessing(arguments, channels)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def top(pixels):
        image = preprocessing.normalize(pixels)
        logits = model.apply(variables, image[None])[0]
        guesses = min(_GUESSES, model.num_classes)
        return jax.lax.top_k(jax.nn.softmax(logits), guesses)

    for path in arguments.images:
        pixels = preprocessing.evaluate(images.read_image(path, channels))
        print(path)
        for probability, index in zip(*top(pixels)):
            print(f"  {probability:6.1%}  {names[index]}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("predict", __doc__)
    command.add_weights(parser)
    images.add_images(parser)
    return command.run(parser, predict, argv)


if __name__ == "__main__":
    sys.exit(main())
