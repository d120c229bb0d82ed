import io
import os
import struct
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from densenet_jax.data import resizing
from densenet_jax.data.images import BadRecordError, ImageFile, read_file


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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("P", "PNG", {"transparency": bytes(range(256))}),
        ("P", "PNG", {"transparency": 3}),
        ("L", "PNG", {"transparency": 5}),
        ("CMYK", "TIFF", {}),
        ("YCbCr", "TIFF", {}),
        ("P", "GIF", {"save_all": True}),
        ("RGB", "WEBP", {"save_all": True, "lossless": True}),
        ("RGB", "TIFF", {"save_all": True}),
    ],
)
def test_files_are_converted_as_torchvision_does(mode, kind, options, channels):
    """Of several frames the first."""
    first = Image.fromarray(_pixels(30, 41)).convert(mode)
    if "save_all" in options:
        options = {**options, "append_images": [Image.new(mode, (41, 30))]}
    file = _file(first, kind, channels, **options)
    opened = Image.open(io.BytesIO(file.data))
    opened.info.pop("transparency", None)  # else Pillow warns
    expected = np.asarray(opened.convert({1: "L", 3: "RGB"}[channels]))
    assert expected.std() > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = file.decode().reshape(expected.shape)
    np.testing.assert_array_equal(got, expected)


# Depths other than 8 bits


def _ramp():
    """All of 0 ... 65,520 in steps of 16."""
    return (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)


def _tiff(values, bits, sample_format=1, photometric=1):
    """An uncompressed grey TIFF of little-endian values, of the bytes given."""
    height, width = 64, 64
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(values),
        339: sample_format,
    }
    entries = [struct.pack("<HHII", k, 4, 1, v) for k, v in tags.items()]
    directory = struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + directory


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_opencvs(kind, channels):
    file = _file(Image.fromarray(_ramp()), kind, channels)
    encoded = np.frombuffer(file.data, np.uint8)
    expected = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)
    assert (expected.min(), expected.max()) == (0, 255)
    for channel in range(channels):
        np.testing.assert_array_equal(file.decode()[..., channel], expected)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (lambda: Image.fromarray(_ramp().astype(">u2")), "TIFF"),
        (lambda: Image.fromarray(_ramp().astype(np.int32)), "TIFF"),
        (lambda: Image.fromarray(_ramp()), "PPM"),
        (lambda: Image.fromarray(_ramp()), "JPEG2000"),
    ],
    ids=["big-endian", "32", "PGM", "JPEG2000"],
)
def test_16_bits_of_other_files(image, kind):
    got = _file(image(), kind, channels=1).decode()[..., 0]
    np.testing.assert_array_equal(got, _ramp() >> 8)


def test_grey_and_colour_of_16_bits_agree():
    colour = cv2.imencode(".png", np.stack([_ramp()] * 3, axis=-1))[1]
    got = ImageFile(colour.tobytes(), 3, "colour.png").decode()
    grey = _file(Image.fromarray(_ramp()), "PNG").decode()
    np.testing.assert_array_equal(got, grey)


def test_tiffs_whose_tags_tell_the_range():
    inverted = _tiff(_ramp().tobytes(), 16, photometric=0)
    got = ImageFile(inverted, 1, "white is 0").decode()[..., 0]
    np.testing.assert_array_equal(got, 255 - (_ramp() >> 8))
    # Two values of 12 bits in three bytes, the high bits first.
    pairs = (_ramp() >> 4).reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4")
    packed = packed.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    got = ImageFile(_tiff(packed, 12), 1, "12 bits").decode()[..., 0]
    np.testing.assert_array_equal(got, _ramp() >> 8)


def test_black_is_black_at_any_depth():
    file = _file(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG")
    np.testing.assert_array_equal(file.decode(), np.zeros((4, 4, 3)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            lambda: _tiff(_ramp().astype("<f4").tobytes(), 32, 3),
            r"floating-point numbers \(Pillow's mode F\)",
        ),
        (
            lambda: _tiff((_ramp() * 16.0).astype("<u4").tobytes(), 32),
            r"values 0 ... 1,048,320 \(Pillow's mode I\).* 16 bits",
        ),
        (
            lambda: _tiff((_ramp() - 9.0).astype("<i4").tobytes(), 32, 2),
            "values -9 ... 65,511",
        ),
        (
            lambda: _tiff((_ramp() // 2).astype("<i2").tobytes(), 16, 2),
            "values 0 ... 32,760",
        ),
        (
            lambda: _file(Image.fromarray(_ramp() >> 8), "PNG").data,
            r"values 0 ... 255 \(Pillow's mode I;16\)",
        ),
    ],
    ids=["float", "beyond 16", "negative", "signed", "8 in 16"],
)
def test_values_without_a_known_range_are_refused(data, message, channels):
    with pytest.raises(BadRecordError, match=f"^some.file holds .*{message}"):
        ImageFile(data(), channels, "some.file").decode()


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


def test_postscript_is_not_run():
    data = _file(Image.fromarray(_pixels(8, 8)), "EPS").data
    with pytest.raises(BadRecordError, match="PostScript program"):
        ImageFile(data, 3, "some.file").decode()


def test_a_huge_declared_size_is_not_allocated():
    """A header of 65,000 x 65,000 pixels in a file of a few hundred bytes."""
    data = bytearray(_jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xfd\xe8\xfd\xe8"
    with pytest.raises(BadRecordError, match=r"^bomb.jpg: .*4225000000 pixels"):
        ImageFile(bytes(data), 3, "bomb.jpg").decode()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_limit_is_where_pillow_refuses(kind, monkeypatch):
    file = _file(Image.fromarray(_pixels(30, 41)), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 41 // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert file.decode().shape == (30, 41, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 41 // 2 - 1)
    with pytest.raises(BadRecordError, match=r"\(1230 pixels\) exceeds.* 1228"):
        file.decode()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert file.decode().shape == (30, 41, 3)


def test_only_regular_files_are_read(tmp_path):
    pipe, link = tmp_path / "pipe.png", tmp_path / "link.png"
    os.mkfifo(pipe)
    link.symlink_to("nowhere.png")
    for path, message in [
        (pipe, "pipe.png is a pipe or device, not an image file"),
        ("/dev/zero", "/dev/zero is a pipe or device"),
        (tmp_path, "is a directory, not an image"),
        (link, "link.png, a link to nowhere.png: No such file"),
        (tmp_path / "absent.png", "Cannot read .*absent.png: No such file"),
    ]:
        with pytest.raises(BadRecordError, match=message):
            read_file(path, channels=3)
    link.unlink()
    link.symlink_to(tmp_path / "there.png")
    Image.fromarray(_pixels(5, 6)).save(tmp_path / "there.png")
    assert read_file(link, channels=3).decode().shape == (5, 6, 3)


@pytest.mark.parametrize("size", [16, 40, 200])
def test_crops_of_files_are_near_pillows(size):
    """Against Pillow's antialiased bilinear."""
    image = Image.fromarray(_pixels(240, 300))
    file, box = _file(image, "JPEG", quality=95), (32, 24, 232, 200)
    decoded = Image.open(io.BytesIO(file.data))
    expected = decoded.resize((size, size), Image.Resampling.BILINEAR, box=box)
    got = resizing.crop_and_resize(file, box, size)
    assert got.shape == (size, size, 3)
    difference = got.astype(float) - np.asarray(expected)
    assert np.abs(difference).mean() < 2
