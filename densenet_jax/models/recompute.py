"""A dense block whose backward pass recomputes what is cheap.

What a dense block is, the modules of `densenet` say. This is the same function
of the same parameters, for training, with a backward pass of its own. It keeps
what convolutions made and makes concatenation, norm and ReLU again from there
(Pleiss et al., Memory-Efficient Implementation of DenseNets, 1707.06990).

Layers read the first channels of one array, in both passes. A concatenation for
each would be written for each, and XLA would merge the backward pass's with the
forward pass's and keep them all.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from densenet_jax.models.layers import (
    Affine,
    Moments,
    at_least_float32,
    batch_moments,
    concatenate_moments,
    normalisation,
)
from densenet_jax.models.ops import convolve, store

# More gradients that wait to be added up take memory, each as much as the
# block's output at most; fewer take time.
_MAX_PENDING = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the layers of a block share.

    Attributes:
      norm_epsilon, dropout_rate, dtype, form: see `densenet.DenseNet`.
      keep_bottlenecks: keep the outputs of the 1x1 convolutions for the
        backward pass too, instead of making them again.
    """

    norm_epsilon: float
    dropout_rate: float
    dtype: jnp.dtype
    keep_bottlenecks: bool
    form: str


class Output(NamedTuple):
    """What a dense block makes.

    Attributes:
      features: [batch, height, width, channels], oldest first.
      moments: of the features.
      bottleneck_moments: of each layer's 1x1 convolution, for running
        statistics: they pass no gradient on. Empty without bottlenecks.
    """

    features: jax.Array
    moments: Moments
    bottleneck_moments: Sequence[Moments]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense_block(
    settings: Settings,
    x: jax.Array,
    layers: Sequence[Mapping[str, Any]],
    keys: Sequence[Sequence[jax.Array | None]],
) -> Output:
    """Applies dense layers, with batch moments and dropout, as in training.

    Args:
      settings: of all layers.
      x: [batch, height, width, channels].
      layers: the parameters of each `densenet.DenseLayer`.
      keys: of the dropout after each convolution of each layer; read if
        settings.dropout_rate > 0.
    """
    return _forward(settings, x, layers, keys)[0]


def _forward(settings, x, layers, keys):
    channels = x.shape[-1]
    total = channels + sum(map(_growth_rate, layers))
    features = jax.lax.empty((*x.shape[:-1], total), x.dtype)
    features = jax.lax.dynamic_update_slice_in_dim(features, x, 0, axis=-1)
    moments = [batch_moments(x)]
    bottlenecks, bottleneck_moments = [], []
    for i, layer in enumerate(layers):
        first, second = _functions(settings, layer, keys[i])
        new = first(
            _stage(layer, 1),
            features[..., :channels],
            concatenate_moments(moments),
        )
        if second:
            bottlenecks.append(new)
            bottleneck_moments.append(batch_moments(new))
            new = second(_stage(layer, 2), new, bottleneck_moments[-1])
        features = jax.lax.dynamic_update_slice_in_dim(
            features, new, channels, axis=-1
        )
        moments.append(batch_moments(new))
        channels += new.shape[-1]
    moments = concatenate_moments(moments)
    output = Output(features, moments, bottleneck_moments)
    kept = bottlenecks if settings.keep_bottlenecks else None
    return output, (output, layers, keys, kept)


def _backward(settings, residuals, cotangents):
    (features, moments, bottleneck_moments), layers, keys, bottlenecks = (
        residuals
    )
    # Gradients of the features, one a reader, not yet added up: they are for a
    # layer's own channels when it needs them, and for all when many are held.
    pending, moments_gradient = [cotangents.features], cotangents.moments
    gradients = []
    for i in reversed(range(len(layers))):
        layer = layers[i]
        first, second = _functions(settings, layer, keys[i])
        channels = layer["norm1"]["scale"].size
        own = slice(channels, channels + _growth_rate(layer))
        new = _through_moments(
            _total(pending, own),
            features[..., own],
            _slice(moments, channels, None),
            _slice(moments_gradient, channels, None),
        )
        # What is made of x waits for this gradient, what is made with moments
        # for those of later layers: XLA cannot know these zeros. XLA:CPU drops
        # a barrier, and for TPUs it copies what waits behind one into another
        # layout.
        x = features + 0 * new[:, :1, :1, :1]
        x, x_moments = x[..., :channels], _slice(moments, 0, channels)
        bottleneck, first_vjp = jax.vjp(first, _stage(layer, 1), x, x_moments)
        layer_gradient = {}
        if second:
            if bottlenecks is not None:
                bottleneck = bottlenecks[i]
            zero = 0 * moments_gradient.mean[0]
            waiting = Moments(
                *(store(m + zero, settings.form) for m in bottleneck_moments[i])
            )
            _, second_vjp = jax.vjp(
                second, _stage(layer, 2), bottleneck, waiting
            )
            stage, new, new_moments = second_vjp(new)
            layer_gradient |= stage
            new = _through_moments(
                new, bottleneck, bottleneck_moments[i], new_moments
            )
        stage, x_gradient, x_moments_gradient = first_vjp(new)
        gradients.append(layer_gradient | stage)
        pending.append(x_gradient)
        if len(pending) > _MAX_PENDING:
            total = _total(pending, slice(channels)).astype(features.dtype)
            pending = [store(total, settings.form)]
        moments_gradient = jax.tree.map(
            jnp.add, _slice(moments_gradient, 0, channels), x_moments_gradient
        )
        moments = x_moments
    own = slice(moments.mean.size)
    x_gradient = _through_moments(
        _total(pending, own), features[..., own], moments, moments_gradient
    )
    return x_gradient, gradients[::-1], None


dense_block.defvjp(_forward, _backward)


def _functions(settings, layer, keys):
    """What the first and the second convolution and their norms do."""
    first = functools.partial(_norm_relu_conv, settings, keys[0])
    if "conv2" not in layer:
        return first, None
    return first, functools.partial(_norm_relu_conv, settings, keys[1])


def _norm_relu_conv(settings, key, stage, x, moments):
    (norm,) = (name for name in stage if name.startswith("norm"))
    (conv,) = (name for name in stage if name.startswith("conv"))
    dropout = nn.Dropout(
        settings.dropout_rate, deterministic=False, parent=None
    )
    with jax.named_scope(norm):
        affine = normalisation(
            **stage[norm], moments=moments, epsilon=settings.norm_epsilon
        )
        x = nn.relu(affine(x).astype(settings.dtype))
    with jax.named_scope(conv):
        kernel = stage[conv]["kernel"].astype(settings.dtype)
        y = convolve(x, kernel, 1, kernel.shape[0] // 2, settings.form)
        return dropout.apply({}, y, rng=key)


def _stage(layer, number):
    return {k: layer[k] for k in (f"norm{number}", f"conv{number}")}


def _growth_rate(layer):
    return layer["conv2" if "conv2" in layer else "conv1"]["kernel"].shape[-1]


def _slice(moments, start, stop):
    return Moments(*(m[start:stop] for m in moments))


def _total(gradients, channels):
    return sum(at_least_float32(g[..., channels]) for g in gradients)


def _through_moments(gradient, x, moments, moments_gradient):
    """Adds to the gradient of x what reaches x by way of its moments."""
    count = x.size // x.shape[-1]
    factor = moments_gradient.variance * (2 / count)
    offset = moments_gradient.mean / count - factor * moments.mean
    more = Affine(factor, offset)(x)
    return (gradient.astype(more.dtype) + more).astype(x.dtype)
