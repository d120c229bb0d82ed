"""Prints the layers of a network, or compares several.

python -m densenet_jax.tools.summarize densenet121
python -m densenet_jax.tools.summarize densenet121 --model.growth_rate=24
python -m densenet_jax.tools.summarize densenet_bc_100_12 runs/digits
python -m densenet_jax.tools.summarize --config=configs/cifar10.py:40_12

A network is a name, whose attributes --model.KEY=VALUE changes, the directory
of a run, or a recipe's, which --config.KEY=VALUE changes. For each layer:
operation, output, parameters and multiply-adds (those of convolutions and the
linear layer, as torchvision counts them). Several networks take a line each.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

from densenet_jax import recipes
from densenet_jax.analysis import summary
from densenet_jax.files import as_path
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.variants import list_models
from densenet_jax.planning import compiling
from densenet_jax.runs import directory
from densenet_jax.tools import command
from densenet_jax.training import experiment

_LAYERS = """{name}, one image of {shape}.

The norm-ReLU before each convolution of a dense layer is counted in its line,
those of the stem, of transitions and of the head have lines of their own. Norms
and the linear layer have their biases counted; multiply-adds are those of
convolutions and the linear layer, the transitions' at full size.
"""

_COMPARISON = """All for one image. Activation memory: what a training step in
float32 keeps for its backward pass, with remat=none.
"""


def summarize(
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    changes: Sequence[str],
) -> None:
    """Prints the layers of one network, or a line for each of several."""
    found = {
        name: _network(name, arguments, changes) for name in arguments.networks
    }
    if arguments.config is not None:
        config = recipes.read_config(arguments.config, overrides)
        (source, _), _ = compiling.open_sources(config)
        _, shape = experiment.make_preprocessing(config, source)
        model = experiment.make_model(config.model, source)
        found[arguments.config] = model, _resized(shape, arguments)
    elif overrides:
        raise ValueError(f"{overrides[0]} changes a recipe: give --config too.")
    if changes and not set(found) & set(list_models()):
        raise ValueError(f"{changes[0]} changes names, and none is given.")
    if not found:
        raise ValueError(
            f"No network: give names ({', '.join(list_models())}), "
            "directories of runs, or --config."
        )
    models = {name: model for name, (model, _) in found.items()}
    shapes = {name: shape for name, (_, shape) in found.items()}
    if len(models) > 1:
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


def _network(
    name: str, arguments: argparse.Namespace, changes: Sequence[str]
) -> tuple[DenseNet, tuple[int, int, int]]:
    """The network of a name or of a run, and the shape of its images."""
    run = as_path(name)
    if name in list_models() or not run.is_dir():
        model = recipes.change_model({"name": name}, changes)
        return model, _image_shape(model, arguments)
    model, shape = directory.read_network(run)
    return model, _resized(shape, arguments)


def _resized(
    shape: tuple[int, int, int], arguments: argparse.Namespace
) -> tuple[int, int, int]:
    height, width, channels = shape
    size = arguments.image_size
    return size or height, size or width, arguments.channels or channels


def _image_shape(
    model: DenseNet, arguments: argparse.Namespace
) -> tuple[int, int, int]:
    size = arguments.image_size
    if size is None:
        size = 32 if model.stem == "cifar" else 224
    return size, size, arguments.channels or 3


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("summarize", __doc__)
    parser.add_argument(
        "networks",
        nargs="*",
        metavar="NETWORK",
        help=f"the directory of a run, or of {', '.join(list_models())}",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a recipe; --config.KEY=VALUE changes it",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        help="height and width; default: a run's or recipe's, 224, or 32 for "
        "CIFAR nets",
    )
    parser.add_argument(
        "--channels", type=int, help="of the images; default: a run's, or 3"
    )
    parser.add_argument("--format", default="text", choices=summary.FORMATS)
    overrides, words = recipes.split_overrides(argv)
    changes = [word for word in words if word.startswith("--model.")]
    return command.run(
        parser,
        functools.partial(summarize, overrides=overrides, changes=changes),
        [word for word in words if word not in changes],
    )


if __name__ == "__main__":
    sys.exit(main())
