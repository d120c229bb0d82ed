"""Image files -> pixels, as torchvision reads them.

Whatever Pillow opens is converted to the channels asked for: grey and palette
images to RGB, alpha dropped, CMYK converted. The orientation that EXIF notes
is ignored, and of several frames the first is read. JPEGs go through
simplejpeg, which gives Pillow's pixels sooner. Grey images of 16 bits, which
torchvision turns white, keep their high byte; floating-point ones are refused.
"""

import dataclasses
import io
import math
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from densenet_jax.files import LATER, one_kind_of_error

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# TIFF's tags, and a value.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0

# Pillow refuses twice as many pixels as it warns of; that one limit will do.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


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
                pixels = np.asarray(self._convert(image))
            except BadRecordError:
                raise
            # Pillow raises SyntaxError and more for what is broken.
            except Exception as error:
                raise self._bad(error) from error
        return pixels.reshape(*pixels.shape[:2], self.channels)

    def _decode_jpeg(self, reduction):
        """None for what Pillow has to decide on: no JPEG, CMYK, damaged."""
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(self.data)
            most = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
            if space not in ("YCbCr", "Gray", "RGB") or height * width > most:
                return None
            return simplejpeg.decode_jpeg(
                self.data,
                "RGB",
                min_height=math.ceil(height / reduction),
                min_width=math.ceil(width / reduction),
            )
        except ValueError:
            return None

    def _convert(self, image):
        """To the mode of the channels asked for."""
        if image.mode == "F":
            raise BadRecordError(
                f"{self.name} holds floating-point numbers (Pillow's mode F) "
                "and does not tell which are black and white: save it with 8 "
                "or 16 bits."
            )
        if image.mode == "I" or image.mode.startswith("I;"):
            image = self._to_8_bits(image)
        elif image.mode == "La":  # premultiplied
            image = image.convert("LA")
        elif image.mode == "LAB":
            image = image.convert("RGB")
        if self.channels < 4:
            # Alpha is dropped: Pillow need not warn that it might be.
            image.info.pop("transparency", None)
        return image.convert(_MODES[self.channels])

    def _to_8_bits(self, image):
        """The high bytes, as Pillow takes those of colours of 16 bits."""
        values = np.asarray(image)
        tags = image.tag_v2 if image.format == "TIFF" else {}
        bits = 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16
        low, high = int(values.min()), int(values.max())
        signed = image.mode == "I" and tags.get(_BITS_PER_SAMPLE) == (16,)
        # Values that would all become 0 are meant for another range.
        fits = high == 0 or 2 ** (bits - 8) <= high < 2**bits
        if signed or low < 0 or not fits:
            raise BadRecordError(
                f"{self.name} holds grey values {low:,} ... {high:,} (Pillow's "
                f"mode {image.mode}), which do not fill a range of {bits} "
                "bits: save it with 8 bits, or 16 from black to white."
            )
        pixels = (values >> (bits - 8)).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            pixels = 255 - pixels
        return Image.fromarray(pixels)

    def _open(self):
        try:
            image = Image.open(io.BytesIO(self.data))
        except Image.DecompressionBombError as error:
            raise BadRecordError(
                f"{self.name}: {error} Make it smaller to use it."
            ) from error
        except UnidentifiedImageError as error:
            raise self._bad("cannot identify image format") from error
        except Exception as error:
            raise self._bad(error) from error
        if image.format == "EPS":
            raise self._bad("a PostScript program, which is not run")
        return image

    def _bad(self, error):
        found = error if self.data else "an empty file"
        found = str(found) or type(found).__name__
        return BadRecordError(f"{self.name} holds no image: {found}.")


def read_file(path: str | os.PathLike[str], channels: int) -> ImageFile:
    """A file's bytes, not decoded yet.

    Raises:
      BadRecordError: there is no regular file, or it cannot be read.
      OSError: it is in a bucket that cannot be reached.
    """
    if str(path).startswith("gs://"):
        return ImageFile(_read_object(str(path)), channels, str(path))
    try:
        # Reading a pipe or a device may never end.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "directory" if stat.S_ISDIR(mode) else "pipe or device"
            raise BadRecordError(f"{path} is a {kind}, not an image file.")
        data = Path(path).read_bytes()
    except OSError as error:
        link = ""
        if os.path.islink(path):
            link = f", a link to {os.readlink(path)}"
        raise BadRecordError(
            f"Cannot read {path}{link}: {error.strerror}."
        ) from error
    return ImageFile(data, channels, str(path))


def _read_object(address: str) -> bytes:
    import fsspec

    try:
        # Such an error tells nothing of the image: it is no bad record.
        with one_kind_of_error(f"Cannot read {address}", LATER):
            # One request, where opening it would make two.
            return fsspec.filesystem("gs").cat_file(address)
    except FileNotFoundError as error:
        raise BadRecordError(f"Cannot read {address}: no such object.") from (
            error
        )


def decode(image: ImageFile | np.ndarray) -> np.ndarray:
    """uint8 [height, width, channels]; arrays are as they are."""
    return image.decode() if isinstance(image, ImageFile) else image
