"""RandAugment (Cubuk et al., 1909.13719), as torchvision's class of the name.

Each operation takes (image, level): a Pillow image and a float in -1 ... 1, of
which only those that know a direction see negative ones.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_GREATEST = 30  # magnitude


def _affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _enhance(kind):
    return lambda image, level: kind(image).enhance(1 + 0.9 * level)


# Each may be drawn. Translations are of 150/331 of the side at most.
SIGNED = {
    "ShearX": lambda image, x: _affine(image, 1, 0.3 * x, 0, 0, 1, 0),
    "ShearY": lambda image, x: _affine(image, 1, 0, 0, 0.3 * x, 1, 0),
    "TranslateX": lambda image, x: _affine(
        image, 1, 0, -int(150 / 331 * image.width * x), 0, 1, 0
    ),
    "TranslateY": lambda image, x: _affine(
        image, 1, 0, 0, 0, 1, -int(150 / 331 * image.height * x)
    ),
    "Rotate": lambda image, x: image.rotate(30 * x),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
}
UNSIGNED = {
    "Identity": lambda image, x: image,
    "Posterize": lambda image, x: ImageOps.posterize(image, 8 - round(4 * x)),
    "Solarize": lambda image, x: ImageOps.solarize(image, 255 * (1 - x)),
    "AutoContrast": lambda image, x: ImageOps.autocontrast(image),
    "Equalize": lambda image, x: ImageOps.equalize(image),
}
OPERATIONS = {**SIGNED, **UNSIGNED}


def check(count: int, magnitude: int) -> None:
    """Raises ValueError for what `rand_augment` does not take."""
    if count < 1 or not 0 <= magnitude <= _GREATEST:
        raise ValueError(
            f"rand_augment is ({count}, {magnitude}): expected 1 or more "
            f"operations and a magnitude in 0 ... {_GREATEST}."
        )


def rand_augment(
    image: np.ndarray, rng: np.random.Generator, count: int, magnitude: int
) -> np.ndarray:
    """Applies `count` operations drawn at random, each at one magnitude.

    Args:
      image: uint8 [height, width, channels], grey or RGB.
      rng: of the operations and their signs.
      count: how many.
      magnitude: 0 ... 30.

    Returns:
      uint8 [height, width, channels].
    """
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    pixels = Image.fromarray(np.ascontiguousarray(squeezed))
    for name in rng.choice(list(OPERATIONS), count):
        level = magnitude / _GREATEST
        if name in SIGNED and rng.random() < 0.5:
            level = -level
        pixels = OPERATIONS[name](pixels, level)
    return np.asarray(pixels).reshape(image.shape)
