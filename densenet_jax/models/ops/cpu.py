"""Operations as XLA:CPU runs them fastest: mostly as matrix products.

What each operation computes is said in `ops.Operations`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from densenet_jax.models.ops import xla

# Windows of this many bytes stay in a core's cache.
_WINDOW_BYTES = 2.5e6


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int
) -> jax.Array:
    size, _, inputs, outputs = kernel.shape
    if size == 1 and stride == 1 and padding == 0:
        # Rows first: XLA transposes a product that sums over three axes.
        rows = x.reshape(-1, inputs)
        return (rows @ kernel[0, 0]).reshape(*x.shape[:-1], outputs)
    if stride == 1 and padding < size and outputs < inputs:
        return _convolve_by_pixels(x, kernel, padding)
    return xla.convolve(x, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_by_pixels(x, kernel, padding):
    """One product of each pixel of x with the whole kernel, then shifted sums.

    The product of a pixel with one place of the kernel belongs to the output
    pixel that is that far away.
    """
    size, _, inputs, outputs = kernel.shape
    x = jnp.pad(x, _borders(padding))
    height, width = (n - size + 1 for n in x.shape[1:3])
    products = lax.dot_general(
        x.reshape(-1, inputs),
        kernel.transpose(2, 0, 1, 3).reshape(inputs, -1),
        (((1,), (0,)), ((), ())),
        preferred_element_type=_sum_dtype(x),
    ).reshape(*x.shape[:3], size, size, outputs)
    # [batch, padded height, padded width, rows, columns, out]
    return sum(
        products[:, i : i + height, j : j + width, i, j]
        for i in range(size)
        for j in range(size)
    ).astype(x.dtype)


def _convolve_by_pixels_forward(x, kernel, padding):
    return _convolve_by_pixels(x, kernel, padding), (x, kernel)


def _convolve_by_pixels_backward(padding, residuals, gradient):
    x, kernel = residuals
    size, _, inputs, outputs = kernel.shape
    transposed = jax.linear_transpose(
        lambda x: xla.convolve(x, kernel, 1, padding), x
    )
    # A window of the gradient lies around each pixel of x, reversed.
    product = _sum_of_windows(gradient, x, size, size - 1 - padding)
    windows = product.reshape(size, size, outputs, inputs)
    kernel_gradient = jnp.flip(windows, (0, 1)).swapaxes(2, 3)
    return *transposed(gradient), kernel_gradient.astype(kernel.dtype)


_convolve_by_pixels.defvjp(
    _convolve_by_pixels_forward, _convolve_by_pixels_backward
)


def _sum_of_windows(x, y, size, padding):
    """The sum over all pixels of the window of x there times y there.

    Args:
      x: [batch, height, width, in].
      y: [batch, height of the windows, width of the windows, out].
      size, padding: of the windows.

    Returns:
      [size * size * in, out], of at least float32.
    """
    batch, height, width, outputs = y.shape
    x = jnp.pad(x, _borders(padding))

    def product(x, y):
        # As wide as a window and one pixel high; a product for each row.
        strips = jnp.concatenate(
            [x[:, :, j : j + width] for j in range(size)], axis=-1
        )  # [batch, height + size - 1, width, size * in]
        rows = [strips[:, i : i + y.shape[1]] for i in range(size)]
        return jnp.concatenate(
            [
                lax.dot_general(
                    row.reshape(-1, row.shape[-1]),
                    y.reshape(-1, outputs),
                    (((0,), (0,)), ((), ())),
                    preferred_element_type=_sum_dtype(x),
                )
                for row in rows
            ]
        )

    strip_bytes = size * x.shape[-1] * x.dtype.itemsize
    parts = _num_parts(height, batch * width * strip_bytes)
    if parts == 1:
        return product(x, y)
    part = height // parts

    def add(i, total):
        return total + product(
            lax.dynamic_slice_in_dim(x, i * part, part + size - 1, axis=1),
            lax.dynamic_slice_in_dim(y, i * part, part, axis=1),
        )

    shape = (size * size * x.shape[-1], outputs)
    return lax.fori_loop(0, parts, add, jnp.zeros(shape, _sum_dtype(x)))


def _num_parts(height, row_bytes):
    """The smallest divisor of height whose parts fit the cache, else height."""
    return next(
        parts
        for parts in range(1, height + 1)
        if parts == height
        or (
            height % parts == 0 and height // parts * row_bytes <= _WINDOW_BYTES
        )
    )


def _sum_dtype(x):
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _borders(padding):
    """`jnp.pad` widths for height and width."""
    return ((0, 0), (padding, padding), (padding, padding), (0, 0))


def average_pool(x: jax.Array, size: int) -> jax.Array:
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size]
    windows = x.reshape(batch, rows, size, columns, size, channels)
    # XLA fuses this sum with the norm before it; jnp.mean takes another pass.
    total = sum(
        windows[:, :, i, :, j] for i in range(size) for j in range(size)
    )
    return total / size**2


def pool_and_convolve(x: jax.Array, kernel: jax.Array, size: int) -> jax.Array:
    """The pool first, so that the product has fewer rows."""
    return convolve(average_pool(x, size), kernel, stride=1, padding=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    return xla.max_pool(x, size, stride, padding)


def _max_pool_forward(x, size, stride, padding):
    y = xla.max_pool(x, size, stride, padding)
    padded = jnp.pad(x, _borders(padding), constant_values=-jnp.inf)
    _, height, width, _ = y.shape
    # Where in its window the maximum is; of several the first. To look for y
    # in x would miss it where a fusion recomputes x and rounds it otherwise.
    largest = jnp.full(y.shape, -jnp.inf, y.dtype)
    index = jnp.zeros(y.shape, np.min_scalar_type(size * size))
    for place in range(size * size):
        row, column = divmod(place, size)
        found = padded[
            :,
            _every(stride, row, height),
            _every(stride, column, width),
        ]
        index = jnp.where(found > largest, index.dtype.type(place), index)
        largest = jnp.maximum(largest, found)
    return y, (index, x.shape)


def _max_pool_backward(size, stride, padding, residuals, gradient):
    index, (batch, height, width, channels) = residuals
    gradient = divide_by_one(gradient)  # read for each place of a window
    rows, columns = (-(-(n + 2 * padding) // stride) for n in (height, width))
    # Of the padded x [batch, rows, stride, columns, stride, channels].
    total = jnp.zeros((), gradient.dtype)
    for place in range(size * size):
        (up, i), (left, j) = (divmod(n, stride) for n in divmod(place, size))
        arriving = jnp.where(index == place, gradient, 0)
        total = total + jnp.pad(
            arriving[:, :, None, :, None],
            (
                (0, 0),
                (up, rows - gradient.shape[1] - up),
                (i, stride - 1 - i),
                (left, columns - gradient.shape[2] - left),
                (j, stride - 1 - j),
                (0, 0),
            ),
        )
    padded = total.reshape(batch, rows * stride, columns * stride, channels)
    return (padded[:, padding : padding + height, padding : padding + width],)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _every(stride, first, number):
    """The slice of every stride-th place from the first on."""
    return slice(first, first + (number - 1) * stride + 1, stride)


def divide_by_one(x: jax.Array) -> jax.Array:
    """x / 1, where XLA cannot know the divisor: XLA:CPU stores a quotient."""
    return x / (1 + 0 * x)
