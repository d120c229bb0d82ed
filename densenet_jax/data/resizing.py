"""Parts of images, resized on the host to squares of one size."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from densenet_jax.data.images import ImageFile

# Images more times as long as wide are thin.
_THIN = 16
# 1 in the fixed-point arithmetic of Pillow's resizing.
_ONE = 2**22

# Images are loaded by threads and processes of Grain's.
cv2.setNumThreads(0)


def crop_and_resize(
    image: ImageFile | np.ndarray, box: tuple[int, int, int, int], size: int
) -> np.ndarray:
    """A part of the image as a square, quickly.

    Bilinear without antialiasing; where that would skip pixels, at less than
    half the size, areas are averaged. A JPEG is decoded at the lowest of its
    resolutions (a half, a quarter, an eighth) that gives every output pixel
    one of its own; the box is rounded to that resolution.

    Args:
      image: of [height, width, channels].
      box: (left, top, right, bottom) in pixels.
      size: of the square.

    Returns:
      uint8 [size, size, channels].
    """
    left, top, right, bottom = box
    if isinstance(image, ImageFile):
        spare = max(1, min(right - left, bottom - top) // size)
        # Of the resolutions between these some are slower than the whole.
        pixels = image.decode(reduction=2 ** (spare.bit_length() - 1))
        height, width, _ = image.shape
        across, down = pixels.shape[1] / width, pixels.shape[0] / height
        left, right = round(left * across), round(right * across)
        top, bottom = round(top * down), round(bottom * down)
    else:
        pixels = image
    crop = pixels[top:bottom, left:right]
    skips = max(crop.shape[:2]) > 2 * size
    method = cv2.INTER_AREA if skips else cv2.INTER_LINEAR
    resized = cv2.resize(crop, (size, size), interpolation=method)
    return resized.reshape(size, size, -1)


def resized_crops(
    image: np.ndarray,
    height: int,
    width: int,
    corners: Sequence[tuple[int, int]],
    size: int,
) -> list[np.ndarray]:
    """Squares of a resized image, to the bit as torchvision (with Pillow).

    Bilinear with antialiasing. Of a thin image that grows much, of which the
    whole could take gigabytes (4,000x1 becomes 1,024,000x256), only the squares
    are computed.

    Args:
      image: uint8 [old height, old width, channels].
      height, width: of the resized image.
      corners: (top, left) of each square in it.
      size: of the squares.

    Returns:
      uint8 [size, size, channels] for each corner.
    """
    is_thin = max(height, width) > _THIN * min(height, width)
    if is_thin and height > 2 * len(image):
        return [_enlarged_part(image, height, width, c, size) for c in corners]
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    resized = Image.fromarray(squeezed).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    whole = np.asarray(resized).reshape(height, width, image.shape[-1])
    return [whole[y : y + size, x : x + size] for y, x in corners]


def _enlarged_part(image, height, width, corner, size):
    """One square of an enlarged image, with Pillow's arithmetic."""
    top, left = corner
    old_height, old_width, _ = image.shape
    rows, down = _interpolation(old_height, height, top, size)
    columns, across = _interpolation(old_width, width, left, size)
    part = image[rows, columns]
    # Pillow rounds after each of the two directions.
    for weights, product in (across, "ow,hwc->hoc"), (down, "oh,hwc->owc"):
        sums = np.einsum(product, weights, part)
        part = (sums + _ONE // 2) // _ONE
    return part.astype(np.uint8)


def _interpolation(old, new, start, count):
    """A slice of the old pixels, and their weights in `count` of the new ones.

    The weights, [count, length of the slice], are Pillow's fixed-point numbers;
    sums of their products with bytes are exact in float64.
    """
    centers = (start + np.arange(count) + 0.5) * (old / new)
    first = max(0, math.floor(centers[0] - 1))
    last = min(old, math.ceil(centers[-1] + 1))
    distances = np.abs(np.arange(first, last) + 0.5 - centers[:, None])
    weights = np.maximum(1 - distances, 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return slice(first, last), np.floor(weights * _ONE + 0.5)
