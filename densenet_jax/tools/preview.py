"""Draws what the net will see: a recipe's first batch, augmented, as a PNG.

python -m densenet_jax.tools.preview --config=configs/cifar10.py:bc_100_12 \\
    --output=preview.png --config.preprocessing.mixup=0.2

Labels stand above the images; of mixed images both, with their shares. With
--split=test the images are those of the evaluation.
"""

import contextlib
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from densenet_jax.data import pipeline
from densenet_jax.files import replacing
from densenet_jax.training import experiment, steps

_COLUMNS = 8


def _batch(config, is_test, count):
    """Normalised images, labels, and names of the classes."""
    split = config.dataset.test_split if is_test else config.dataset.train_split
    source = experiment.open_split(config, split)
    preprocessing, _ = experiment.make_preprocessing(config, source)
    if is_test:
        batches = pipeline.eval_batches(
            source.examples,
            preprocessing.evaluate,
            batch_size=count,
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
        _, key = steps.random_keys(config.seed, step=0, part=0)
        batch = preprocessing.augment(key, batch)
    batch = jax.device_get(batch)
    # Of ten crops the fifth is the centre.
    images = (
        batch["image"][:, 4] if batch["image"].ndim == 5 else batch["image"]
    )
    pixels = images * preprocessing.std + preprocessing.mean
    batch["image"] = np.round(pixels).clip(0, 255).astype(np.uint8)
    names = source.class_names or [str(i) for i in range(source.num_classes)]
    return batch, names


def _title(batch, names, index):
    title = names[batch["label"][index]]
    if "share" not in batch:
        return title
    share, other = batch["share"][index], names[batch["other_label"][index]]
    return f"{title} {share:.0%}\n{other} {1 - share:.0%}"


def draw(config, is_test: bool, count: int, output: Path) -> None:
    """Writes the first `count` images of the first batch to a PNG."""
    batch, names = _batch(config, is_test, count)
    count = min(count, len(batch["image"]))
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
    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
    print(f"Wrote {output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    logging.set_verbosity(logging.ERROR)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "The recipe.", lock_config=True, flag_values=values
    )
    flags.DEFINE_string(
        "output", "preview.png", "The PNG to write.", flag_values=values
    )
    flags.DEFINE_enum(
        "split", "train", ["train", "test"], "Which.", flag_values=values
    )
    flags.DEFINE_integer("count", 32, "How many images.", 1, flag_values=values)
    name = "python -m densenet_jax.tools.preview"
    try:
        rest = values([name, *(sys.argv[1:] if argv is None else argv)])[1:]
        if rest or values.config is None:
            print(f"{__doc__}\n{values.main_module_help()}", file=sys.stderr)
            return 2
        draw(
            values.config,
            values.split == "test",
            values.count,
            Path(values.output),
        )
    except (flags.Error, AttributeError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
