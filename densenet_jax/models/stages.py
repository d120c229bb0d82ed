"""A dense layer as a sequence of named stages; what ablations add to one."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from densenet_jax.models.layer_options import LayerOptions
from densenet_jax.models.layers import Maps, at_least_float32, concatenate


class StagedLayer(nn.Module):
    """A layer of a dense block whose backward pass can keep what stages make.

    Subclasses define `stages`: the names of methods
    (x: Maps, train: bool, key: jax.Array | None) -> jax.Array. The first reads
    all the feature maps before, each other one the output of the one before it,
    with its moments; the last makes growth_rate channels. Random numbers come
    from `key`, another one for each stage.

    Any other module with these attributes and this `__call__` will do for
    `DenseNet.dense_layer` too; `nn.remat` serves all policies of such a layer.

    Attributes:
      growth_rate: k, the number of channels that the layer adds.
      drop_path_rate: how often an example goes without them in training.
      options: what all layers of the net share.
    """

    growth_rate: int
    drop_path_rate: float
    options: LayerOptions

    def __call__(self, features: Sequence[Maps], train: bool) -> jax.Array:
        """Makes growth_rate new channels of all the feature maps before.

        Args:
          features: x_0, ..., x_{l-1}, oldest first.
          train: as in `DenseNet`.
        """
        x = concatenate(features)
        *inner, last = self.stages
        for stage in inner:
            y = getattr(self, stage)(x, train, self.stage_key(train))
            x = self.options.measure(y, train)
        return getattr(self, last)(x, train, self.stage_key(train))

    def stage_key(self, train: bool) -> jax.Array | None:
        """A key for the random numbers of the next stage."""
        random = train and self.has_rng("dropout")
        return self.make_rng("dropout") if random else None


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: a gate for each channel of each example.

    Hu et al., 1709.01507, equations 2 to 4: mean over pixels, linear layer,
    activation, linear layer, sigmoid.
    """

    reduced: int
    options: LayerOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales x [batch, height, width, channels]."""
        linear, activate = self.options.linear, self.options.activate
        pooled = jnp.mean(at_least_float32(x), axis=(1, 2))
        reduced = activate(linear(self.reduced, name="squeeze")(pooled))
        gates = nn.sigmoid(linear(x.shape[-1], name="excite")(reduced))
        return x * jnp.expand_dims(gates.astype(x.dtype), (1, 2))


def drop_path(
    x: jax.Array, rate: float, train: bool, key: jax.Array | None
) -> jax.Array:
    """Stochastic depth (Huang et al., 1603.09382), for each example alone.

    In training the maps of an example are zero with probability `rate`, and are
    divided by 1 - rate otherwise.
    """
    drop = nn.Dropout(rate, broadcast_dims=(1, 2, 3), parent=None)
    return drop.apply({}, x, deterministic=not train, rng=key)
