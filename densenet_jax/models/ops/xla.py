"""Operations as XLA has them: the implementation for TPUs and GPUs.

What each operation computes is said in `ops.Operations`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def average_pool(x: jax.Array, size: int) -> jax.Array:
    window = (size, size)
    # flax's avg_pool divides by an integer array, a silent promotion.
    return nn.pool(x, 0.0, lax.add, window, window, "VALID") / size**2


def strided_convolve(x: jax.Array, kernel: jax.Array, size: int) -> jax.Array:
    """The pooled 1x1 convolution as one strided convolution."""
    window = jnp.tile(kernel / size**2, (size, size, 1, 1))
    return convolve(x, window, stride=size, padding=0)


def max_pool(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    return nn.max_pool(
        x, (size, size), (stride, stride), ((padding, padding),) * 2
    )
