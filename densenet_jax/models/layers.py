"""Convolution and normalisation: what every DenseNet is made of.

All arrays are [batch, height, width, channels]. What depends on the platform
is in `ops`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from densenet_jax.models.ops import Operations
from densenet_jax.models.windows import pad_same

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "silu": nn.silu,
    "tanh": nn.tanh,
}

# The axes of [batch, height, width, channels] over which each norm averages.
NORM_AXES = {
    "batch": (0, 1, 2),  # Ioffe and Szegedy, 1502.03167
    "group": (1, 2),  # and over a group of channels; Wu and He, 1803.08494
    "instance": (1, 2),  # Ulyanov et al., 1607.08022
}

KERNEL_INITS: dict[str, Callable] = {
    # The authors' code: normal, std sqrt(2 / (height * width * out)).
    "fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    # torchvision and timm: normal, std sqrt(2 / (height * width * in)).
    "fan_in": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
}

# The name by which `jax.checkpoint_policies` know a convolution's output.
CONV_OUTPUT = "conv_output"


class Moments(NamedTuple):
    """Mean and biased variance of each channel, float32 or wider.

    Both are [channels] for batch normalisation, [batch, channels] for norms of
    single examples.
    """

    mean: jax.Array
    variance: jax.Array

    def __getitem__(self, channels: slice) -> "Moments":
        return Moments(self.mean[..., channels], self.variance[..., channels])


class Maps(NamedTuple):
    """Feature maps and their moments.

    Every layer that reads a feature map normalises it with the same moments, so
    they are computed once, when the map is made.

    Attributes:
      array: [batch, height, width, channels].
      moments: of the array; None where the norms use running statistics.
    """

    array: jax.Array
    moments: Moments | None


def concatenate(maps: Sequence[Maps]) -> Maps:
    """[x_0, x_1, ...] of the paper's equation 2, on channels, in order."""
    arrays, moments = zip(*maps)
    array = jnp.concatenate(arrays, axis=-1)
    if moments[0] is None:
        return Maps(array, None)
    joined = (jnp.concatenate(part, axis=-1) for part in zip(*moments))
    return Maps(array, Moments(*joined))


def at_least_float32(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 if it is."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def measure(x: jax.Array, norm: str, train: bool) -> Maps:
    """x with the moments that norms of this kind read.

    Under jit with a sharded batch, moments over the batch are those of the
    global batch.

    Args:
      x: [batch, height, width, channels].
      norm: a key of NORM_AXES.
      train: batch normalisation uses moments in training alone.
    """
    if norm == "batch" and not train:
        return Maps(x, None)
    axes = NORM_AXES[norm]
    wide = at_least_float32(x)
    mean = jnp.mean(wide, axis=axes)
    mean_of_squares = jnp.mean(jnp.square(wide), axis=axes)
    variance = jnp.maximum(mean_of_squares - jnp.square(mean), 0)
    return Maps(x, Moments(mean, variance))


def add_moments_gradient(
    gradient: jax.Array, x: Maps, moments_gradient: Moments
) -> jax.Array:
    """The gradient of an array, with what reaches it through its moments.

    Args:
      gradient: of x.array, where x.moments are held constant.
      x: from `measure`.
      moments_gradient: of x.moments.
    """
    count = x.array.size // x.moments.mean.size
    factor = moments_gradient.variance * (2 / count)
    offset = moments_gradient.mean / count - factor * x.moments.mean
    more = Affine(factor, offset)(x.array)
    return (gradient.astype(more.dtype) + more).astype(x.array.dtype)


class Affine(NamedTuple):
    """x -> x * factor + offset, channel by channel.

    Both are float32 or wider, [channels] or [batch, channels].
    """

    factor: jax.Array
    offset: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [batch, height, width, channels]; float32 or wider."""
        axes = range(self.factor.ndim - 1, x.ndim - 1)
        factor, offset = (jnp.expand_dims(v, axes) for v in self)
        return x.astype(factor.dtype) * factor + offset


def normalisation(
    scale: jax.Array, bias: jax.Array, moments: Moments, epsilon: float
) -> Affine:
    """x -> (x - mean) / sqrt(variance + epsilon) * scale + bias."""
    if moments.mean.ndim > scale.ndim:
        scale, bias = scale[None], bias[None]  # [1, channels]
    factor = scale * lax.rsqrt(moments.variance + epsilon)
    return Affine(factor, bias - moments.mean * factor)


def group_moments(moments: Moments, num_groups: int) -> Moments:
    """The moments of groups of channels, from those of the channels.

    Args:
      moments: [batch, channels].
      num_groups: of neighbouring channels, equally many each.

    Returns:
      [batch, channels]: each channel has its group's.
    """
    shape = moments.mean.shape
    mean, variance = (m.reshape(shape[0], num_groups, -1) for m in moments)
    group_mean = mean.mean(axis=-1, keepdims=True)  # [batch, groups, 1]
    between = jnp.square(mean - group_mean)
    group_variance = (variance + between).mean(axis=-1, keepdims=True)
    return Moments(
        *(
            jnp.broadcast_to(m, mean.shape).reshape(shape)
            for m in (group_mean, group_variance)
        )
    )


class Conv(nn.Module):
    """A convolution without bias: parameter `kernel` [size, size, in, out].

    Attributes:
      features: the number of output channels.
      size, stride, padding: of the window; padding 'same' is TensorFlow's.
      kernel_init: a key of KERNEL_INITS.
      dtype: of the computation.
      ops: the implementation.
    """

    features: int
    size: int
    ops: Operations
    stride: int = 1
    padding: int | str = 0
    kernel_init: str = "fan_out"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, pool: int = 1) -> jax.Array:
        """Convolves x; with `pool`, averages over windows of that size too."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", KERNEL_INITS[self.kernel_init], shape)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if pool > 1:
            y = self.ops.convolve_and_pool(x, kernel, pool)
        else:
            padding = self.padding
            if padding == "same":
                x, padding = pad_same(x, self.size, self.stride, 0.0), 0
            y = self.ops.convolve(x, kernel, self.stride, padding)
        return checkpoint_name(y, CONV_OUTPUT)


class Norm(nn.Module):
    """Batch, group or instance normalisation.

    Batch normalisation keeps PyTorch's running statistics: the batch is
    normalised with its biased variance; the running variance is an average of
    the unbiased one, n / (n - 1) larger, where n is the number of values a
    channel has in the batch.

    Parameters `scale` and `bias`; of batch normalisation also the batch_stats
    `mean` and `var`; all [channels]. Arithmetic is in float32 or wider, the
    result in `dtype`.

    Attributes:
      kind: a key of NORM_AXES.
      num_groups: for 'group': gcd(num_groups, channels) are used.
      epsilon: added to variances.
      momentum: share of the old running statistics kept at each step.
      dtype: of the result.
    """

    kind: str = "batch"
    num_groups: int = 32
    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> jax.Array:
        """Normalises x, measured by `measure` with this kind and `train`.

        Raises:
          ValueError: train, batch normalisation, and one value a channel.
        """
        channels = x.array.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        moments = x.moments
        if self.kind == "batch":
            mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
            var = self.variable("batch_stats", "var", jnp.ones, channels)
            if train:
                self._move_statistics(x)
            else:
                moments = Moments(mean.value, var.value)
        elif self.kind == "group":
            num_groups = math.gcd(self.num_groups, *channels)
            moments = group_moments(moments, num_groups)
        affine = normalisation(scale, bias, moments, self.epsilon)
        return affine(x.array).astype(self.dtype)

    def _move_statistics(self, x: Maps) -> None:
        count = x.array.size // x.array.shape[-1]
        if count < 2:
            raise ValueError(
                f"{'/'.join(self.path)} cannot normalise a batch with one "
                "value a channel: it needs 2 values or more to train. Use a "
                "larger batch or larger images."
            )
        if self.is_initializing():
            return
        unbiased = x.moments.variance * (count / (count - 1))
        for name, batch in ("mean", x.moments.mean), ("var", unbiased):
            running = self.get_variable("batch_stats", name)
            moved = self.momentum * running + (
                1 - self.momentum
            ) * lax.stop_gradient(batch)
            self.put_variable("batch_stats", name, moved.astype(running.dtype))


class FoldedNorm(nn.Module):
    """What is left of a norm whose scale the convolution before it has taken.

    Parameter `bias` [channels]. For inference alone; see `fold_norms`.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> jax.Array:
        """Adds the bias to x."""
        bias = self.param("bias", nn.initializers.zeros, x.array.shape[-1:])
        return x.array + jnp.expand_dims(bias, (0, 1, 2)).astype(self.dtype)
