"""What the commands share."""

import argparse
import sys
from collections.abc import Callable

from absl import logging


def run(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], None],
) -> None:
    """Parses the command line and runs; errors are a message, and status 1."""
    # The libraries' warnings tell their developers, not ours, what to do.
    logging.set_verbosity(logging.ERROR)
    arguments = parser.parse_args()
    try:
        command(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for densenet_jax.tools.NAME, described by its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m densenet_jax.tools.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_normalization(
    parser: argparse.ArgumentParser,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Adds --mean and --std, in PyTorch's units, with these defaults."""
    for name, default in ("mean", mean), ("std", std):
        parser.add_argument(
            f"--{name}",
            type=_fractions,
            default=default,
            metavar="R,G,B",
            help=f"{name} of each channel where pixels are 0 ... 1 "
            f"({','.join(map(str, default))})",
        )


def _fractions(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"{text} lies not in 0 ... 1: divide what is meant for pixels of "
            "0 ... 255 by 255"
        )
    return values
