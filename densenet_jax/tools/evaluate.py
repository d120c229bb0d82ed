"""Tests weights on a data set: loss and accuracy over every example, once.

python -m densenet_jax.tools.evaluate --weights=net.pth --dataset=cifar10 \\
    --data_dir=DIR --mean=0.4914,0.4822,0.4465 --std=0.2023,0.1994,0.2010

A run's directory says how its images are prepared and what its classes are
called; of another file what it does not say is assumed, and printed. Classes
of the data set are found among the net's by their names where both have some.
"""

import argparse
import functools
import os
import sys

import jax

from densenet_jax.data.sources import open_source
from densenet_jax.models.ops import compiler_options
from densenet_jax.tasks.classification import CLASSIFICATION
from densenet_jax.tools import command, labels, preprocessing
from densenet_jax.training import evaluation, sharding, steps


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints the loss in nats, and top-1 and top-5 accuracy."""
    mesh = sharding.make_mesh()
    sharding.check_batch_size(
        arguments.batch_size, accumulate=1, devices=mesh.size
    )
    source = open_source(arguments.dataset, arguments.split, arguments.data_dir)
    model, variables, description = command.load(arguments.weights, arguments)
    channels = variables["params"]["conv0"]["kernel"].shape[2]
    if source.image_shape[2] != channels:
        raise ValueError(
            f"The net reads {channels} channels and the images of "
            f"{arguments.dataset} have {source.image_shape[2]}."
        )
    if description.task == "multilabel":
        raise ValueError(
            "The net was trained for many labels an image, and "
            f"{arguments.dataset} has one: its accuracy would say nothing."
        )
    indices = labels.class_indices(
        arguments.class_indices, source, description, model.num_classes
    )
    prepare = preprocessing.choose(
        arguments, model, channels, description, source.image_shape[:2]
    )
    if None in source.image_shape and not prepare.image_size:
        raise ValueError(
            f"The images of {arguments.dataset} differ in size: give "
            "--image_size."
        )
    variables = jax.device_put(variables, sharding.replicated(mesh))
    means = evaluation.evaluate(
        jax.jit(
            functools.partial(
                steps.eval_step, model=model, normalize=prepare.normalize
            ),
            compiler_options=compiler_options(),
        ),
        variables,
        labels.Relabelled(source.examples, indices),
        prepare.evaluate,
        task=CLASSIFICATION,
        batch_size=arguments.batch_size,
        sharding=sharding.over_data(mesh),
    )
    print(
        f"top-1 {means['top1']:.2%}, top-5 {means['top5']:.2%}, "
        f"loss {means['loss']:.4f} ({len(source.examples):,} images)"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("evaluate", __doc__)
    command.add_weights(parser)
    parser.add_argument(
        "--dataset", required=True, help="a TFDS name, folder, digits"
    )
    parser.add_argument("--split", default="test", help="(test)")
    parser.add_argument(
        "--data_dir",
        type=os.path.expanduser,
        help="of TFDS (TFDS_DATA_DIR), or the one of the folders SPLIT/CLASS",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="(256)")
    parser.add_argument(
        "--class_indices",
        metavar="FILE",
        help="the net's class, from 0, of each class of the data set in turn: "
        "a file with one a line, or as 3,1,2 (found by name)",
    )
    preprocessing.add_preprocessing(parser)
    parser.add_argument(
        "--ten_crop",
        action=argparse.BooleanOptionalAction,
        help="average the logits over the corners and the centre of the "
        "resized image, each mirrored too (as the run does)",
    )
    return command.run(parser, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
