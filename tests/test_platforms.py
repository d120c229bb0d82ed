"""Every form of an operation is the same function, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax import create_model
from densenet_jax.models import platforms


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@jax.enable_x64(True)
def results(operation, *arrays, **settings):
    """Each form's output, and its gradients for a random cotangent."""
    arrays = [jnp.array(array) for array in arrays]
    found = {}
    for platform in platforms.FORMS:
        output, vjp = jax.vjp(
            lambda *x, p=platform: operation(*x, platform=p, **settings),
            *arrays,
        )
        found[platform] = output, vjp(jnp.array(normal(*output.shape)))
    return found


def assert_equal_forms(operation, *arrays, **settings):
    found = results(operation, *arrays, **settings)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12),
        found["cpu"],
        found["default"],
    )


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "inputs", "outputs"),
    [
        (1, 1, 0, 5, 3),
        (3, 1, 1, 5, 2),  # windows of the gradient
        (3, 1, 0, 5, 2),
        (3, 1, 1, 2, 5),  # windows of the images
        (3, 1, 3, 5, 2),
        (7, 2, 3, 3, 4),  # the stem
        (2, 2, 0, 4, 3),
    ],
)
def test_forms_of_convolution(
    monkeypatch, batch, size, stride, padding, inputs, outputs
):
    # Two images a part: batches of 3 pass one by one, of 4 two by two.
    monkeypatch.setattr(platforms, "_WINDOW_BYTES", 2 * 9 * 10 * 6 * 8)

    assert_equal_forms(
        platforms.convolve,
        normal(batch, 9, 10, inputs),
        normal(size, size, inputs, outputs),
        stride=stride,
        padding=padding,
    )


@pytest.mark.parametrize(
    ("batch", "image_bytes", "parts"),
    [
        (8, 1e6, 2),
        (8, 4e6, 8),
        (8, 1, 1),
        (6, 1e6, 2),
        (7, 1e6, 7),
        (1, 1e9, 1),
    ],
)
def test_parts_hold_so_many_bytes_where_the_batch_allows(
    monkeypatch, batch, image_bytes, parts
):
    monkeypatch.setattr(platforms, "_WINDOW_BYTES", 4e6)

    assert platforms._parts(batch, image_bytes) == parts


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)]
)
@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 2)])
def test_forms_of_max_pooling(shape, size, stride, padding):
    # Whole numbers tie often, and ReLU makes many zeros.
    x = np.maximum(np.round(normal(*shape) * 2), 0)

    assert_equal_forms(
        platforms.max_pool, x, size=size, stride=stride, padding=padding
    )


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 3)])
def test_forms_of_average_pooling(shape):
    assert_equal_forms(platforms.average_pool, normal(*shape), size=2)
    assert_equal_forms(
        platforms.convolve_and_pool,
        normal(*shape),
        normal(1, 1, 3, 4),
        size=2,
    )


def test_the_gradient_of_a_kernel_in_bfloat16_sums_in_float32():
    x = jnp.ones((2, 32, 32, 1), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 1, 4), jnp.bfloat16)

    gradient = jax.grad(
        lambda k: platforms.convolve(x, k, 1, 1, "cpu").sum(dtype=jnp.float32)
    )(kernel)

    assert gradient.dtype == jnp.bfloat16
    # Sums in bfloat16 stay at 256: 256 + 1 is 256 there.
    assert gradient[1, 1, 0, 0] == 2 * 32 * 32


@pytest.mark.parametrize("remat", ["none", "convs"])
def test_a_model_computes_in_the_form_that_it_is_told(remat):
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def operations(platform):
        model = create_model(
            "densenet121", block_layers=(1, 1), platform=platform, remat=remat
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

    assert "reduce_window_sum" not in operations("cpu")
    assert "select_and_scatter_add" not in operations("cpu")
    assert "dot_general" in operations("cpu")
    native = operations("default")
    assert "select_and_scatter_add" in native
    assert native.count("dot_general") == 3  # the classifier's, no other
    assert "platform_index" in operations("auto")


def test_an_unknown_platform_is_named():
    with pytest.raises(ValueError, match="platform 'tpu'"):
        create_model("densenet121", platform="tpu")
