"""Transforms of one image on the host: plain functions, explicit randomness.

Images are uint8 [height, width, channels], or files of such.
"""

import math

import cv2
import numpy as np

from densenet_jax.data import images
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
    return images.crop_and_resize(image, box, size)


def resize_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes so that the shorter side is `size`, to torchvision's shape."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    # Integers, as torchvision computes it: size * height / shorter cut off.
    return images.resize(
        image, size * height // shorter, size * width // shorter
    )


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of `size`."""
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def ten_crops(image: np.ndarray, size: int) -> np.ndarray:
    """The corners and the centre, each as it is and mirrored.

    Returns:
      uint8 [10, size, size, channels].
    """
    height, width = image.shape[:2]
    crops = [
        image[top : top + size, left : left + size]
        for top in (0, height - size)
        for left in (0, width - size)
    ]
    crops.append(center_crop(image, size))
    return np.stack([*crops, *(crop[:, ::-1] for crop in crops)])
