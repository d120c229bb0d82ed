"""Draws which earlier feature maps each layer reads: the paper's figure 5.

python -m densenet_jax.tools.feature_reuse runs/c10 --output=pictures

Writes feature_reuse.png, and feature_reuse.csv with the numbers: the mean
absolute weight that each dense layer, transition and the classifier puts on
the feature maps of each layer before it in its dense block.
"""

import argparse
import sys
from pathlib import Path

from densenet_jax.analysis import feature_reuse
from densenet_jax.tools import command


def draw(arguments: argparse.Namespace) -> None:
    """Writes the picture and the numbers, and prints where."""
    model, variables, _ = command.load(arguments.weights, arguments)
    blocks = feature_reuse.feature_reuse(model, variables)
    arguments.output.mkdir(parents=True, exist_ok=True)
    picture = arguments.output / "feature_reuse.png"
    name = Path(arguments.weights).expanduser().resolve().name
    title = f"Feature reuse in {name}"
    feature_reuse.plot(blocks, picture, title)
    numbers = arguments.output / "feature_reuse.csv"
    feature_reuse.write_csv(blocks, numbers)
    print(f"Wrote {picture} and {numbers}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("feature_reuse", __doc__)
    parser.add_argument("weights", help=command.WEIGHTS_HELP)
    command.add_output(parser)
    command.add_reading(parser)
    return command.run(parser, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
