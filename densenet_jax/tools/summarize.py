"""Prints the table of a network's layers, or compares networks.

python -m densenet_jax.tools.summarize densenet121
python -m densenet_jax.tools.summarize densenet_bc_100_12 --format=markdown
python -m densenet_jax.tools.summarize densenet121 densenet169 densenet201

Several names: parameters, multiply-adds and activation memory, one line each.
"""

import argparse
import sys

from densenet_jax import create_model, list_models
from densenet_jax.analysis import summary
from densenet_jax.models.densenet import DenseNet
from densenet_jax.tools import command

_LAYERS = """{name}, one image of {shape}.
7x7/2: a window of 7x7 with stride 2. Channels of a dense layer:
all the feature maps so far. Parameters: its norms' too.
"""

_COMPARISON = """All for one image. Activation memory: what a training step in
float32 keeps for its backward pass, with remat=none.
"""


def summarize(arguments: argparse.Namespace) -> None:
    """Prints the layers of one network, or a line for each of several."""
    models = {name: create_model(name) for name in arguments.names}
    shapes = {
        name: _image_shape(model, arguments) for name, model in models.items()
    }
    if len(arguments.names) > 1:
        heading = _COMPARISON
        compared = summary.compare(models, shapes)
        table = summary.format_comparison(compared, arguments.format)
    else:
        ((name, shape),) = shapes.items()
        heading = _LAYERS.format(name=name, shape="x".join(map(str, shape)))
        rows = summary.layers(models[name], shape)
        table = summary.format_table(rows, arguments.format)
    if arguments.format == "text":
        print(heading)
    print(table)


def _image_shape(
    model: DenseNet, arguments: argparse.Namespace
) -> tuple[int, int, int]:
    size = arguments.image_size
    if size is None:
        size = 32 if model.stem == "cifar" else 224
    return size, size, arguments.channels


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("summarize", __doc__)
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(list_models())}",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        help="height and width; default: 224, or 32 for the CIFAR nets",
    )
    parser.add_argument(
        "--channels", type=int, default=3, help="of the images; default: 3"
    )
    parser.add_argument("--format", default="text", choices=summary.FORMATS)
    return command.run(parser, summarize, argv)


if __name__ == "__main__":
    sys.exit(main())
