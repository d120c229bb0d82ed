"""Draws where in images a net sees a class: one PNG for each image.

python -m densenet_jax.tools.cam --weights=densenet121.safetensors *.jpg

Class activation maps (Zhou et al. 2016), or Grad-CAM (Selvaraju et al. 2017),
of the last feature map. Images are read as by densenet_jax.tools.predict.
"""

import argparse
import collections
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.analysis import cam
from densenet_jax.models.ops import compiler_options
from densenet_jax.tools import command, images, preprocessing


def draw(arguments: argparse.Namespace) -> None:
    """Writes a picture for each image, and prints where."""
    method, chosen = arguments.method, arguments.class_
    outputs = [
        arguments.output / f"{path.stem}_{method}.png"
        for path in arguments.images
    ]
    output, count = collections.Counter(outputs).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{count} images would be drawn to {output}: give those of one "
            "name in commands of their own, with another --output."
        )
    model, variables, description = command.load(arguments.weights, arguments)
    if chosen is not None and not 0 <= chosen < model.num_classes:
        raise ValueError(
            f"--class is {chosen}: must lie in 0 ... {model.num_classes - 1}."
        )
    names = images.class_names(
        arguments.classes, description, model.num_classes
    )
    task = images.choose_task(arguments.task, description, model.num_classes)
    channels = variables["params"]["conv0"]["kernel"].shape[2]
    prepare = preprocessing.choose(arguments, model, channels, description)
    compute = jax.jit(
        functools.partial(cam.activation_maps, model, method=method),
        compiler_options=compiler_options(),
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    places = dict(zip(arguments.images, outputs))

    def draw_one(path: Path) -> None:
        # What the net sees: resized and cropped.
        pixels = images.read_pixels(path, channels, prepare, description)
        image = prepare.normalize(pixels)
        classes = None if chosen is None else jnp.array([chosen])
        maps, (shown,), (logits,) = compute(variables, image[None], classes)
        probabilities = np.asarray(images.PROBABILITIES[task](logits))
        predicted = probabilities.argmax()
        cam.plot_map(
            pixels,
            np.asarray(maps[0]),
            places[path],
            method=method,
            image_title=f"{names[predicted]}\n"
            f"predicted, {probabilities[predicted]:.1%}",
            map_title=f"{names[shown]}\nmapped, {probabilities[shown]:.1%}",
        )
        print(f"{path}: {probabilities[predicted]:.1%} {names[predicted]}")
        print(f"Wrote {places[path]}")

    images.for_each(arguments.images, draw_one)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("cam", __doc__)
    command.add_weights(parser)
    images.add_images(parser)
    parser.add_argument(
        "--class",
        dest="class_",
        type=int,
        metavar="N",
        help="whose map is drawn (the predicted one)",
    )
    parser.add_argument("--method", choices=cam.METHODS, default="cam")
    command.add_output(parser)
    return command.run(parser, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
