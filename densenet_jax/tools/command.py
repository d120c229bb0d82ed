"""What the commands share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from absl import logging

from densenet_jax.data.preprocessing import Preprocessing

WEIGHTS_HELP = (
    "a PyTorch, .safetensors or Keras file, a run's directory, or published "
    "weights by name: torchvision/densenet121, hf://ORG/REPO, https://..."
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
    """Adds --weights."""
    parser.add_argument(
        "--weights", required=True, type=Path, help=WEIGHTS_HELP
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds --output."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where to write, made if need be (the current directory)",
    )


def add_preprocessing(
    parser: argparse.ArgumentParser,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
    resize_size: int | None = None,
) -> None:
    """Adds --mean and --std in PyTorch's units, --image_size, --resize_size.

    Args:
      mean, std, image_size, resize_size: the defaults; without a default,
        mean and std are required.
    """
    for name, default in ("mean", mean), ("std", std):
        shown = f" ({_join(default)})" if default else ""
        parser.add_argument(
            f"--{name}",
            type=_fractions,
            default=default,
            required=default is None,
            metavar="R,G,B",
            help=f"{name} of each channel, for pixels in 0 ... 1{shown}",
        )
    parser.add_argument(
        "--image_size",
        type=int,
        default=image_size,
        help="height and width of the central crop"
        + (f" ({image_size})" if image_size else " (the image as it is)"),
    )
    parser.add_argument(
        "--resize_size",
        type=int,
        default=resize_size,
        help="the shorter side before the crop "
        f"({resize_size or 'as image_size'})",
    )


def preprocessing(
    arguments: argparse.Namespace, channels: int
) -> Preprocessing:
    """The preprocessing that the options of `add_preprocessing` ask for.

    Raises:
      ValueError: options that do not fit together or the channels.
    """
    image_size, resize_size = arguments.image_size, arguments.resize_size
    if resize_size and not 0 < (image_size or 0) <= resize_size:
        raise ValueError(
            f"--image_size is {image_size}: must lie in 1 ... --resize_size, "
            f"which is {resize_size}."
        )
    if not all(arguments.std):
        raise ValueError("--std is 0: must be positive.")
    for name in ("mean", "std"):
        values = getattr(arguments, name)
        if len(values) not in (1, channels):
            raise ValueError(
                f"--{name}={_join(values)} has {len(values)} values: the net "
                f"reads {channels} channels."
            )
    return Preprocessing(
        mean=tuple(255 * value for value in arguments.mean),
        std=tuple(255 * value for value in arguments.std),
        image_size=image_size,
        resize_size=resize_size,
    )


def _fractions(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"{text} is not in 0 ... 1; divide by 255 what is meant for "
            "pixels in 0 ... 255"
        )
    return values


def _join(values: tuple[float, ...]) -> str:
    return ",".join(map(str, values))
