"""Convolution, normalisation and pooling: what every DenseNet is made of.

All arrays are [batch, height, width, channels]. This is the one place that
knows that platforms differ.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

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


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int
) -> jax.Array:
    """Correlates x with kernel [height, width, in, out], as PyTorch's conv2d.

    Args:
      x: [batch, height, width, in].
      kernel: of the same dtype as x.
      stride: in both directions.
      padding: zeros added on each of the four sides.
    """

    def native(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((padding, padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def product(x, kernel):
        return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))

    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == 0:
        # XLA:CPU runs a 1x1 convolution at a fifth of a product's speed; on
        # TPU the product costs layout changes that the convolution does not.
        return lax.platform_dependent(x, kernel, cpu=product, default=native)
    return native(x, kernel)


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """The mean of each size x size window of x; see `AveragePool`."""
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size

    def window_mean(x):
        x = x[:, : rows * size, : columns * size]
        windows = x.reshape(batch, rows, size, columns, size, channels)
        return jnp.mean(windows, axis=(2, 4))

    def window_sum(x):
        window = (size, size)
        # flax's avg_pool divides by an integer array, a silent promotion.
        return nn.pool(x, 0.0, lax.add, window, window, "VALID") / size**2

    # XLA:CPU is slow at windows; on TPU the longer shape costs a new layout.
    return lax.platform_dependent(x, cpu=window_mean, default=window_sum)


def convolve_and_pool(x: jax.Array, kernel: jax.Array, size: int) -> jax.Array:
    """`average_pool(convolve(x, kernel, 1, 0), size)` in one step, and cheaper.

    A mean over a window and a 1x1 convolution change places: both are linear.

    Args:
      x: [batch, height, width, in].
      kernel: [1, 1, in, out], of the same dtype as x.
      size: of the windows.
    """

    def pool_first(x, kernel):
        return convolve(average_pool(x, size), kernel, stride=1, padding=0)

    def strided(x, kernel):
        window = jnp.tile(kernel / size**2, (size, size, 1, 1))
        return convolve(x, window, stride=size, padding=0)

    # One convolution takes the norm and ReLU before it into itself on TPU.
    return lax.platform_dependent(x, kernel, cpu=pool_first, default=strided)


def wait_for(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """x, from which nothing is made before the gradient is known.

    Args:
      gradient: [batch, height, width, channels].
      x: of any shape and of the gradient's dtype.
    """

    def barrier(gradient, x):
        return lax.optimization_barrier((gradient, x))[1]

    def add_zero(gradient, x):
        # XLA:CPU drops barriers. This zero it cannot know.
        return x + 0 * gradient[0, 0, 0, 0]

    return lax.platform_dependent(gradient, x, cpu=add_zero, default=barrier)


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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", KERNEL_INITS[self.kernel_init], shape)
        y = convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.stride,
            self.padding,
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
    """The largest of each size x size window, as PyTorch's MaxPool2d."""

    size: int
    stride: int
    padding: int = 0

    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.max_pool(
            x,
            (self.size,) * 2,
            (self.stride,) * 2,
            ((self.padding,) * 2,) * 2,
        )


class AveragePool(nn.Module):
    """The mean of each size x size window, as PyTorch's AvgPool2d.

    Windows do not overlap; rows and columns that fill none are dropped.
    """

    size: int

    def __call__(self, x: jax.Array) -> jax.Array:
        return average_pool(x, self.size)
