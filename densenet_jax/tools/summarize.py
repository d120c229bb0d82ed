"""Prints the table of a network's layers.

python -m densenet_jax.tools.summarize densenet121
python -m densenet_jax.tools.summarize densenet_bc_100_12 --format=markdown
"""

import argparse
import sys

from densenet_jax import create_model, list_models
from densenet_jax.analysis import summary


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status, 1 where there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m densenet_jax.tools.summarize",
        description="Prints the layers of a network: shapes, parameters, "
        "multiply-adds.",
    )
    parser.add_argument("name", help=f"one of {', '.join(list_models())}")
    parser.add_argument(
        "--image_size",
        type=int,
        help="height and width; default: 224, or 32 for the CIFAR nets",
    )
    parser.add_argument(
        "--channels", type=int, default=3, help="of the images; default: 3"
    )
    parser.add_argument("--format", default="text", choices=summary.FORMATS)
    args = parser.parse_args(argv)

    try:
        model = create_model(args.name)
        size = args.image_size
        if size is None:
            size = 32 if model.stem == "cifar" else 224
        rows = summary.layers(model, (size, size, args.channels))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if args.format == "text":
        print(f"{args.name}, one image of {size}x{size}x{args.channels}.")
        print(
            "7x7/2: a window of 7x7 with stride 2. Channels of a dense layer:"
        )
        print("all the feature maps so far. Parameters: its norms' too.\n")
    print(summary.format_table(rows, args.format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
