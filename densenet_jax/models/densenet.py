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
    KERNEL_INITS,
    AveragePool,
    BatchNorm,
    Conv,
    MaxPool,
    Moments,
    at_least_float32,
    batch_moments,
    concatenate_moments,
)
from densenet_jax.models.ops import FORMS, convolve_and_pool
from densenet_jax.models.recompute import Settings, dense_block

STEMS = ("imagenet", "cifar")

# What the forward pass keeps for the backward pass; the rest is recomputed.
# (Pleiss et al., Memory-Efficient Implementation of DenseNets, 1707.06990.)
REMAT_POLICIES = {
    "none": "every activation is kept",
    "convs": "conv outputs are kept; concatenation, norm and ReLU recomputed",
    "half": "as 'layer' in the first half of the blocks, else as 'convs'",
    "layer": "the outputs of the dense layers are kept, bottlenecks recomputed",
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

    def setup(self):
        new = functools.partial(self.conv, self.growth_rate, 3, padding=1)
        self.norm1 = self.norm()
        if self.bottleneck_width:
            width = self.bottleneck_width * self.growth_rate
            self.conv1 = self.conv(width, 1, use_bias=self.folded)
            if not self.folded:
                self.norm2 = self.norm()
            self.conv2 = new()
        else:
            self.conv1 = new()
        self.dropout = nn.Dropout(self.dropout_rate)

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
        keys = self.dropout_keys(train)
        x = jnp.concatenate(features, axis=-1)
        moments = concatenate_moments(moments) if train else None
        x = nn.relu(self.norm1(x, moments, train=train))
        x = self.dropout(self.conv1(x), deterministic=not train, rng=keys[0])
        if not self.bottleneck_width:
            return x
        if not self.folded:
            x = self.norm2(x, train=train)
        x = self.conv2(nn.relu(x))
        return self.dropout(x, deterministic=not train, rng=keys[1])

    def dropout_keys(self, train: bool) -> tuple[jax.Array | None, ...]:
        """The keys of the dropout after each convolution; None without."""
        if not (train and self.dropout_rate):
            return None, None
        return self.make_rng("dropout"), self.make_rng("dropout")

    def update_statistics(
        self, moments: Moments, bottleneck: Moments | None, count: int
    ) -> None:
        """Moves the running statistics towards a batch's.

        Args:
          moments: of all the feature maps before.
          bottleneck: of the output of the 1x1 convolution, if there is one.
          count: the number of values that a channel has in the batch.
        """
        self.norm1.update(moments, count)
        if bottleneck is not None:
            self.norm2.update(bottleneck, count)


class DenseBlock(nn.Module):
    """Dense layers, each of which reads all the feature maps before it.

    Paper, equation 2: x_l = H_l([x_0, x_1, ..., x_{l-1}]).
    """

    num_layers: int
    layer: Callable[..., DenseLayer]
    recompute: Settings | None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool
    ) -> tuple[jax.Array, Moments | None]:
        """Maps c channels to c + num_layers * growth_rate, oldest first.

        Returns:
          The feature maps, and their batch moments if train.
        """
        layers = [
            self.layer(name=f"denselayer{i}")
            for i in range(1, self.num_layers + 1)
        ]
        if train and self.recompute and not self.is_initializing():
            return self._recomputing(x, layers)
        # Every reader normalises a feature map with the same batch moments,
        # so they are computed once, when the map is made.
        features = [x]
        moments = [batch_moments(x)] if train else None
        for layer in layers:
            new = layer(features, moments, train)
            features = [*features, new]
            moments = [*moments, batch_moments(new)] if train else None
        x = jnp.concatenate(features, axis=-1)
        return x, concatenate_moments(moments) if train else None

    def _recomputing(self, x, layers):
        """The same, by `dense_block`."""
        features, moments, bottlenecks = dense_block(
            self.recompute,
            x,
            [layer.variables["params"] for layer in layers],
            [layer.dropout_keys(train=True) for layer in layers],
        )
        count = x.size // x.shape[-1]
        channels = x.shape[-1]
        for i, layer in enumerate(layers):
            read = Moments(*(m[:channels] for m in moments))
            bottleneck = bottlenecks[i] if bottlenecks else None
            layer.update_statistics(read, bottleneck, count)
            channels += layer.growth_rate
        return features, moments


class Transition(nn.Module):
    """Norm-ReLU-1x1 conv-2x2 average pool (paper, section 3, "Pooling")."""

    features: int
    dropout_rate: float
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    form: str

    @nn.compact
    def __call__(
        self, x: jax.Array, moments: Moments | None, train: bool
    ) -> jax.Array:
        """Halves height and width; moments are those of x, if train."""
        x = nn.relu(self.norm(name="norm")(x, moments, train=train))
        conv = self.conv(self.features, 1, name="conv")
        if self.is_initializing() or (train and self.dropout_rate):
            x = conv(x)
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            return AveragePool(2, self.form, name="pool")(x)
        kernel = conv.variables["params"]["kernel"]
        return convolve_and_pool(x, kernel.astype(x.dtype), 2, self.form)


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
      form: of convolutions and pools: 'auto' for what suits the device, or a
        key of `platforms.FORMS`.
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
    form: str = "auto"
    folded: bool = False

    def __post_init__(self):
        check_choice("stem", self.stem, STEMS)
        check_choice("kernel_init", self.kernel_init, KERNEL_INITS)
        check_choice("remat policy", self.remat, REMAT_POLICIES)
        check_choice("form", self.form, ("auto", *FORMS))
        for name, (inside, expected) in _RANGES.items():
            value = getattr(self, name)
            if not inside(value):
                raise ValueError(f"{name} is {value!r}: must be {expected}.")
        _transition_features(self)
        super().__post_init__()

    def setup(self):
        conv = functools.partial(
            Conv,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            form=self.form,
        )
        norm = functools.partial(
            BatchNorm,
            epsilon=self.norm_epsilon,
            momentum=self.norm_momentum,
            dtype=self.dtype,
        )
        layer = functools.partial(
            DenseLayer,
            growth_rate=self.growth_rate,
            bottleneck_width=self.bottleneck_width,
            dropout_rate=self.dropout_rate,
            folded=self.folded,
            conv=conv,
            norm=norm,
        )
        channels = self.stem_features or 2 * self.growth_rate
        stem_conv = functools.partial(
            conv, channels, use_bias=self.folded and self.stem_norm
        )
        if self.stem == "imagenet":
            self.conv0 = stem_conv(7, stride=2, padding=3)
            self.pool0 = MaxPool(3, stride=2, padding=1, form=self.form)
        else:
            self.conv0 = stem_conv(3, padding=1)
        if self.stem_norm and not self.folded:
            self.norm0 = norm()

        for i, num_layers in enumerate(self.block_layers, 1):
            block = DenseBlock(num_layers, layer, self._recompute(i))
            setattr(self, f"denseblock{i}", block)
        for i, features in enumerate(_transition_features(self), 1):
            transition = Transition(
                features, self.dropout_rate, conv, norm, self.form
            )
            setattr(self, f"transition{i}", transition)
        self.norm5 = norm()
        self.classifier = nn.Dense(
            self.num_classes, kernel_init=TORCH_LINEAR_INIT
        )

    def _recompute(self, block: int) -> Settings | None:
        """How the block of this number, from 1, recomputes; None: not."""
        if self.remat == "none":
            return None
        late = block > len(self.block_layers) / 2
        return Settings(
            norm_epsilon=self.norm_epsilon,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            keep_bottlenecks=self.remat == "convs"
            or (self.remat == "half" and late),
            form=self.form,
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
            x, moments = getattr(self, f"denseblock{i}")(x, train)
            if i < len(self.block_layers):
                maps.append(x)
                x = getattr(self, f"transition{i}")(x, moments, train)
        return [*maps, nn.relu(self.norm5(x, moments, train=train))]

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
