"""Where in an image a class is seen: class activation maps and Grad-CAM."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from densenet_jax.choices import check_choice
from densenet_jax.files import replacing
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.layers import at_least_float32


class ActivationMaps(NamedTuple):
    """What `activation_maps` returns.

    Attributes:
      maps: [batch, height, width] of the last feature map, float32.
      classes: [batch], whose maps these are.
      logits: [batch, num_classes].
    """

    maps: jax.Array
    classes: jax.Array
    logits: jax.Array


def activation_maps(
    model: DenseNet,
    variables: Mapping,
    images: jax.Array,
    classes: jax.Array | None = None,
    method: str = "cam",
) -> ActivationMaps:
    """Maps how much each place of the last feature map speaks for a class.

    Args:
      model: its last feature map has passed the final norm and ReLU.
      variables: 'params' and 'batch_stats'.
      images: [batch, height, width, channels], normalised.
      classes: [batch], in 0 ... num_classes - 1; None is the likeliest of each
        image.
      method: 'cam', see `class_activation_maps`, or 'grad_cam', see
        `grad_cam`.

    Raises:
      ValueError: an unknown method, or images that the model cannot read.
    """
    check_choice("method", method, METHODS)
    features = model.apply(variables, images, method="features")[-1]
    logits = model.apply(variables, features, method="head")
    if classes is None:
        classes = jnp.argmax(logits, axis=-1)
    features = at_least_float32(features)
    maps = METHODS[method](model, variables, features, classes)
    return ActivationMaps(maps, classes, logits)


def class_activation_maps(
    model: DenseNet,
    variables: Mapping,
    features: jax.Array,
    classes: jax.Array,
) -> jax.Array:
    """The feature maps, weighted as the classifier weights their means.

    M_c(x, y) = sum_k w_k^c f_k(x, y), in units of the logit: the mean of M_c
    over all places, plus the classifier's bias, is the logit of class c. (Zhou
    et al., Learning Deep Features for Discriminative Localization, 2016,
    equation 2. They sum over places where DenseNet takes the mean.)

    Args:
      features: [batch, height, width, channels], what the head reads.
      classes: [batch].

    Returns:
      [batch, height, width]; negative where a place speaks against the class.
    """
    kernel = jnp.asarray(variables["params"]["classifier"]["kernel"])
    return jnp.einsum("bhwc,cb->bhw", features, kernel[:, classes])


def grad_cam(
    model: DenseNet,
    variables: Mapping,
    features: jax.Array,
    classes: jax.Array,
) -> jax.Array:
    """The feature maps, weighted by the mean gradients of the class's logit.

    L_c = ReLU(sum_k a_k^c f_k), where a_k^c is the mean over places of the
    gradient of the logit. (Selvaraju et al., Grad-CAM, 2017, equations 1 and
    2.) The head takes means and is linear, so a_k^c is the classifier's weight
    divided by the number of places, and L_c is ReLU(M_c) divided by it.

    Args and returns: as `class_activation_maps`; never negative.
    """

    def chosen_logits(features):
        logits = model.apply(variables, features, method="head")
        return jnp.take_along_axis(logits, classes[:, None], axis=-1).sum()

    weights = jax.grad(chosen_logits)(features).mean(axis=(1, 2))
    return jax.nn.relu(jnp.einsum("bhwc,bc->bhw", features, weights))


METHODS: dict[str, Callable[..., jax.Array]] = {
    "cam": class_activation_maps,
    "grad_cam": grad_cam,
}

_LABELS = {
    "cam": "CAM: mean + bias = logit",
    "grad_cam": "Grad-CAM: logit / number of places",
}


def plot_map(
    pixels: np.ndarray,
    activation: np.ndarray,
    path: Path,
    *,
    method: str,
    image_title: str,
    map_title: str,
) -> None:
    """Draws an image, and beside it the map over the image in grey, to a PNG.

    Args:
      pixels: [height, width, channels], uint8, 1 or 3 channels.
      activation: [rows, columns], spread evenly over the image.
      method: a key of METHODS.
    """
    height, width = pixels.shape[:2]
    extent = (0, width, height, 0)
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    grey = pixels.mean(axis=-1)
    color = grey if pixels.shape[-1] == 1 else pixels
    panels = (left, color, image_title), (right, grey, map_title)
    for axes, shown, title in panels:
        axes.imshow(shown, extent=extent, cmap="gray", vmin=0, vmax=255)
        axes.set(title=title, xticks=[], yticks=[])
    overlay = right.imshow(
        activation, extent=extent, alpha=0.5, interpolation="bilinear"
    )
    figure.colorbar(overlay, ax=right, label=_LABELS[method])
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
