"""Both implementations of an operation are the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from densenet_jax import create_model
from densenet_jax.models import ops
from densenet_jax.models.ops import IMPLEMENTATIONS, cpu, operations


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@jax.enable_x64(True)
def assert_equal_implementations(operation, *arrays, **settings):
    """Outputs, and gradients for a random cotangent."""
    arrays = [jnp.array(array) for array in arrays]
    found = {}
    for name, implementation in IMPLEMENTATIONS.items():
        function = getattr(implementation, operation)
        output, vjp = jax.vjp(lambda *x, f=function: f(*x, **settings), *arrays)
        found[name] = output, vjp(jnp.array(normal(*output.shape)))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12),
        found["matmul"],
        found["xla"],
    )


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "inputs", "outputs"),
    [
        (1, 1, 0, 5, 3),
        (3, 1, 1, 5, 2),  # by pixels
        (3, 1, 0, 5, 2),
        (3, 1, 2, 5, 2),
        (5, 1, 2, 4, 3),
        (3, 1, 3, 5, 2),  # by XLA: more padding than a window reaches
        (7, 2, 3, 4, 3),  # by XLA: the stem
    ],
)
def test_implementations_of_convolution(
    monkeypatch, batch, size, stride, padding, inputs, outputs
):
    # Some pass a row or a few at a time, others at once.
    monkeypatch.setattr(cpu, "_WINDOW_BYTES", 3 * 9 * 10 * 6 * 8)

    assert_equal_implementations(
        "convolve",
        normal(batch, 9, 10, inputs),
        normal(size, size, inputs, outputs),
        stride=stride,
        padding=padding,
    )


@pytest.mark.parametrize(
    ("height", "row_bytes", "parts"),
    [
        (8, 1e6, 2),
        (8, 4e6, 8),
        (8, 1, 1),
        (6, 1e6, 2),
        (7, 1e6, 7),
        (1, 1e9, 1),
    ],
)
def test_parts_hold_so_many_bytes_where_the_height_allows(
    monkeypatch, height, row_bytes, parts
):
    monkeypatch.setattr(cpu, "_WINDOW_BYTES", 4e6)

    assert cpu._num_parts(height, row_bytes) == parts


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2), (2, 3, 0)],
)
@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 2)])
def test_implementations_of_max_pooling(shape, size, stride, padding):
    # Whole numbers tie often, and ReLU makes many zeros.
    x = np.maximum(np.round(normal(*shape) * 2), 0)

    assert_equal_implementations(
        "max_pool", x, size=size, stride=stride, padding=padding
    )


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 3)])
def test_implementations_of_average_pooling(shape):
    assert_equal_implementations("average_pool", normal(*shape), size=2)
    assert_equal_implementations(
        "convolve_and_pool",
        normal(*shape),
        normal(1, 1, 3, 4),
        size=2,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values())
def test_materializing_changes_no_value(implementation, dtype):
    x = jnp.array(normal(2, 3, 4, 5), dtype)

    stored = jax.jit(implementation.materialize)(x)

    np.testing.assert_array_equal(stored, x)


def test_cpus_compute_what_is_materialized_once():
    def read_thrice(x, y, keep):
        difference = keep(x - y)
        return [difference[:, i:] * difference[:, : 8 - i] for i in (1, 2, 3)]

    def times_computed(keep):
        x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        program = jax.jit(read_thrice, static_argnums=2).lower(x, x, keep)
        return program.compile().as_text().count(" subtract(")

    assert times_computed(lambda x: x) == 3
    assert times_computed(operations("matmul").materialize) == 1


def test_the_gradient_of_a_kernel_in_bfloat16_sums_in_float32():
    x = jnp.ones((2, 32, 32, 4), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 4, 1), jnp.bfloat16)

    gradient = jax.grad(
        lambda k: cpu.convolve(x, k, 1, 1).sum(dtype=jnp.float32)
    )(kernel)

    assert gradient.dtype == jnp.bfloat16
    # Sums in bfloat16 stay at 256: 256 + 1 is 256 there.
    assert gradient[1, 1, 0, 0] == 2 * 32 * 32


@pytest.mark.parametrize("remat", ["none", "convs"])
def test_a_model_uses_the_implementation_that_it_is_told(remat):
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def jaxpr(implementation):
        model = create_model(
            "densenet121",
            block_layers=(1, 1),
            implementation=implementation,
            remat=remat,
        )
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

        def loss(variables, images):
            logits, _ = model.apply(
                variables, images, train=True, mutable="batch_stats"
            )
            return logits.sum()

        return str(
            jax.make_jaxpr(jax.grad(loss, allow_int=True))(variables, images)
        )

    # The classifier's and its gradients' are products in both.
    assert jaxpr("xla").count("dot_general") == 3
    assert "select_and_scatter_add" in jaxpr("xla")
    matmul = jaxpr("matmul")
    assert matmul.count("dot_general") > 3
    assert "select_and_scatter_add" not in matmul
    assert jaxpr("auto") == matmul  # the tests' devices are CPUs


def test_xla_takes_forward_mode_differentiation():
    x, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))

    def f(x):
        xla = operations("xla")
        return xla.max_pool(xla.convolve(x, kernel, 1, 1), 3, 2, 1).sum()

    _, tangent = jax.jvp(f, (x,), (x,))

    # Linear where the largest stays the largest.
    assert tangent == f(x)


def test_a_sharded_batch_stays_where_it_is(monkeypatch):
    """Kernels' gradients are summed over devices; images do not travel."""
    monkeypatch.setattr(cpu, "_WINDOW_BYTES", 1e4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct(
        (16, 8, 8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data"))
    )
    kernel = jax.ShapeDtypeStruct((3, 3, 4, 2), jnp.float32)

    step = jax.jit(jax.grad(lambda k, x: cpu.convolve(x, k, 1, 1).sum()))

    program = step.lower(kernel, x).compile().as_text()
    assert "while" in program
    assert "all-reduce" in program
    for moving in "all-gather", "all-to-all", "collective-permute":
        assert moving not in program


def test_the_compiler_options_are_for_cpus():
    options = ops.compiler_options()
    assert options == ops.compiler_options("cpu")
    assert ops.compiler_options("tpu") == {}

    def program(options):
        product = jax.jit(jnp.dot, compiler_options=options)
        x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
        return product.lower(x, x).compile().as_text()

    assert "ynn" in program({})
    assert "ynn" not in program(options)


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="implementation 'tpu'"):
        create_model("densenet121", implementation="tpu")
