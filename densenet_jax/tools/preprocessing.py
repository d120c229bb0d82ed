"""What happens to an image before the net, by options or as its file says."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from densenet_jax.data.preprocessing import Preprocessing
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.options import check_images
from densenet_jax.runs.description import PREPROCESSING, Description

# Options for pixels in 0 ... 1, where `Preprocessing` has 0 ... 255.
_UNITS = ("mean", "std")

# For nets whose files say nothing, by their stem; in the options' units.
_GUESSES = {
    "imagenet": (
        "torchvision's for ImageNet",
        {
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "image_size": 224,
            "resize_size": 256,
        },
    ),
    "cifar": (
        "usual for CIFAR-10",
        {
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "image_size": 32,
        },
    ),
}


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """Adds --mean and --std in PyTorch's units, --image_size, --resize_size."""
    for name in _UNITS:
        parser.add_argument(
            f"--{name}",
            type=_fractions,
            metavar="R,G,B",
            help=f"{name} of each channel, for pixels in 0 ... 1 (as the run "
            "or the file says, or else a guess, which is printed)",
        )
    parser.add_argument(
        "--image_size",
        type=int,
        help="height and width of the central crop (likewise)",
    )
    parser.add_argument(
        "--resize_size",
        type=int,
        help="the shorter side before the crop (likewise; with another "
        "--image_size in proportion to it)",
    )


def choose(
    arguments: argparse.Namespace,
    model: DenseNet,
    channels: int,
    description: Description,
    stored_size: Sequence[int | None] = (None, None),
) -> Preprocessing:
    """The preprocessing for a net; prints what of it is a guess.

    Each value is the option's, or else the description's, or else a guess.

    Args:
      arguments: with the options of `add_preprocessing`; a command that can
        take ten crops has the option of that name too.
      model: the net.
      channels: that it reads.
      description: of the net.
      stored_size: (height, width) of all images, where they are of one; a
        guess leaves them as they are.

    Raises:
      ValueError: options that do not fit together, the channels or the net.
    """
    known = _known(description, channels)
    origin, guess = _guess(model, channels, stored_size)
    guess = {key: value for key, value in guess.items() if key not in known}
    if "image_size" in known:
        guess.pop("resize_size", None)
    given = {
        name: value
        for name in PREPROCESSING
        if (value := getattr(arguments, name, None)) is not None
    }
    _check_units(given, channels)
    for name in given.keys() & set(_UNITS):
        given[name] = _as_stored(given[name])
    if "image_size" in given and "resize_size" not in given:
        given["resize_size"] = _in_proportion(given, guess | known)
    if guess.keys() - given.keys():
        print(_said(guess, given, origin))
    chosen = guess | known | given
    size, resize = chosen.get("image_size"), chosen.get("resize_size")
    if resize and not 0 < (size or 0) <= resize:
        raise ValueError(
            f"--image_size is {size}: must lie in 1 ... --resize_size, which "
            f"is {resize}."
        )
    if size:
        check_images(model, (1, size, size, channels), train=False)
    return Preprocessing(
        mean=chosen["mean"],
        std=chosen["std"],
        image_size=size,
        resize_size=resize,
        ten_crop="ten_crop" in arguments and bool(chosen.get("ten_crop")),
    )


def _known(description: Description, channels: int) -> dict[str, Any]:
    """What a net's description says, as `Preprocessing` has it."""
    found = dict(description.preprocessing or {})
    for name in _UNITS:
        values = found.pop(name, None)
        if values:
            found[name] = _for_channels(values, channels)
    # Images as stored, all of one size: others are resized to it.
    found["image_size"] = description.input_size
    if found["image_size"] is None and description.image_shape is None:
        sizes = ("image_size", "resize_size")  # not said
        return {k: v for k, v in found.items() if k not in sizes}
    return found


def _guess(
    model: DenseNet, channels: int, stored_size: Sequence[int | None]
) -> tuple[str, dict[str, Any]]:
    origin, values = _GUESSES["cifar" if model.stem == "cifar" else "imagenet"]
    units = {
        name: _for_channels(_as_stored(values[name]), channels)
        for name in _UNITS
    }
    return origin, units if None not in stored_size else values | units


def _as_stored(values: Sequence[float]) -> tuple[float, ...]:
    """For pixels in 0 ... 255 what is meant for pixels in 0 ... 1."""
    return tuple(255 * value for value in values)


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Their mean where there are others than the net reads, as for grey."""
    if len(values) in (1, channels):
        return tuple(values)
    return (sum(values) / len(values),)


def _in_proportion(
    given: Mapping[str, Any], before: Mapping[str, Any]
) -> int | None:
    """The resize_size that keeps the share of the image that is seen."""
    size, resize = before.get("image_size"), before.get("resize_size")
    return resize and round(given["image_size"] * resize / size)


def _said(
    guess: Mapping[str, Any], given: Mapping[str, Any], origin: str
) -> str:
    guessed = [
        f"--{name}="
        + (_join([v / 255 for v in value]) if name in _UNITS else str(value))
        for name, value in guess.items()
        if name not in given
    ]
    return (
        "The file does not say how its images were prepared. Assumed "
        f"{' '.join(guessed)} ({origin}); these options change it."
    )


def _check_units(given: Mapping[str, Any], channels: int) -> None:
    if not all(given.get("std", [1])):
        raise ValueError("--std is 0: must be positive.")
    for name in given.keys() & set(_UNITS):
        if len(given[name]) not in (1, channels):
            raise ValueError(
                f"--{name}={_join(given[name])} has {len(given[name])} values: "
                f"the net reads {channels} channels."
            )


def _fractions(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"{text} is not in 0 ... 1; divide by 255 what is meant for "
            "pixels in 0 ... 255"
        )
    return values


def _join(values: Sequence[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
