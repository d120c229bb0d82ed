"""Transforms of batches on the devices: what needs floats, or two images.

Plain functions of arrays with explicit keys, for use inside a jitted step.
Images are float32 [batch, height, width, channels].
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Of RGB in ImageNet, for pixels in 0 ... 1 (fb.resnet.torch, imagenet.lua).
_PCA_VALUES = np.float32([0.2175, 0.0188, 0.0045])
_PCA_VECTORS = np.float32(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ]
)
_LUMA = np.float32([0.299, 0.587, 0.114])


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """(images - mean) / std as float32; all in units of 0 ... 255."""
    mean, std = (
        jnp.asarray(value, jnp.float32).reshape(
            (1,) * (images.ndim - 1) + (-1,)
        )
        for value in (mean, std)
    )
    return (images.astype(jnp.float32) - mean) / std


def color_jitter(
    key: jax.Array, images: jax.Array, strength: float
) -> jax.Array:
    """Scales brightness, contrast and saturation of RGB images.

    Each by its own factor in 1 - strength ... 1 + strength, as the authors do
    on ImageNet: towards black, towards the image's mean grey, and towards each
    pixel's grey. They do so in random order, which without clipping is all
    the same: saturation keeps the grey, and brightness scales everything.
    """
    factors = jax.random.uniform(
        key,
        (3, images.shape[0], 1, 1, 1),
        minval=1 - strength,
        maxval=1 + strength,
    )
    brightness, contrast, saturation = factors
    grey = (images * _LUMA.reshape(1, 1, 1, 3)).sum(axis=-1, keepdims=True)
    mean = grey.mean(axis=(1, 2), keepdims=True)
    images = saturation * images + (1 - saturation) * grey
    return brightness * (contrast * images + (1 - contrast) * mean)


def lighting(key: jax.Array, images: jax.Array, std: float) -> jax.Array:
    """Adds PCA noise to the colour of RGB images in 0 ... 255.

    Each principal component of ImageNet's colours, scaled by its standard
    deviation and a normal draw of `std` (Krizhevsky et al. 2012, section 4.1;
    0.1 there).
    """
    draws = std * jax.random.normal(key, (images.shape[0], 3))
    noise = 255 * (draws * _PCA_VALUES.reshape(1, 3)) @ _PCA_VECTORS.T
    return images + noise[:, None, None, :]


def random_shift(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads each image with zeros on all sides, and crops it back at random."""
    height, width = images.shape[1:3]
    around = (padding, padding)
    padded = jnp.pad(images, ((0, 0), around, around, (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)

    def crop(image, corner):
        top, left = corner
        size = (height, width, image.shape[-1])
        return jax.lax.dynamic_slice(image, (top, left, 0), size)

    return jax.vmap(crop)(padded, corners)


def random_erasing(
    key: jax.Array, images: jax.Array, probability: float
) -> jax.Array:
    """Sets a rectangle of some images to zero (Zhong et al., 1708.04896).

    Its area is 2 to 33% of the image's at aspect 0.3 to 3.3, as torchvision
    draws it: the first of ten draws that fits, or none.
    """
    count, height, width, _ = images.shape
    chance, area, ratio, place = jax.random.split(key, 4)
    chosen = jax.random.uniform(chance, (count,)) < probability
    areas = jax.random.uniform(area, (count, 10), minval=0.02, maxval=0.33)
    areas = height * width * areas
    ratios = jnp.exp(
        jax.random.uniform(
            ratio, (count, 10), minval=np.log(0.3), maxval=np.log(3.3)
        )
    )
    heights = jnp.round(jnp.sqrt(areas * ratios))
    widths = jnp.round(jnp.sqrt(areas / ratios))
    fits = (heights < height) & (widths < width)
    first = fits.argmax(axis=1)[:, None]
    h, w = (
        jnp.take_along_axis(sides, first, axis=1)[:, 0]
        for sides in (heights, widths)
    )
    places = jax.random.uniform(place, (2, count))
    top = jnp.floor(places[0] * (height - h + 1))
    left = jnp.floor(places[1] * (width - w + 1))
    inside = _box(height, width, top, left, top + h, left + w)
    erased = inside & (chosen & fits.any(axis=1))[:, None, None]
    return jnp.where(erased[..., None], 0, images)


def mixup(
    key: jax.Array, batch: Mapping[str, jax.Array], alpha: float
) -> dict[str, jax.Array]:
    """Blends each image with the one before it (Zhang et al., 1710.09412).

    Args:
      key: of the batch's one coefficient lam, from Beta(alpha, alpha).
      batch: 'image' and 'label' [batch].
      alpha: positive.

    Returns:
      The batch with 'other_label' int [batch] and 'lam' float32 [batch], so
      that an image is `lam` of 'label' and 1 - lam of 'other_label'.
      'label' is that of the greater part.
    """
    lam = jax.random.beta(key, alpha, alpha)
    images = batch["image"]
    mixed = lam * images + (1 - lam) * jnp.roll(images, 1, axis=0)
    return _mixed(batch, mixed, lam)


def cutmix(
    key: jax.Array, batch: Mapping[str, jax.Array], alpha: float
) -> dict[str, jax.Array]:
    """Pastes a box of the image before into each (Yun et al., 1905.04899).

    Args, returns: as `mixup`. The box is the same for the whole batch and
    covers 1 - lam before it is cut off at the border, which counts.
    """
    images = batch["image"]
    height, width = images.shape[1:3]
    of_lam, of_place = jax.random.split(key)
    side = jnp.sqrt(1 - jax.random.beta(of_lam, alpha, alpha))
    centre = jax.random.uniform(of_place, (2,))
    size = jnp.array([height, width], jnp.float32)
    low, high = (
        jnp.clip(jnp.round(size * (centre + offset)), 0, size)[:, None]
        for offset in (-side / 2, side / 2)
    )
    inside = _box(height, width, *low, *high)
    pasted = jnp.where(inside[..., None], jnp.roll(images, 1, axis=0), images)
    return _mixed(batch, pasted, 1 - inside.mean(dtype=jnp.float32))


def _box(height, width, top, left, bottom, right):
    """bool [batch, height, width], True within; edges are float [batch]."""
    rows = jnp.arange(height, dtype=jnp.float32)[None, :]
    columns = jnp.arange(width, dtype=jnp.float32)[None, :]
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :]


def _mixed(batch, images, lam):
    labels, others = batch["label"], jnp.roll(batch["label"], 1)
    own = lam >= 0.5
    return {
        **batch,
        "image": images,
        "label": jnp.where(own, labels, others),
        "other_label": jnp.where(own, others, labels),
        "lam": jnp.full(labels.shape, jnp.maximum(lam, 1 - lam)),
    }
