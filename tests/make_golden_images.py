"""Writes tests/data/torchvision_images.npz with the real torchvision.

The values in the repository were made by torch 2.14.1, torchvision 0.29.1 and
Pillow 13.0.0. To make them again, where these are installed:

    python -m tests.make_golden_images

The file holds, all uint8:
  jpeg/NAME        the bytes of a JPEG
  pillow/NAME      the same decoded to RGB by Pillow, Resize(SHORTER) and
                   CenterCrop(SIZE)
  tensor/NAME      the same by torchvision's decoder, on tensors, antialiased
  image            [height, width, 3]
  randaugment/NAME/LEVEL
                   one of RandAugment's operations on it, at magnitude
                   |LEVEL| of 30, backwards where it is negative
"""

import io
import pathlib

import numpy as np
from PIL import Image

PATH = pathlib.Path(__file__).parent / "data/torchvision_images.npz"
SHORTER, SIZE = 40, 32
SHAPES = {"wide": (90, 133), "tall": (151, 61), "small": (25, 33)}
MAGNITUDE = 9


def pixels(height: int, width: int) -> np.ndarray:
    """uint8 RGB, smooth with some edges, as photographs are."""
    y, x = np.mgrid[:height, :width]
    waves = [100 * np.sin(x / (5 + c) + y / 9) for c in range(3)]
    edges = 60 * ((x // 13 + y // 17) % 2)
    planes = 70 + np.stack(waves, axis=-1) + edges[..., None]
    return planes.clip(0, 255).astype(np.uint8)


def jpeg(height: int, width: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels(height, width)).save(data, "JPEG", quality=90)
    return data.getvalue()


def crops(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's test image of a JPEG, by Pillow and by tensors."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    crop = v2.Compose([v2.Resize(SHORTER, antialias=True), v2.CenterCrop(SIZE)])
    by_pillow = crop(Image.open(io.BytesIO(data)).convert("RGB"))
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    by_tensors = crop(decode_jpeg(encoded, ImageReadMode.RGB))
    return np.asarray(by_pillow), by_tensors.permute(1, 2, 0).numpy()


def operations(image: np.ndarray, magnitude: int) -> dict[str, np.ndarray]:
    """'NAME/LEVEL' -> what torchvision's RandAugment makes of the image."""
    from torchvision.transforms import InterpolationMode, RandAugment
    from torchvision.transforms.autoaugment import _apply_op

    found = {}
    space = RandAugment()._augmentation_space(31, image.shape[:2])
    for name, (values, signed) in space.items():
        value = float(values[magnitude] if values.ndim else values)
        for sign in (1, -1) if signed else (1,):
            result = _apply_op(
                Image.fromarray(image),
                name,
                sign * value,
                InterpolationMode.NEAREST,
                None,
            )
            found[f"{name}/{sign * magnitude}"] = np.asarray(result)
    return found


def main() -> None:
    golden = {}
    for name, shape in SHAPES.items():
        data = jpeg(*shape)
        golden[f"jpeg/{name}"] = np.frombuffer(data, np.uint8)
        golden[f"pillow/{name}"], golden[f"tensor/{name}"] = crops(data)
    golden["image"] = pixels(16, 21)
    for name, result in operations(golden["image"], MAGNITUDE).items():
        golden[f"randaugment/{name}"] = result
    np.savez_compressed(PATH, **golden)
    print(f"wrote {PATH.name}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
