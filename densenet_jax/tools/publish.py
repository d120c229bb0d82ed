"""Writes a net as a directory that load_pretrained and timm read.

python -m densenet_jax.tools.publish SRC DIR

SRC: weights as all commands take them, or the directory of a training run,
which says its preprocessing and its classes too. DIR gets model.safetensors and
a config.json as timm has it. With --push it is uploaded to the Hugging Face
hub, which asks for a token: of `hf auth login`, or in HF_TOKEN.
"""

import argparse
import sys

from densenet_jax.tools import command
from densenet_jax.weights import hub
from densenet_jax.weights.export import save_pretrained


def publish(arguments: argparse.Namespace) -> None:
    """Writes DIR, and uploads it if asked to."""
    model, variables, description = command.load(arguments.src, arguments)
    save_pretrained(
        model, variables, arguments.directory, description=description
    )
    print(f"Wrote {arguments.directory}")
    for name in ("preprocessing", "class_names", "task"):
        if getattr(description, name) is None:
            print(f"{arguments.src} says no {name}: none is written.")
    if arguments.push:
        print(f"Uploaded to {hub.push(arguments.directory, arguments.push)}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("publish", __doc__)
    parser.add_argument("src", help=command.WEIGHTS_HELP)
    parser.add_argument("directory", type=command.path, metavar="DIR")
    parser.add_argument(
        "--push", metavar="ORG/REPO", help="a repository of the hub"
    )
    command.add_reading(parser)
    return command.run(parser, publish, argv)


if __name__ == "__main__":
    sys.exit(main())
