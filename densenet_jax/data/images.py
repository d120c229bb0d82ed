"""Image files -> pixels, as torchvision reads them.

Whatever Pillow opens is converted to the channels asked for: grey and palette
images to RGB, alpha dropped, CMYK converted. The orientation that EXIF notes
is ignored. JPEGs go through simplejpeg, which gives Pillow's pixels sooner.
"""

import dataclasses
import io
import math

import cv2
import numpy as np
import simplejpeg
from PIL import Image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Images are loaded by threads and processes of Grain's.
cv2.setNumThreads(0)


class BadRecordError(ValueError):
    """A file or record that holds no image or label; the message names it."""


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image that is decoded when it is needed, and no further.

    Attributes:
      data: the bytes of a file.
      channels: of the decoded image: 1, 3 or 4.
      name: of the file or record, for messages.
    """

    data: bytes
    channels: int
    name: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels), from the file's header.

        Raises:
          BadRecordError: no image can be read.
        """
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(self.data)
        except ValueError:
            with self._open() as image:
                width, height = image.size
        return height, width, self.channels

    def decode(self, reduction: float = 1) -> np.ndarray:
        """uint8 [height, width, channels].

        Args:
          reduction: a JPEG may come smaller, by at most so much a side.

        Raises:
          BadRecordError: no image can be read.
        """
        pixels = self._decode_jpeg(reduction) if self.channels == 3 else None
        if pixels is not None:
            return pixels
        with self._open() as image:
            try:
                pixels = np.asarray(image.convert(_MODES[self.channels]))
            # Pillow raises SyntaxError and more for what is broken.
            except Exception as error:
                raise self._bad(error) from error
        return pixels.reshape(*pixels.shape[:2], self.channels)

    def _decode_jpeg(self, reduction):
        """None for what Pillow has to decide on: no JPEG, CMYK, damaged."""
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(self.data)
            if (
                space not in ("YCbCr", "Gray", "RGB")
                or height * width > Image.MAX_IMAGE_PIXELS
            ):
                return None
            return simplejpeg.decode_jpeg(
                self.data,
                "RGB",
                min_height=math.ceil(height / reduction),
                min_width=math.ceil(width / reduction),
            )
        except ValueError:
            return None

    def _open(self):
        try:
            return Image.open(io.BytesIO(self.data))
        except Exception as error:
            raise self._bad(error) from error

    def _bad(self, error):
        found = "an empty file" if not self.data else error
        return BadRecordError(f"{self.name} holds no image: {found}.")


def decode(image: ImageFile | np.ndarray) -> np.ndarray:
    """uint8 [height, width, channels]; arrays are as they are."""
    return image.decode() if isinstance(image, ImageFile) else image


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


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with antialiasing, to the bit as torchvision (with Pillow).

    Args:
      image: uint8 [old height, old width, channels].

    Returns:
      uint8 [height, width, channels].
    """
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    resized = Image.fromarray(squeezed).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    return np.asarray(resized).reshape(height, width, image.shape[-1])
