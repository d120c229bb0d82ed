"""What the commands share."""

import argparse
import ast
import sys
from collections.abc import Callable
from pathlib import Path

from absl import logging
from etils import epath

from densenet_jax.files import as_path
from densenet_jax.models.densenet import DenseNet
from densenet_jax.runs.description import Description
from densenet_jax.weights.load import Reading, load_weights

WEIGHTS_HELP = (
    "a PyTorch, .safetensors or Keras file, a run's directory (gs:// too), or "
    "published weights by name: torchvision/densenet121, hf://ORG/REPO, https://..."
)


def run(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], None],
    argv: list[str] | None,
) -> int:
    """Runs a command; returns the exit status, 1 after an error's message."""
    # The libraries' warnings tell their developers, not ours, what to do.
    logging.set_verbosity(logging.ERROR)
    arguments = parser.parse_args(argv)
    try:
        command(arguments)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def path(text: str) -> Path:
    """A path as a shell would read it: ~ is the home directory.

    Raises:
      argparse.ArgumentTypeError: an address, which would make a directory
        of that name here.
    """
    if "://" in text and not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"{text} is an address: a path on this machine is expected"
        )
    return Path(text).expanduser()


def directory(text: str) -> Path | epath.Path:
    """A path, or gs://BUCKET/NAME."""
    try:
        return as_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for densenet_jax.tools.NAME, described by its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m densenet_jax.tools.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds --config."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a recipe; --config.KEY=VALUE changes it",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds --weights, and how they are read."""
    parser.add_argument("--weights", required=True, help=WEIGHTS_HELP)
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds --mapping, --prefix, --ignore and --override, for `load`."""
    group = parser.add_argument_group(
        "how the weights are read, where they do not tell"
    )
    group.add_argument(
        "--mapping",
        type=path,
        metavar="FILE",
        help="places for names that no known layout has: see "
        "densenet_jax.weights.mapping.read_mapping",
    )
    group.add_argument(
        "--prefix",
        help="the key, or what the names of its tensors begin with, of one net "
        "of several",
    )
    group.add_argument(
        "--ignore",
        metavar="REGEX",
        help="whole names of tensors that are left out",
    )
    group.add_argument(
        "--override",
        action="append",
        type=_attribute,
        default=[],
        metavar="KEY=VALUE",
        help="an attribute of the net that no tensor shows, as "
        "activation=silu; can be given again",
    )


def _attribute(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def load(
    weights: str | Path, arguments: argparse.Namespace
) -> tuple[DenseNet, dict, Description]:
    """Reads weights, and prints what there is to say of them.

    Args:
      weights: a path or a name.
      arguments: with those of `add_reading`.

    Returns:
      The model, its variables, and what the file says of it.

    Raises:
      ValueError, OSError: as `load_weights`.
    """
    reading = Reading(
        arguments.mapping,
        arguments.prefix,
        arguments.ignore,
        dict(arguments.override),
    )
    model, variables, remarks, changes, description = load_weights(
        weights, reading=reading
    )
    for line in remarks + changes:
        print(line)
    return model, variables, description


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds --output."""
    parser.add_argument(
        "--output",
        type=path,
        default=Path(),
        metavar="DIR",
        help="where to write, made if need be (the current directory)",
    )
