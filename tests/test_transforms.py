import numpy as np
import pytest
from PIL import Image

from densenet_jax.data import transforms


def _image(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def test_flip_mirrors_half_of_the_time():
    image, rng = _image(2, 3), np.random.default_rng(0)
    flipped = 0
    for _ in range(1000):
        got = transforms.random_flip(image, rng)
        mirrored = np.array_equal(got, image[:, ::-1])
        assert mirrored or np.array_equal(got, image)
        flipped += mirrored
    assert 450 < flipped < 550


@pytest.mark.parametrize("size", [(40, 61), (61, 40), (300, 10), (8, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_random_resized_crop(size, channels):
    image = _image(*size, channels)
    got = transforms.random_resized_crop(image, np.random.default_rng(1), 16)
    assert got.shape == (16, 16, channels)
    assert got.dtype == np.uint8


def test_random_resized_crop_covers_the_stated_areas_and_ratios():
    # Coordinates as pixel values: a crop's corners can be read off it.
    rows, columns = np.mgrid[0:200, 0:200].astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=-1)
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(500):
        crop = transforms.random_resized_crop(image, rng, 32).astype(float)
        # The outer pixels' centres are 1/32 of the side inside the crop.
        height, width = (
            (crop[-1, -1, i] - crop[0, 0, i]) * 32 / 31 for i in (0, 1)
        )
        areas.append(height * width / 200**2)
        ratios.append(width / height)
    assert 0.06 < min(areas) < 0.13
    assert 0.85 < max(areas) < 1.05
    assert 0.70 < min(ratios) < 0.80
    assert 1.25 < max(ratios) < 1.42


@pytest.mark.parametrize(("height", "width"), [(300, 10), (10, 300)])
def test_a_crop_that_never_fits_is_the_central_one(height, width):
    """torchvision's fallback: the largest within the ratios, in the centre."""
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows * 255 // height, columns * 255 // width] * 2, -1)
    image = image[..., :3].astype(np.uint8)

    got = transforms.random_resized_crop(image, np.random.default_rng(0), 16)

    # A centred crop of 10 x 13 pixels (ratio 3/4 or 4/3) of 300.
    long = 0 if height > width else 1
    assert abs(got[..., long].mean() - 127) < 3
    spread = float(got[..., long].max()) - float(got[..., long].min())
    assert spread < 255 * 15 / 300


def test_resize_and_center_crop_is_pillows():
    image = _image(50, 80)
    got = transforms.center_crop(image, 32, 28)
    # torchvision: shorter side 32, the other int(32 * 80 / 50) = 51.
    whole = Image.fromarray(image).resize((51, 32), Image.Resampling.BILINEAR)
    expected = np.asarray(whole)[2:30, 12:40]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "shorter"),
    [
        (3, 400, 32),
        (601, 7, 28),
        (1, 300, 30),
        (300, 1, 30),
        (13, 300, 28),
        (300, 13, 28),
        (1999, 45, 28),  # smaller
    ],
)
def test_crops_of_thin_images_are_pillows_to_the_bit(
    height, width, shorter, channels
):
    image = _image(height, width, channels)
    new = [shorter * n // min(height, width) for n in (height, width)]
    whole = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
    whole = whole.resize(new[::-1], Image.Resampling.BILINEAR)
    whole = np.asarray(whole).reshape(*new, channels)
    bottom, right = (n - 28 for n in new)
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    corners.append((round(bottom / 2), round(right / 2)))
    expected = [whole[y : y + 28, x : x + 28] for y, x in corners]
    got = transforms.ten_crops(image, shorter, 28)
    np.testing.assert_array_equal(got[:5], expected)
    central = transforms.center_crop(image, shorter, 28)
    np.testing.assert_array_equal(central, expected[-1])


@pytest.mark.parametrize("shape", [(1, 3_000_000), (3_000_000, 1)])
def test_the_whole_of_a_thin_image_is_not_resized(shape):
    """It would be of 768,000,000 x 256 pixels, more than Pillow allocates."""
    image = np.broadcast_to(np.uint8(7), (*shape, 3))
    got = transforms.center_crop(image, 256, 224)
    np.testing.assert_array_equal(got, np.full((224, 224, 3), 7))
    got = transforms.random_resized_crop(image, np.random.default_rng(0), 224)
    np.testing.assert_array_equal(got, np.full((224, 224, 3), 7))
