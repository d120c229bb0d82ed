"""Draws what the net will see: a recipe's first batch, augmented, as a PNG.

python -m densenet_jax.tools.preview --config=configs/cifar10.py:bc_100_12 \\
    --output=preview.png --config.preprocessing.mixup=0.2

Labels stand above the images; of mixed images both, with their shares. With
--split=test the images are those of the evaluation.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from densenet_jax import recipes
from densenet_jax.data import pipeline
from densenet_jax.files import replacing
from densenet_jax.tools import command
from densenet_jax.training import experiment, steps

_COLUMNS = 8
_LONGEST_NAME = 24  # characters; more would run into the next label


def _batch(config, is_test, count):
    """Normalised images, labels, and names of the classes."""
    split = config.dataset.test_split if is_test else config.dataset.train_split
    source = experiment.open_split(config, split)
    preprocessing, _ = experiment.make_preprocessing(config, source)
    if is_test:
        batches = pipeline.eval_batches(
            source.examples,
            preprocessing.evaluate,
            batch_size=min(count, len(source.examples)),
            on_error=config.dataset.on_error,
        )
    else:
        batches = pipeline.train_batches(
            source.examples,
            preprocessing.train,
            batch_size=config.batch_size,
            seed=config.seed,
            on_error=config.dataset.on_error,
        )
    with contextlib.closing(batches):
        batch = next(batches)
    if is_test:
        batch = {**batch, "image": preprocessing.normalize(batch["image"])}
    else:
        _, key = steps.random_keys(config.seed, step=0, microbatch=0)
        batch = preprocessing.augment(key, batch)
    batch = jax.device_get(batch)
    # Of ten crops the fifth is the centre.
    images = (
        batch["image"][:, 4] if batch["image"].ndim == 5 else batch["image"]
    )
    pixels = images * preprocessing.std + preprocessing.mean
    batch["image"] = np.round(pixels).clip(0, 255).astype(np.uint8)
    names = source.class_names or map(str, range(source.num_classes))
    return batch, [_shorten(name) for name in names]


def _shorten(name):
    if len(name) <= _LONGEST_NAME:
        return name
    return name[: _LONGEST_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _title(batch, names, index):
    title = names[batch["label"][index]]
    if "lam" not in batch:
        return title
    share, other = batch["lam"][index], names[batch["other_label"][index]]
    return f"{title} {share:.0%}\n{other} {1 - share:.0%}"


def draw(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Writes the first images of the first batch to a PNG."""
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}: must be positive.")
    config = recipes.read_config(arguments.config, overrides)
    batch, names = _batch(config, arguments.split == "test", arguments.count)
    count = min(arguments.count, len(batch["image"]))
    rows = -(-count // _COLUMNS)
    figure, axes = plt.subplots(
        rows,
        _COLUMNS,
        figsize=(1.6 * _COLUMNS, 2 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for index, axis in zip(range(count), axes.flat):
        axis.imshow(batch["image"][index], cmap="gray", vmin=0, vmax=255)
        axis.set_title(_title(batch, names, index), fontsize=8)
    with replacing(arguments.output) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    print(f"Wrote {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("preview", __doc__)
    command.add_config(parser)
    parser.add_argument(
        "--output",
        type=command.path,
        default=Path("preview.png"),
        help="the PNG to write (preview.png)",
    )
    parser.add_argument(
        "--split", choices=["train", "test"], default="train", help="(train)"
    )
    parser.add_argument(
        "--count", type=int, default=32, help="how many images (32)"
    )
    overrides, words = recipes.split_overrides(argv)
    return command.run(
        parser, functools.partial(draw, overrides=overrides), words
    )


if __name__ == "__main__":
    sys.exit(main())
