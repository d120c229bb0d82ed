"""Convolution and pooling, as fast as each platform allows.

This is the one place that knows that platforms differ; `IMPLEMENTATIONS` is the
table. Both implementations of an operation are the same function up to
rounding, and so are their gradients. 'matmul' writes some gradients out, for
reverse mode alone: forward-mode differentiation (`jax.jvp`) and second
derivatives take 'xla'.

All arrays are [batch, height, width, channels].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from densenet_jax.choices import check_choice
from densenet_jax.models.ops import cpu, xla


class Operations(NamedTuple):
    """One implementation of each operation.

    Attributes:
      convolve: (x, kernel, stride, padding) -> y, as PyTorch's conv2d. Kernels
        are [size, size, in, out], of the dtype of x; `padding` zeros are added
        on each of the four sides.
      average_pool: (x, size) -> y, as PyTorch's AvgPool2d: the mean of each
        size x size window. Windows do not overlap; rows and columns that fill
        none are dropped.
      convolve_and_pool: (x, kernel, size) -> y, that is
        average_pool(convolve(x, kernel, 1, 0), size) for a 1x1 kernel. Both are
        linear, so a cheaper order is the same function.
      max_pool: (x, size, stride, padding) -> y, as PyTorch's MaxPool2d. The
        gradient goes to the first of the largest, row by row.
      materialize: x -> x, computed once and stored, where the compiler would
        recompute it in every consumer. An infinity may become a NaN.
    """

    convolve: Callable[..., jax.Array]
    average_pool: Callable[..., jax.Array]
    convolve_and_pool: Callable[..., jax.Array]
    max_pool: Callable[..., jax.Array]
    materialize: Callable[[jax.Array], jax.Array]


IMPLEMENTATIONS = {
    # For TPUs and GPUs.
    "xla": Operations(
        # On TPU a product costs layout changes that a convolution does not,
        # and so does a mean over a longer shape.
        convolve=xla.convolve,
        average_pool=xla.average_pool,
        # One convolution fuses with the norm and ReLU before it.
        convolve_and_pool=xla.strided_convolve,
        max_pool=xla.max_pool,
        materialize=lambda x: x,
    ),
    # For CPUs. docs/performance.md has the figures.
    "matmul": Operations(
        # XLA:CPU is fastest at products: 1x1 convolutions are written as such,
        # and convolutions to fewer channels with their kernels' gradients.
        convolve=cpu.convolve,
        # It is slow at windows, and slower at their gradients.
        average_pool=cpu.average_pool,
        convolve_and_pool=cpu.pool_and_convolve,
        max_pool=cpu.max_pool,
        # It recomputes a sum in each consumer and keeps all its terms.
        materialize=cpu.divide_by_one,
    ),
}


def operations(implementation: str = "auto") -> Operations:
    """The operations of an implementation.

    Args:
      implementation: a key of IMPLEMENTATIONS, or 'auto' for 'matmul' where
        `jax.default_backend` is 'cpu' and 'xla' elsewhere.

    Raises:
      ValueError: an unknown implementation.
    """
    check_choice("implementation", implementation, ("auto", *IMPLEMENTATIONS))
    if implementation == "auto":
        cpu_backend = jax.default_backend() == "cpu"
        implementation = "matmul" if cpu_backend else "xla"
    return IMPLEMENTATIONS[implementation]


def compiler_options(platform: str | None = None) -> dict[str, str]:
    """The `compiler_options` to give to `jax.jit` for a platform.

    By default XLA:CPU hands products and convolutions to YNNPACK, which runs
    many of them on one thread; with these options only sums go there, and
    Eigen uses all cores. Other platforms need no options.

    Args:
      platform: 'cpu', 'tpu' or 'gpu'; by default that of
        `jax.default_backend`.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    kind = "xla_cpu_experimental_ynn_fusion_type"
    return {kind: "LIBRARY_FUSION_TYPE_REDUCE"}
