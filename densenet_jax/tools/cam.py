"""Draws where in images a net sees a class: one PNG for each image.

python -m densenet_jax.tools.cam --weights=densenet121.safetensors *.jpg

Class activation maps (Zhou et al. 2016), or Grad-CAM (Selvaraju et al. 2017),
of the last feature map. Images are read as by densenet_jax.tools.predict.
"""

import argparse
import collections
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.analysis import cam
from densenet_jax.models.ops import compiler_options
from densenet_jax.tools import command, images
from densenet_jax.weights.load import load_weights


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
    model, variables, remarks, changes, _ = load_weights(arguments.weights)
    for line in remarks + changes:
        print(line)
    if chosen is not None and not 0 <= chosen < model.num_classes:
        raise ValueError(
            f"--class is {chosen}: must lie in 0 ... {model.num_classes - 1}."
        )
    names = images.class_names(arguments.classes, model.num_classes)
    channels = variables["params"]["conv0"]["kernel"].shape[2]
    preprocessing = command.preprocessing(arguments, channels)
    compute = jax.jit(
        functools.partial(cam.activation_maps, model, method=method),
        compiler_options=compiler_options(),
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path, output in zip(arguments.images, outputs):
        # What the net sees: resized and cropped.
        pixels = preprocessing.evaluate(images.read_image(path, channels))
        image = preprocessing.normalize(pixels)
        classes = None if chosen is None else jnp.array([chosen])
        maps, (shown,), (logits,) = compute(variables, image[None], classes)
        probabilities = np.asarray(jax.nn.softmax(logits))
        predicted = probabilities.argmax()
        cam.plot_map(
            pixels,
            np.asarray(maps[0]),
            output,
            method=method,
            image_title=f"{names[predicted]}\n"
            f"predicted, {probabilities[predicted]:.1%}",
            map_title=f"{names[shown]}\nmapped, {probabilities[shown]:.1%}",
        )
        print(f"{path}: {probabilities[predicted]:.1%} {names[predicted]}")
        print(f"Wrote {output}")


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
