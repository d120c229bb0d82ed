import io

import numpy as np
import pytest
from PIL import Image

from densenet_jax.data import images
from densenet_jax.data.images import BadRecordError, ImageFile


def _pixels(*shape):
    """Smooth, as photographs are."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    planes = [128 + 100 * np.sin(x / (15 + c) + y / 29) for c in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def _file(image, kind="PNG", channels=3, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return ImageFile(data.getvalue(), channels, "some.file")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_modes_are_converted_as_torchvision_does(mode):
    """torchvision: Image.open(file).convert('RGB')."""
    image = Image.fromarray(_pixels(30, 41)).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(100)
    got = _file(image).decode()
    np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpegs_are_pillows_to_the_bit(mode, progressive, subsampling):
    image = Image.fromarray(_pixels(45, 61)).convert(mode)
    file = _file(
        image, "JPEG", progressive=progressive, subsampling=subsampling
    )
    expected = Image.open(io.BytesIO(file.data)).convert("RGB")
    assert file.shape == (45, 61, 3)
    np.testing.assert_array_equal(file.decode(), np.asarray(expected))


def test_grey_of_a_colour_file():
    image = Image.fromarray(_pixels(20, 30))
    got = _file(image, channels=1).decode()
    np.testing.assert_array_equal(got[..., 0], np.asarray(image.convert("L")))


def test_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = _file(Image.fromarray(_pixels(20, 30)), "JPEG", exif=exif)
    assert file.shape == file.decode().shape == (20, 30, 3)


def _jpeg():
    return _file(Image.fromarray(_pixels(100, 120)), "JPEG").data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: b"", "some.file holds no image: an empty file"),
        (lambda: b"Not an image.", "some.file holds no image: cannot identify"),
        (lambda: _jpeg()[:1000], "some.file holds no image: .*truncated"),
        (lambda: b"\x89PNG\r\n\x1a\n" + bytes(40), "some.file holds no image"),
    ],
)
def test_bad_files(data, message):
    with pytest.raises(BadRecordError, match=message):
        ImageFile(data(), 3, "some.file").decode()


def test_a_huge_declared_size_is_not_allocated():
    """A header of 65,000 x 65,000 pixels in a file of a few hundred bytes."""
    data = bytearray(_jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xfd\xe8\xfd\xe8"
    with pytest.raises(BadRecordError, match="decompression bomb"):
        ImageFile(bytes(data), 3, "bomb.jpg").decode()


@pytest.mark.parametrize("size", [16, 40, 200])
def test_crops_of_files_are_near_pillows(size):
    """Against Pillow's antialiased bilinear."""
    image = Image.fromarray(_pixels(240, 300))
    file, box = _file(image, "JPEG", quality=95), (32, 24, 232, 200)
    decoded = Image.open(io.BytesIO(file.data))
    expected = decoded.resize((size, size), Image.Resampling.BILINEAR, box=box)
    got = images.crop_and_resize(file, box, size)
    assert got.shape == (size, size, 3)
    difference = got.astype(float) - np.asarray(expected)
    assert np.abs(difference).mean() < 2
