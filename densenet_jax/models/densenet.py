"""DenseNet, in the order of the paper.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional
Networks, CVPR 2017, arXiv 1608.06993 ("the paper" below). All feature maps are
[batch, height, width, channels]. The parameter tree has torchvision's names.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from densenet_jax.models import geometry, recompute
from densenet_jax.models.layer_options import LayerOptions, layer_options
from densenet_jax.models.layers import Maps, at_least_float32, concatenate
from densenet_jax.models.options import (
    REMAT_POLICIES,
    NetAttributes,
    check_images,
    drop_path_rates,
)
from densenet_jax.models.stages import SqueezeExcite, StagedLayer, drop_path
from densenet_jax.models.windows import blur_pool

__all__ = ["REMAT_POLICIES", "DenseBlock", "DenseLayer", "DenseNet"]


class DenseLayer(StagedLayer):
    """H_l: norm-ReLU-conv, or norm-ReLU-1x1 conv-norm-ReLU-3x3 conv.

    Paper, section 3, "Composite function" and "Bottleneck layers".
    """

    @property
    def stages(self) -> list[str]:
        stages = ["bottleneck"] if self.options.bottleneck_width else []
        stages.append("new_features")
        stages += ["recalibrate"] if self.options.squeeze_excite else []
        return stages + (["drop_path"] if self.drop_path_rate else [])

    def setup(self):
        options, k = self.options, self.growth_rate
        self.norm1 = options.norm_layer()
        if options.bottleneck_width:
            self.conv1 = options.conv(options.bottleneck_width * k, 1)
            self.norm2 = options.norm_of_conv()
            self.conv2 = options.conv(k, 3, padding=1)
        else:
            self.conv1 = options.conv(k, 3, padding=1)
        if options.squeeze_excite:
            reduced = geometry.squeezed(k, options.squeeze_excite)
            self.se = SqueezeExcite(reduced, options)

    def bottleneck(self, x: Maps, train: bool, key: jax.Array | None):
        return self._composite(self.norm1, self.conv1, x, train, key)

    def new_features(self, x: Maps, train: bool, key: jax.Array | None):
        if self.options.bottleneck_width:
            return self._composite(self.norm2, self.conv2, x, train, key)
        return self._composite(self.norm1, self.conv1, x, train, key)

    def _composite(self, norm, conv, x, train, key):
        y = conv(self.options.activate(norm(x, train)))
        return self.options.dropout(y, train, key)

    def recalibrate(self, x: Maps, train: bool, key: jax.Array | None):
        return self.se(x.array)

    def drop_path(self, x: Maps, train: bool, key: jax.Array | None):
        return drop_path(x.array, self.drop_path_rate, train, key)


class DenseBlock(nn.Module):
    """Dense layers, each of which reads all the feature maps before it.

    Attributes:
      growth_rates, drop_path_rates: of each layer.
      layer: the class of the layers.
      remat: a key of REMAT_POLICIES.
      options: what the layers share.
    """

    growth_rates: Sequence[int]
    drop_path_rates: Sequence[float]
    layer: type[nn.Module]
    remat: str
    options: LayerOptions

    def setup(self):
        for i, layer in enumerate(self._make_layers(), 1):
            setattr(self, f"denselayer{i}", layer)

    @property
    def layers(self) -> list[nn.Module]:
        numbers = range(1, len(self.growth_rates) + 1)
        return [getattr(self, f"denselayer{i}") for i in numbers]

    def __call__(self, x: jax.Array, train: bool) -> Maps:
        """Maps c channels to c + sum(growth_rates), oldest first."""
        function = functools.partial(_dense_block, train=train)
        if train and recompute.has_own_backward(self.layer, self.remat):
            function = recompute.by_stages(
                function,
                self._make_layers(parent=None),
                measure=functools.partial(self.options.measure, train=True),
                keep_stages=self.remat == "convs",
                materialize=self.options.ops.materialize,
            )
        return function(self, x)

    def _make_layers(self, **kwargs) -> list[nn.Module]:
        layer = recompute.wrap_layer(self.layer, self.remat)
        rates = zip(self.growth_rates, self.drop_path_rates)
        return [layer(k, p, self.options, **kwargs) for k, p in rates]


def _dense_block(block: DenseBlock, x: jax.Array, train: bool) -> Maps:
    """Paper, equation 2: x_l = H_l([x_0, x_1, ..., x_{l-1}])."""
    features = [block.options.measure(x, train)]
    for layer in block.layers:
        new = layer(features, train)
        features.append(block.options.measure(new, train))
    return concatenate(features)


class Transition(nn.Module):
    """Norm-ReLU-1x1 conv-2x2 average pool (paper, section 3, "Pooling").

    With blur_pool='all' a blur takes the place of the average pool.
    """

    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> jax.Array:
        """Halves height and width."""
        y = self.options.norm_layer(name="norm")(x, train)
        conv = self.options.conv(self.features, 1, name="conv")
        y = self.options.activate(y)
        blur = self.options.blur_pool == "all"
        dropout_rate = self.options.dropout_rate if train else 0.0
        if not (blur or dropout_rate):
            return conv(y, pool=2)
        y = nn.Dropout(dropout_rate, deterministic=False)(conv(y))
        return blur_pool(y) if blur else self.options.ops.average_pool(y, 2)


class DenseNet(NetAttributes):
    """The network of the paper: stem, dense blocks with transitions, head.

    Attributes:
      dense_layer: the class of the dense layers (see `stages.StagedLayer`); all
        other attributes are documented in `options.NetAttributes`.
    """

    dense_layer: type[nn.Module] = DenseLayer

    def setup(self):
        self.options = layer_options(self)
        blocks = geometry.blocks(self)
        for path, kind, _, features, size, stride, *_ in geometry.stem(self):
            if kind == "conv":
                conv = self.options.stem_conv(features, size, stride)
                setattr(self, path, conv)
            elif kind == "norm":
                setattr(self, path, self.options.norm_of_conv())
        for i, (block, rates) in enumerate(
            zip(blocks, drop_path_rates(self)), 1
        ):
            remat = recompute.block_policy(self.remat, i, len(blocks))
            dense_block = DenseBlock(
                block.growth_rates, rates, self.dense_layer, remat, self.options
            )
            setattr(self, f"denseblock{i}", dense_block)
            if block.compressed is not None:
                transition = Transition(block.compressed, self.options)
                setattr(self, f"transition{i}", transition)
        self.norm5 = self.options.norm_layer()
        self.classifier = self.options.linear(self.num_classes)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
          images: [batch, height, width, channels], normalised; any number of
            channels, any size from `geometry.min_image_size` on.
          train: normalise with batch moments, update batch_stats, drop out
            (needs the rng 'dropout' where something is dropped).

        Returns:
          Logits [batch, num_classes], float32.

        Raises:
          ValueError: images of another rank, or too small; train, and the
            norms are folded.
        """
        return self.head(self.features(images, train)[-1])

    def features(
        self, images: jax.Array, train: bool = False
    ) -> list[jax.Array]:
        """The feature maps of the stem and of each block, finest first.

        With the 'imagenet' and 'deep' stems they lie at strides 2, 4, 8, 16 and
        so on: stem before its pool, then each block's output; with the 'cifar'
        stem at strides 1, 1, 2, 4. The last has passed the final norm and ReLU.

        Args and raises: as `__call__`.
        """
        check_images(self, images.shape, train)
        x = images
        for i in range(len(geometry.stem_widths(self))):
            x = getattr(self, f"conv{i}")(x)
            if self.stem_norm:
                norm = getattr(self, f"norm{i}")
                x = norm(self.options.measure(x, train), train)
                x = self.options.activate(x)
        maps = [x]
        if geometry.has_stem_pool(self):
            x = self.options.stem_pool(x)
        for i in range(1, len(self.block_layers) + 1):
            block = getattr(self, f"denseblock{i}")(x, train)
            if i < len(self.block_layers):
                maps.append(block.array)
                x = getattr(self, f"transition{i}")(block, train)
        x = self.options.activate(self.norm5(block, train))
        return [*maps, x]

    def head(self, x: jax.Array) -> jax.Array:
        """Logits [batch, num_classes] of the last feature map: mean, linear."""
        pooled = jnp.mean(at_least_float32(x), axis=(1, 2))
        return self.classifier(pooled)
