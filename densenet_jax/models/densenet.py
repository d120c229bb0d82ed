"""DenseNet, in the order of the paper.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional
Networks, CVPR 2017, arXiv 1608.06993 ("the paper" below). All feature maps are
[batch, height, width, channels]. The parameter tree has torchvision's names.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from densenet_jax.choices import check_choice
from densenet_jax.models.layers import (
    CONV_OUTPUT,
    KERNEL_INITS,
    MOMENTS,
    AveragePool,
    BatchNorm,
    Conv,
    MaxPool,
    Moments,
    at_least_float32,
    batch_moments,
    concatenate_moments,
)

STEMS = ("imagenet", "cifar")

# What the forward pass keeps for the backward pass; the rest is recomputed.
# (Pleiss et al., Memory-Efficient Implementation of DenseNets, 1707.06990.)
REMAT_POLICIES = {
    "none": "every activation is kept",
    "convs": "conv outputs are kept; concatenation, norm and ReLU recomputed",
    "layer": "the output of each dense layer is kept",
    "block": "the input of each dense block is kept",
}

# Torch's initial weights: uniform within 1 / sqrt(in).
TORCH_LINEAR_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_RANGES = {
    "block_layers": (
        lambda v: len(v) > 0 and all(n > 0 for n in v),
        "one or more positive numbers of layers",
    ),
    "growth_rate": (lambda v: v > 0, "positive"),
    "compression": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "bottleneck_width": (lambda v: v >= 0, "0 (no bottleneck) or more"),
    "stem_features": (lambda v: v is None or v > 0, "positive or None"),
    "num_classes": (lambda v: v > 0, "positive"),
    "dropout_rate": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "norm_epsilon": (lambda v: v > 0, "positive"),
    "norm_momentum": (lambda v: 0 <= v <= 1, "in [0, 1]"),
}


class DenseLayer(nn.Module):
    """H_l: norm-ReLU-conv, or norm-ReLU-1x1 conv-norm-ReLU-3x3 conv.

    Paper, section 3, "Composite function" and "Bottleneck layers".
    """

    growth_rate: int
    bottleneck_width: int
    dropout_rate: float
    folded: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self,
        features: Sequence[jax.Array],
        moments: Sequence[Moments] | None,
        train: bool,
    ) -> jax.Array:
        """Makes growth_rate new channels of all the feature maps before.

        Args:
          features: x_0 ... x_{l-1}, oldest first.
          moments: of each of the features; read only if train.
          train: as in `DenseNet`.
        """
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        x = jnp.concatenate(features, axis=-1)
        moments = concatenate_moments(moments) if train else None
        x = nn.relu(self.norm(name="norm1")(x, moments, train=train))
        if not self.bottleneck_width:
            return dropout(
                self.conv(self.growth_rate, 3, padding=1, name="conv1")(x)
            )
        width = self.bottleneck_width * self.growth_rate
        x = dropout(self.conv(width, 1, use_bias=self.folded, name="conv1")(x))
        if not self.folded:
            x = self.norm(name="norm2")(x, train=train)
        return dropout(
            self.conv(self.growth_rate, 3, padding=1, name="conv2")(nn.relu(x))
        )


class DenseBlock(nn.Module):
    """Dense layers, each of which reads all the feature maps before it.

    Paper, equation 2: x_l = H_l([x_0, x_1, ..., x_{l-1}]).
    """

    num_layers: int
    layer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps c channels to c + num_layers * growth_rate, oldest first."""
        # Every reader normalises a feature map with the same batch moments,
        # so they are computed once, when the map is made.
        features = [x]
        moments = [batch_moments(x)] if train else None
        for i in range(1, self.num_layers + 1):
            layer = self.layer(name=f"denselayer{i}")
            new = layer(features, moments, train)
            features = [*features, new]
            moments = [*moments, batch_moments(new)] if train else None
        return jnp.concatenate(features, axis=-1)


class Transition(nn.Module):
    """Norm-ReLU-1x1 conv-2x2 average pool (paper, section 3, "Pooling")."""

    features: int
    dropout_rate: float
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(self.norm(name="norm")(x, train=train))
        x = self.conv(self.features, 1, name="conv")(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return AveragePool(2, name="pool")(x)


class DenseNet(nn.Module):
    """The network of the paper: stem, dense blocks with transitions, head.

    Attributes:
      block_layers: the number of dense layers of each block.
      growth_rate: k, the number of channels each dense layer adds.
      compression: theta in (0, 1], the share of channels that a transition
        keeps, rounded down.
      bottleneck_width: the 1x1 convolutions make bottleneck_width * growth_rate
        channels; 0 leaves them out (the plain net).
      stem: 'imagenet' (7x7 conv, stride 2, and a 3x3 max pool, stride 2) or
        'cifar' (3x3 conv).
      stem_norm: whether norm and ReLU follow the stem's conv.
      stem_features: channels of the stem; None is 2 * growth_rate.
      num_classes: the number of logits.
      dropout_rate: after each convolution but the first, when training.
      kernel_init: 'fan_out' (the authors') or 'fan_in' (torchvision's).
      norm_epsilon: added to variances.
      norm_momentum: share of the old running statistics kept at each step;
        PyTorch's momentum is one minus this.
      dtype: of the computation; parameters, statistics and logits are float32.
      remat: what is kept for the backward pass, a key of REMAT_POLICIES.
      folded: norm0 and every norm2 are part of the conv before them, which has
        a bias instead; for inference alone (see `fold_norms`).

    Raises:
      ValueError: on construction, for an attribute outside its range.
    """

    block_layers: Sequence[int]
    growth_rate: int = 32
    compression: float = 0.5
    bottleneck_width: int = 4
    stem: str = "imagenet"
    stem_norm: bool = True
    stem_features: int | None = None
    num_classes: int = 1000
    dropout_rate: float = 0.0
    kernel_init: str = "fan_out"
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    folded: bool = False

    def __post_init__(self):
        check_choice("stem", self.stem, STEMS)
        check_choice("kernel_init", self.kernel_init, KERNEL_INITS)
        check_choice("remat policy", self.remat, REMAT_POLICIES)
        for name, (inside, expected) in _RANGES.items():
            value = getattr(self, name)
            if not inside(value):
                raise ValueError(f"{name} is {value!r}: must be {expected}.")
        _transition_features(self)
        super().__post_init__()

    def setup(self):
        conv = functools.partial(
            Conv, kernel_init=self.kernel_init, dtype=self.dtype
        )
        norm = functools.partial(
            BatchNorm,
            epsilon=self.norm_epsilon,
            momentum=self.norm_momentum,
            dtype=self.dtype,
        )
        layer = functools.partial(
            _remat_layer(self.remat),
            growth_rate=self.growth_rate,
            bottleneck_width=self.bottleneck_width,
            dropout_rate=self.dropout_rate,
            folded=self.folded,
            conv=conv,
            norm=norm,
        )
        block = DenseBlock
        if self.remat == "block":
            block = nn.remat(DenseBlock, static_argnums=2)
        channels = self.stem_features or 2 * self.growth_rate
        stem_conv = functools.partial(
            conv, channels, use_bias=self.folded and self.stem_norm
        )
        if self.stem == "imagenet":
            self.conv0 = stem_conv(7, stride=2, padding=3)
            self.pool0 = MaxPool(3, stride=2, padding=1)
        else:
            self.conv0 = stem_conv(3, padding=1)
        if self.stem_norm and not self.folded:
            self.norm0 = norm()

        for i, num_layers in enumerate(self.block_layers, 1):
            setattr(self, f"denseblock{i}", block(num_layers, layer))
        for i, features in enumerate(_transition_features(self), 1):
            transition = Transition(features, self.dropout_rate, conv, norm)
            setattr(self, f"transition{i}", transition)
        self.norm5 = norm()
        self.classifier = nn.Dense(
            self.num_classes, kernel_init=TORCH_LINEAR_INIT
        )

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
          images: [batch, height, width, channels], normalised; any number of
            channels, any size from `min_image_size` on.
          train: normalise with batch moments, update batch_stats, drop out
            (needs the rng 'dropout' where dropout_rate > 0).

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

        With the 'imagenet' stem they lie at strides 2, 4, 8, 16 and so on:
        stem before its pool, then each block's output; with the 'cifar' stem
        at strides 1, 1, 2, 4. The last has passed the final norm and ReLU.

        Args and raises: as `__call__`.
        """
        self._check(images, train)
        x = self.conv0(images)
        if self.stem_norm:
            if not self.folded:
                x = self.norm0(x, train=train)
            x = nn.relu(x)
        maps = [x]
        if self.stem == "imagenet":
            x = self.pool0(x)
        for i in range(1, len(self.block_layers) + 1):
            x = getattr(self, f"denseblock{i}")(x, train)
            if i < len(self.block_layers):
                maps.append(x)
                x = getattr(self, f"transition{i}")(x, train)
        return [*maps, nn.relu(self.norm5(x, train=train))]

    def head(self, x: jax.Array) -> jax.Array:
        """Logits [batch, num_classes] of the last feature map: mean, linear."""
        pooled = jnp.mean(at_least_float32(x), axis=(1, 2))
        return self.classifier(pooled)

    def _check(self, images: jax.Array, train: bool) -> None:
        if train and self.folded:
            raise ValueError(
                "A DenseNet with folded norms cannot train: they have no batch "
                "moments. Train the model that was given to fold_norms, and "
                "fold its variables afterwards."
            )
        smallest = min_image_size(self.stem, len(self.block_layers))
        if images.ndim != 4 or min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"Images of shape {images.shape} do not fit: expected [batch, "
                f"height, width, channels] with height and width of {smallest} "
                f"or more for {len(self.block_layers)} blocks behind the "
                f"{self.stem!r} stem."
            )


def compressed(channels: int, compression: float) -> int:
    """Channels after a transition: floor(theta m) (paper, "Compression")."""
    # 0.29 * 100 is 28.999999999999996 in binary and 29 on paper.
    kept = math.floor(round(channels * compression, 6))
    if not kept:
        raise ValueError(
            f"compression {compression} leaves none of {channels} channels: "
            f"must be at least 1/{channels}."
        )
    return kept


def _transition_features(model: DenseNet) -> list[int]:
    """The channels that each transition makes."""
    channels = model.stem_features or 2 * model.growth_rate
    features = []
    for num_layers in model.block_layers[:-1]:
        channels += num_layers * model.growth_rate
        channels = compressed(channels, model.compression)
        features.append(channels)
    return features


def min_image_size(stem: str, num_blocks: int) -> int:
    """The smallest height or width that leaves one pixel to the last block."""
    pooled = 2 ** (num_blocks - 1)
    # The stem's two strides round up: 4 (pooled - 1) + 1 is enough.
    return 4 * pooled - 3 if stem == "imagenet" else pooled


def _remat_layer(policy: str) -> type[nn.Module]:
    if policy == "convs":
        keep = jax.checkpoint_policies.save_only_these_names(
            CONV_OUTPUT, MOMENTS
        )
        return nn.remat(DenseLayer, policy=keep, static_argnums=3)
    if policy == "layer":
        return nn.remat(DenseLayer, static_argnums=3)
    return DenseLayer
