"""DenseNet as JAX ports are usually written: the baseline, not for use.

flax's nn.Conv, nn.BatchNorm and a concatenation in every dense layer. The
parameter tree is that of `densenet_jax.models.densenet.DenseNet`, so that
both compute the same from the same variables. One thing differs: flax's
running variance is the biased one.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import compressed
from densenet_jax.models.options import unseen_differences


def plain_port(model: DenseNet) -> "PlainDenseNet":
    """The plain port of a model without dropout.

    Raises:
      ValueError: the port has no such stem or pools.
    """
    usual = model.clone(
        stem_stride=None,
        stem_pool=None,
        stem_padding="explicit",
        blur_pool="none",
    )
    others = unseen_differences(model, usual)
    others += ["stem"] if model.stem == "deep" else []
    if others:
        raise ValueError(
            f"The plain port cannot have the model's {', '.join(others)}: take "
            "a net of the paper."
        )
    names = {field.name for field in dataclasses.fields(PlainDenseNet)}
    names -= {"parent", "name"}
    return PlainDenseNet(**{name: getattr(model, name) for name in names})


class _DenseLayer(nn.Module):
    growth_rate: int
    bottleneck_width: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm(name="norm1")(x))
        if not self.bottleneck_width:
            y = self.conv(self.growth_rate, (3, 3), name="conv1")(y)
        else:
            width = self.bottleneck_width * self.growth_rate
            y = self.conv(width, (1, 1), name="conv1")(y)
            y = nn.relu(self.norm(name="norm2")(y))
            y = self.conv(self.growth_rate, (3, 3), name="conv2")(y)
        return jnp.concatenate([x, y], axis=-1)


class _DenseBlock(nn.Module):
    num_layers: int
    layer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        for i in range(1, self.num_layers + 1):
            x = self.layer(name=f"denselayer{i}")(x)
        return x


class _Transition(nn.Module):
    features: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm(name="norm")(x))
        x = self.conv(self.features, (1, 1), name="conv")(x)
        return nn.avg_pool(x, (2, 2), strides=(2, 2))


class PlainDenseNet(nn.Module):
    """The network; attributes as those of `DenseNet`."""

    block_layers: Sequence[int]
    growth_rate: int
    compression: float
    bottleneck_width: int
    stem: str
    stem_norm: bool
    stem_features: int | None
    num_classes: int
    norm_epsilon: float
    norm_momentum: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, 3]."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            epsilon=self.norm_epsilon,
            momentum=self.norm_momentum,
            dtype=self.dtype,
        )
        layer = functools.partial(
            _DenseLayer, self.growth_rate, self.bottleneck_width, conv, norm
        )
        channels = self.stem_features or 2 * self.growth_rate
        if self.stem == "imagenet":
            stem = conv(channels, (7, 7), strides=2, padding=3, name="conv0")
        else:
            stem = conv(channels, (3, 3), name="conv0")
        x = stem(images)
        if self.stem_norm:
            x = nn.relu(norm(name="norm0")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for i, num_layers in enumerate(self.block_layers, 1):
            x = _DenseBlock(num_layers, layer, name=f"denseblock{i}")(x)
            if i < len(self.block_layers):
                features = compressed(x.shape[-1], self.compression)
                x = _Transition(features, conv, norm, name=f"transition{i}")(x)
        x = nn.relu(norm(name="norm5")(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, name="classifier")(x)
