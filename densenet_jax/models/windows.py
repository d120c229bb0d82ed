"""Windows at the border of an image: TensorFlow's padding, and blurring."""

import jax
import jax.numpy as jnp
from jax import lax


def pad_same(x: jax.Array, size: int, stride: int, value: float) -> jax.Array:
    """Pads as TensorFlow's 'SAME': ceil(n / stride) windows fit into n pixels.

    Of an odd number of new rows or columns there is one more at the end.
    PyTorch's `padding=(size - 1) // 2` makes outputs of the same size, but with
    a stride of 2 and even sizes its windows lie one pixel further up and left.

    Args:
      x: [batch, height, width, channels].
      size, stride: of the windows.
      value: of the new pixels.
    """
    borders = lax.padtype_to_pads(
        x.shape[1:3], (size, size), (stride, stride), "SAME"
    )
    widths = ((0, 0), *borders, (0, 0))
    return jnp.pad(x, widths, constant_values=value)


def blur_pool(x: jax.Array) -> jax.Array:
    """Blurs with [1 2 1] x [1 2 1] / 16, and keeps every second pixel.

    The border is mirrored, without the pixels that lie on it. (Zhang, Making
    Convolutional Networks Shift-Invariant Again, 1904.11486.)

    Args:
      x: [batch, height, width, channels], 2 x 2 pixels or more.

    Returns:
      [batch, ceil(height / 2), ceil(width / 2), channels].
    """
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    wide = jnp.pad(wide, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    for axis in (1, 2):
        outputs = (wide.shape[axis] - 1) // 2
        before, middle, after = (
            lax.slice_in_dim(wide, i, i + 2 * outputs - 1, 2, axis)
            for i in range(3)
        )
        wide = (before + 2 * middle + after) / 4
    return wide.astype(x.dtype)
