"""Images to network inputs: plain functions with explicit randomness.

Images are [height, width, channels], uint8 until `normalize`.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image


def normalize(
    image: np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """(image - mean) / std as float32; mean and std in units of 0 ... 255."""
    mean = np.asarray(mean, np.float32)
    return (image.astype(np.float32) - mean) / np.asarray(std, np.float32)


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors left and right with probability one half."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def random_shift(
    image: np.ndarray, rng: np.random.Generator, padding: int
) -> np.ndarray:
    """Pads with zeros on all sides and crops to the old size at random."""
    height, width = image.shape[:2]
    top, left = rng.integers(0, 2 * padding + 1, size=2)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return padded[top : top + height, left : left + width]


def random_resized_crop(
    image: np.ndarray, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Crops 8 to 100% of the area at aspect 3/4 to 4/3, resized to a square.

    The Inception crop (Szegedy et al., 1409.4842, section 6), as the authors
    train on ImageNet.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = rng.integers(0, height - h + 1)
            left = rng.integers(0, width - w + 1)
            return _resize(image, (size, size), (left, top, left + w, top + h))
    # The largest crop within the aspect ratios, from the centre.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return _resize(image, (size, size), (left, top, left + w, top + h))


def resize_and_center_crop(
    image: np.ndarray, resize: int, crop: int
) -> np.ndarray:
    """Resizes the shorter side to `resize`, crops the central square `crop`."""
    height, width = image.shape[:2]
    scale = resize / min(height, width)
    new = (int(width * scale), int(height * scale))
    new = tuple(max(side, resize) for side in new)
    image = _resize(image, new, (0, 0, width, height))
    top, left = round((new[1] - crop) / 2), round((new[0] - crop) / 2)
    return image[top : top + crop, left : left + crop]


def _resize(image, size, box):
    """Bilinear with antialiasing; size (width, height), box in pixels."""
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    resized = Image.fromarray(squeezed).resize(
        size, Image.Resampling.BILINEAR, box=box
    )
    return np.asarray(resized).reshape(size[1], size[0], image.shape[-1])
