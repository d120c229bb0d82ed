"""What happens to an image between the source and the network."""

import dataclasses

import jax
import numpy as np

from densenet_jax.data import batch_transforms, images, rand_augment, transforms
from densenet_jax.data.images import ImageFile


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens to an image between the source and the network.

    The host crops and flips bytes (`train`, `evaluate`); what follows, from
    the colours on, is done on the devices inside the step (`augment`,
    `normalize`). In the order of the attributes, and each off by default:

    Attributes:
      mean, std: of each channel, in units of 0 ... 255.
      image_size: height and width of the input; None takes images as stored.
      resize_size: for evaluation, the shorter side before the central crop of
        image_size; read only where image_size is given.
      ten_crop: evaluate the corners and the centre of the resized image, each
        mirrored too, and average the logits.
      random_resized_crop: crop training images as Inception does.
      flip: mirror half of the training images.
      rand_augment: (operations, magnitude), for example (2, 9); None is off.
      color_jitter: how far brightness, contrast and saturation go (0.4 in the
        authors' ImageNet code).
      lighting: standard deviation of the PCA noise (0.1 there).
      shift: zeros to pad each side of training images with, after normalising,
        before they are cropped back at random (4 on CIFAR).
      random_erasing: the share of training images of which a rectangle is
        set to zero, after normalising.
      mixup, cutmix: the alphas of their Beta(alpha, alpha); where both are
        positive, each batch has one or the other.

    Raises:
      ValueError: on construction, for attributes that do not go together.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None = None
    resize_size: int | None = None
    ten_crop: bool = False
    random_resized_crop: bool = False
    flip: bool = False
    rand_augment: tuple[int, int] | None = None
    color_jitter: float = 0.0
    lighting: float = 0.0
    shift: int = 0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        size, resize = self.image_size, self.resize_size
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std is {self.std}: must be positive.")
        for name in ("shift", "lighting", "mixup", "cutmix"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} is {value}: must be 0 or more.")
        for name in ("color_jitter", "random_erasing"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: must be in [0, 1].")
        if self.rand_augment is not None:
            rand_augment.check(*self.rand_augment)
        if size is not None and size < 1:
            raise ValueError(f"image_size is {size}: must be positive.")
        if size is None:
            for name in ("random_resized_crop", "ten_crop", "resize_size"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs an image_size.")
        if resize is not None and resize < size:
            raise ValueError(
                f"resize_size {resize} is smaller than image_size {size}, "
                "which is cropped from it."
            )

    def train(
        self, image: ImageFile | np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """One image on the host, uint8 [height, width, channels]."""
        if self.random_resized_crop:
            image = transforms.random_resized_crop(image, rng, self.image_size)
        else:
            image = self._center(image)
        if self.flip:
            image = transforms.random_flip(image, rng)
        if self.rand_augment is not None:
            image = rand_augment.rand_augment(image, rng, *self.rand_augment)
        return image

    def evaluate(self, image: ImageFile | np.ndarray) -> np.ndarray:
        """uint8 [height, width, channels]; with ten_crop [10, ...]."""
        if self.ten_crop:
            return transforms.ten_crops(
                images.decode(image), self._shorter_side, self.image_size
            )
        return self._center(image)

    def normalize(self, pixels: jax.Array) -> jax.Array:
        """uint8 [..., height, width, channels] -> float32, on the devices."""
        return batch_transforms.normalize(pixels, self.mean, self.std)

    def augment(
        self, key: jax.Array, batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """A training batch on the devices, normalised and augmented.

        Args:
          key: of all that is random.
          batch: 'image' uint8 [batch, height, width, channels], 'label'.

        Returns:
          'image' float32, 'label', and where images are mixed 'other_label'
          and 'lam' (see `batch_transforms.mixup`).
        """
        # A key each, so that one being on leaves the others as they are.
        keys = jax.random.split(key, 6)
        colours, light, shift, erase, mix, choice = keys
        pixels = batch["image"].astype("float32")
        if self.color_jitter:
            pixels = batch_transforms.color_jitter(
                colours, pixels, self.color_jitter
            )
        if self.lighting:
            pixels = batch_transforms.lighting(light, pixels, self.lighting)
        pixels = self.normalize(pixels)
        if self.shift:
            pixels = batch_transforms.random_shift(shift, pixels, self.shift)
        if self.random_erasing:
            pixels = batch_transforms.random_erasing(
                erase, pixels, self.random_erasing
            )
        batch = {**batch, "image": pixels}

        def mixup():
            return batch_transforms.mixup(mix, batch, self.mixup)

        def cutmix():
            return batch_transforms.cutmix(mix, batch, self.cutmix)

        if self.mixup and self.cutmix:
            coin = jax.random.bernoulli(choice)
            return jax.lax.cond(coin, mixup, cutmix)
        if self.mixup:
            return mixup()
        return cutmix() if self.cutmix else batch

    def _center(self, image):
        if self.image_size is None:
            return images.decode(image)
        return transforms.center_crop(
            images.decode(image), self._shorter_side, self.image_size
        )

    @property
    def _shorter_side(self):
        return self.resize_size or self.image_size
