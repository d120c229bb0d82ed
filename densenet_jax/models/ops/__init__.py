"""Convolution and pooling in the form that suits the platform they run on.

This is the one place that knows that platforms differ; `FORMS`, at the end, is
the table. All forms of an operation are the same function up to rounding, and
so are their gradients. Forward-mode differentiation (`jax.jvp`) takes the
'native' form: gradients of the 'products' are written out for reverse mode.

All arrays are [batch, height, width, channels]. Every operation takes `form`,
a key of `FORMS`, or 'auto' for 'products' on CPUs and 'native' elsewhere (as
`jax.default_backend` says when the operation is traced).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    padding: int,
    form: str = "auto",
) -> jax.Array:
    """Correlates x with a kernel, as PyTorch's conv2d.

    Args:
      x: [batch, height, width, in].
      kernel: [size, size, in, out], of the same dtype as x.
      stride: in both directions.
      padding: zeros added on each of the four sides.
      form: see above.
    """
    return _forms(form).convolve(x, kernel, stride, padding)


def average_pool(x: jax.Array, size: int, form: str = "auto") -> jax.Array:
    """The mean of each size x size window of x, as PyTorch's AvgPool2d.

    Windows do not overlap; rows and columns that fill none are dropped.
    """
    return _forms(form).average_pool(x, size)


def convolve_and_pool(
    x: jax.Array, kernel: jax.Array, size: int, form: str = "auto"
) -> jax.Array:
    """`average_pool(convolve(x, kernel, 1, 0), size)` in one step, and cheaper.

    A mean over a window and a 1x1 convolution change places: both are linear.

    Args:
      x: [batch, height, width, in].
      kernel: [1, 1, in, out], of the same dtype as x.
      size: of the windows.
      form: see above.
    """
    return _forms(form).convolve_and_pool(x, kernel, size)


def max_pool(
    x: jax.Array, size: int, stride: int, padding: int, form: str = "auto"
) -> jax.Array:
    """The largest of each size x size window of x, as PyTorch's MaxPool2d.

    The gradient goes to the first of the largest, row by row.
    """
    return _forms(form).max_pool(x, size, stride, padding)


def store(x: jax.Array, form: str = "auto") -> jax.Array:
    """x, made once for all that read it, where a compiler would repeat it.

    Numbers stay the same; an infinity may become a NaN.
    """
    return _forms(form).store(x)


def compiler_options(platform: str | None = None) -> dict[str, str]:
    """What to give `jax.jit` as `compiler_options`, to compile for a platform.

    By default XLA:CPU hands products and convolutions to YNNPACK, which runs
    many of them on one thread; with these options only sums go there, and
    Eigen uses all cores. Nothing is set for other platforms.

    Args:
      platform: 'cpu', 'tpu' or 'gpu'; by default that of
        `jax.default_backend`.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    kind = "xla_cpu_experimental_ynn_fusion_type"
    return {kind: "LIBRARY_FUSION_TYPE_REDUCE"}


def _forms(form):
    if form == "auto":
        form = "products" if jax.default_backend() == "cpu" else "native"
    return FORMS[form]


# Forms of convolution.


def _native_convolve(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _products_convolve(x, kernel, stride, padding):
    size, _, inputs, outputs = kernel.shape
    if size == 1 and stride == 1 and padding == 0:
        # Rows first: XLA transposes a product that sums over three axes.
        rows = x.reshape(-1, inputs)
        return (rows @ kernel[0, 0]).reshape(*x.shape[:-1], outputs)
    if stride == 1 and padding < size and outputs < inputs:
        return _window_convolve(x, kernel, padding)
    return _native_convolve(x, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _window_convolve(x, kernel, padding):
    """One product of each pixel of x with the whole kernel.

    Each place's part of it belongs to another pixel.
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
    return sum(
        products[:, i : i + height, j : j + width, i, j]
        for i in range(size)
        for j in range(size)
    ).astype(x.dtype)


def _window_convolve_forward(x, kernel, padding):
    return _window_convolve(x, kernel, padding), (x, kernel)


def _window_convolve_backward(padding, residuals, gradient):
    x, kernel = residuals
    size, _, inputs, outputs = kernel.shape
    transposed = jax.linear_transpose(
        lambda x: _native_convolve(x, kernel, 1, padding), x
    )
    # A window of the gradient lies around each pixel of x, reversed.
    product = _window_product(gradient, x, size, size - 1 - padding)
    windows = product.reshape(size, size, outputs, inputs)
    kernel_gradient = jnp.flip(windows, (0, 1)).swapaxes(2, 3)
    return *transposed(gradient), kernel_gradient.astype(kernel.dtype)


_window_convolve.defvjp(_window_convolve_forward, _window_convolve_backward)

# So many bytes of windows at a time stay in a core's cache.
_WINDOW_BYTES = 2.5e6


def _window_product(x, y, size, padding):
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
        )
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
    parts = _parts(height, batch * width * strip_bytes)
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


def _parts(height, row_bytes):
    """The fewest equal parts of _WINDOW_BYTES or less; else a row in each."""
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
    """To pad height and width with."""
    return ((0, 0), (padding, padding), (padding, padding), (0, 0))


# Forms of pooling.


def _reshaped_average_pool(x, size):
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size]
    windows = x.reshape(batch, rows, size, columns, size, channels)
    # Not jnp.mean, which XLA does not make in one pass with the norm before.
    total = sum(
        windows[:, :, i, :, j] for i in range(size) for j in range(size)
    )
    return total / size**2


def _native_average_pool(x, size):
    window = (size, size)
    # flax's avg_pool divides by an integer array, a silent promotion.
    return nn.pool(x, 0.0, lax.add, window, window, "VALID") / size**2


def _pool_first(x, kernel, size):
    pooled = _reshaped_average_pool(x, size)
    return _products_convolve(pooled, kernel, stride=1, padding=0)


def _strided_convolve(x, kernel, size):
    window = jnp.tile(kernel / size**2, (size, size, 1, 1))
    return _native_convolve(x, window, stride=size, padding=0)


def _native_max_pool(x, size, stride, padding):
    return nn.max_pool(
        x, (size, size), (stride, stride), ((padding, padding),) * 2
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _indexed_max_pool(x, size, stride, padding):
    return _native_max_pool(x, size, stride, padding)


def _indexed_max_pool_forward(x, size, stride, padding):
    y = _native_max_pool(x, size, stride, padding)
    padded = jnp.pad(x, _borders(padding), constant_values=-jnp.inf)
    _, height, width, _ = y.shape
    # Where in its window the maximum is; of several the first. (A NaN is
    # nowhere: its gradient goes to the first place.)
    index = jnp.zeros(y.shape, np.min_scalar_type(size * size))
    for place in reversed(range(size * size)):
        row, column = divmod(place, size)
        found = padded[
            :, _places(row, height, stride), _places(column, width, stride)
        ]
        index = jnp.where(found == y, index.dtype.type(place), index)
    return y, (index, x.shape)


def _indexed_max_pool_backward(size, stride, padding, residuals, gradient):
    index, (batch, height, width, channels) = residuals
    gradient = _divide(gradient)  # it is read for each place of a window
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


_indexed_max_pool.defvjp(_indexed_max_pool_forward, _indexed_max_pool_backward)


def _places(first, number, stride):
    """Every stride-th place from the first on."""
    return slice(first, first + (number - 1) * stride + 1, stride)


# Forms of storing.


def _divide(x):
    # XLA:CPU repeats no division, and cannot know that this is one by one.
    return x / (1 + 0 * x)


def _leave(x):
    return x


class Forms(NamedTuple):
    """How to compute each operation."""

    convolve: Callable[..., jax.Array]
    average_pool: Callable[..., jax.Array]
    convolve_and_pool: Callable[..., jax.Array]
    max_pool: Callable[..., jax.Array]
    store: Callable[..., jax.Array]


FORMS = {
    # On CPUs. benchmarks/README.md has the figures.
    "products": Forms(
        # XLA:CPU is fastest at products: they make 1x1 convolutions, and those
        # to fewer channels with the gradients of their kernels.
        convolve=_products_convolve,
        # It is slow at windows, slower at their gradients.
        average_pool=_reshaped_average_pool,
        convolve_and_pool=_pool_first,
        max_pool=_indexed_max_pool,
        # It makes a sum anew for each reader, and keeps all that it is made of.
        store=_divide,
    ),
    # On TPUs and GPUs.
    "native": Forms(
        # A product costs layout changes on TPU that a convolution does not.
        convolve=_native_convolve,
        # As does the longer shape.
        average_pool=_native_average_pool,
        # One convolution takes the norm and ReLU before it into itself.
        convolve_and_pool=_strided_convolve,
        max_pool=_native_max_pool,
        store=_leave,
    ),
}
