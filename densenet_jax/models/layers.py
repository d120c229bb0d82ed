"""Convolution, normalisation and pooling: what every DenseNet is made of.

All arrays are [batch, height, width, channels]. What depends on the platform
is in `platforms`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from densenet_jax.models.ops import average_pool, convolve, max_pool

KERNEL_INITS: dict[str, Callable] = {
    # The authors' code: normal, std sqrt(2 / (height * width * out)).
    "fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    # torchvision and timm: normal, std sqrt(2 / (height * width * in)).
    "fan_in": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
}


class Moments(NamedTuple):
    """Batch mean and biased variance of each channel, float32 [channels]."""

    mean: jax.Array
    variance: jax.Array


def at_least_float32(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 if it is."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


class Affine(NamedTuple):
    """x -> x * factor + offset, channel by channel; both float32 [channels]."""

    factor: jax.Array
    offset: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., channels]; the result is float32 or wider."""
        factor, offset = (jnp.expand_dims(v, range(x.ndim - 1)) for v in self)
        return x.astype(factor.dtype) * factor + offset


def normalisation(
    scale: jax.Array, bias: jax.Array, moments: Moments, epsilon: float
) -> Affine:
    """x -> (x - mean) / sqrt(variance + epsilon) * scale + bias."""
    factor = scale * lax.rsqrt(moments.variance + epsilon)
    return Affine(factor, bias - moments.mean * factor)


def batch_moments(x: jax.Array) -> Moments:
    """The moments of x [batch, height, width, channels] over all but channels.

    Under jit with a sharded batch the moments are those of the global batch.
    """
    x = at_least_float32(x)
    mean = jnp.mean(x, axis=(0, 1, 2))
    mean_of_squares = jnp.mean(jnp.square(x), axis=(0, 1, 2))
    variance = jnp.maximum(mean_of_squares - jnp.square(mean), 0)
    return Moments(mean, variance)


def concatenate_moments(moments: Sequence[Moments]) -> Moments:
    """The moments of feature maps that are concatenated on channels."""
    return Moments(*(jnp.concatenate(part) for part in zip(*moments)))


class Conv(nn.Module):
    """A convolution: parameter `kernel` [size, size, in, out].

    With use_bias also parameter `bias` [out].
    """

    features: int
    size: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = False
    kernel_init: str = "fan_out"
    dtype: jnp.dtype = jnp.float32
    form: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", KERNEL_INITS[self.kernel_init], shape)
        y = convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.stride,
            self.padding,
            self.form,
        )
        if self.use_bias:
            shape = (self.features,)
            bias = self.param("bias", nn.initializers.zeros, shape)
            y = y + jnp.expand_dims(bias, (0, 1, 2)).astype(self.dtype)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's running statistics.

    The batch is normalised with its biased variance; the running variance is
    an average of the unbiased one, n / (n - 1) larger, where n is the number
    of values a channel has in the batch. Arithmetic is in float32 or wider,
    the result in `dtype`.

    Parameters `scale` and `bias`, batch_stats `mean` and `var`, all [channels].
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, moments: Moments | None = None, *, train: bool
    ) -> jax.Array:
        """Normalises x.

        Args:
          x: [batch, height, width, channels].
          moments: of x, where they are known already; used if train.
          train: normalise with the moments of x and move the running
            statistics towards them; else normalise with the latter.

        Raises:
          ValueError: train, and x has one value a channel.
        """
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        if train:
            moments = batch_moments(x) if moments is None else moments
            self.update(moments, x.size // x.shape[-1])
        else:
            moments = Moments(mean.value, var.value)
        affine = normalisation(scale, bias, moments, self.epsilon)
        return affine(x).astype(self.dtype)

    def update(self, moments: Moments, count: int) -> None:
        """Moves the running statistics towards a batch's.

        Args:
          moments: of the batch.
          count: the number of values that a channel has in the batch.

        Raises:
          ValueError: count is 1.
        """
        if count < 2:
            raise ValueError(
                f"{'/'.join(self.path)} cannot normalise a batch with one "
                "value a channel: it needs 2 values or more to train. Use a "
                "larger batch or larger images."
            )
        if self.is_initializing():
            return
        unbiased = moments.variance * (count / (count - 1))
        for name, batch in ("mean", moments.mean), ("var", unbiased):
            running = self.get_variable("batch_stats", name)
            moved = self.momentum * running + (
                1 - self.momentum
            ) * lax.stop_gradient(batch)
            self.put_variable("batch_stats", name, moved.astype(running.dtype))


class MaxPool(nn.Module):
    """See `platforms.max_pool`."""

    size: int
    stride: int
    padding: int = 0
    form: str = "auto"

    def __call__(self, x: jax.Array) -> jax.Array:
        return max_pool(x, self.size, self.stride, self.padding, self.form)


class AveragePool(nn.Module):
    """See `platforms.average_pool`."""

    size: int
    form: str = "auto"

    def __call__(self, x: jax.Array) -> jax.Array:
        return average_pool(x, self.size, self.form)
