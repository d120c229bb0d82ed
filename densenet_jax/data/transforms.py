"""Transforms of one image on the host: plain functions, explicit randomness.

Images are uint8 [height, width, channels], or files of such.
"""

import math

import cv2
import numpy as np

from densenet_jax.data import resizing
from densenet_jax.data.images import ImageFile


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors left and right with probability one half."""
    if rng.random() < 0.5:
        # A copy: reading an array backwards is much slower.
        image = cv2.flip(image, 1).reshape(image.shape)
    return image


def random_resized_crop(
    image: ImageFile | np.ndarray, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Crops 8 to 100% of the area at aspect 3/4 to 4/3, resized to a square.

    The Inception crop (Szegedy et al., 1409.4842, section 6), as torchvision
    draws it.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            break
    else:
        # The largest crop within the aspect ratios, from the centre.
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return resizing.crop_and_resize(image, box, size)


def center_crop(image: np.ndarray, shorter_side: int, size: int) -> np.ndarray:
    """The central square of `size` of the resized image.

    Args:
      image: uint8 [height, width, channels].
      shorter_side: to which it is resized, as torchvision does it.
      size: `shorter_side` or less.
    """
    height, width = _resized_shape(image, shorter_side)
    corners = [_central(height, width, size)]
    return resizing.resized_crops(image, height, width, corners, size)[0]


def ten_crops(image: np.ndarray, shorter_side: int, size: int) -> np.ndarray:
    """The resized image's corners and centre, each as it is and mirrored.

    Args: as `center_crop`.

    Returns:
      uint8 [10, size, size, channels].
    """
    height, width = _resized_shape(image, shorter_side)
    corners = [
        (top, left) for top in (0, height - size) for left in (0, width - size)
    ]
    corners.append(_central(height, width, size))
    crops = resizing.resized_crops(image, height, width, corners, size)
    return np.stack([*crops, *(crop[:, ::-1] for crop in crops)])


def _resized_shape(image, shorter_side):
    height, width = image.shape[:2]
    shorter = min(height, width)
    # Integers, as torchvision computes it: size * height / shorter cut off.
    return shorter_side * height // shorter, shorter_side * width // shorter


def _central(height, width, size):
    return round((height - size) / 2), round((width - size) / 2)
