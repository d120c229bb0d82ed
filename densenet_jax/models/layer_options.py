"""What the layers of a net share, made of its attributes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from densenet_jax.models.layers import (
    ACTIVATIONS,
    Conv,
    FoldedNorm,
    Maps,
    Norm,
    measure,
)
from densenet_jax.models.ops import Operations, operations
from densenet_jax.models.options import TORCH_LINEAR_INIT, NetAttributes
from densenet_jax.models.windows import blur_pool, pad_same


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """What all layers of a net share; see `NetAttributes`."""

    activation: str
    norm: str
    norm_groups: int
    norm_epsilon: float
    norm_momentum: float
    bottleneck_width: int
    stem_padding: str
    blur_pool: str
    dropout_rate: float
    squeeze_excite: int
    kernel_init: str
    dtype: jnp.dtype
    folded: bool
    ops: Operations

    def conv(self, features: int, size: int, **kwargs) -> Conv:
        return Conv(
            features,
            size,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            ops=self.ops,
            **kwargs,
        )

    def stem_conv(self, features: int, size: int, stride: int) -> Conv:
        same = self.stem_padding == "same"
        padding = "same" if same else size // 2
        return self.conv(features, size, stride=stride, padding=padding)

    def stem_pool(self, x: jax.Array) -> jax.Array:
        if self.blur_pool != "none":
            return blur_pool(self.ops.max_pool(x, 3, 1, 1))
        if self.stem_padding == "same":
            return self.ops.max_pool(pad_same(x, 3, 2, -jnp.inf), 3, 2, 0)
        return self.ops.max_pool(x, 3, 2, 1)

    def norm_layer(self, **kwargs) -> Norm:
        return Norm(
            kind=self.norm,
            num_groups=self.norm_groups,
            epsilon=self.norm_epsilon,
            momentum=self.norm_momentum,
            dtype=self.dtype,
            **kwargs,
        )

    def norm_of_conv(self) -> Norm | FoldedNorm:
        """A norm that alone reads the output of a convolution."""
        return FoldedNorm(self.dtype) if self.folded else self.norm_layer()

    def linear(self, features: int, **kwargs) -> nn.Dense:
        """A linear layer in float32, as PyTorch begins, but with bias 0."""
        return nn.Dense(features, kernel_init=TORCH_LINEAR_INIT, **kwargs)

    def activate(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.activation](x)

    def measure(self, x: jax.Array, train: bool) -> Maps:
        return measure(x, self.norm, train)

    def dropout(
        self, x: jax.Array, train: bool, key: jax.Array | None
    ) -> jax.Array:
        drop = nn.Dropout(self.dropout_rate, parent=None)
        return drop.apply({}, x, deterministic=not train, rng=key)


def layer_options(model: NetAttributes) -> LayerOptions:
    """The options of a model's layers, for the device they are traced for."""
    shared = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(LayerOptions)
        if field.name != "ops"
    }
    return LayerOptions(**shared, ops=operations(model.implementation))
