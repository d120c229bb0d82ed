"""Padding and blurring equal numpy's, and their gradients are right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.windows import blur_pool, pad_same
from tests import numpy_densenet as reference


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize(
    ("size", "stride", "borders"),
    # TensorFlow's, of 8 rows and 7 columns.
    [
        (7, 2, ((2, 3), (3, 3))),
        (3, 2, ((0, 1), (1, 1))),
        (3, 1, ((1, 1), (1, 1))),
        (3, 3, ((0, 1), (1, 1))),
        (1, 2, ((0, 0), (0, 0))),
    ],
)
def test_same_padding_has_the_odd_pixel_at_the_end(size, stride, borders):
    x = normal(2, 8, 7, 3)

    padded = pad_same(jnp.array(x), size, stride, -jnp.inf)

    expected = np.pad(x, ((0, 0), *borders, (0, 0)), constant_values=-np.inf)
    np.testing.assert_array_equal(padded, np.float32(expected))


@pytest.mark.parametrize("size", [(8, 7), (2, 3), (5, 2), (9, 12)])
def test_blur_pool_equals_numpy(size):
    with jax.enable_x64(True):
        x = normal(2, *size, 3)

        found = blur_pool(jnp.array(x))

        assert found.shape[1:3] == tuple(-(-n // 2) for n in size)
        np.testing.assert_allclose(
            found, reference.blur_pool(x), rtol=0, atol=1e-14
        )


def test_a_narrow_blur_rounds_once():
    x = jnp.array(normal(2, 8, 6, 3), jnp.bfloat16)

    found = blur_pool(x)

    exact = reference.blur_pool(np.asarray(x, np.float64))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "options",
    [
        dict(stem="deep", blur_pool="all"),
        dict(stem_padding="same", activation="silu"),
    ],
    ids=str,
)
def test_implementations_have_the_same_gradients(options):
    """Of a step in float64, for sizes that windows do not fill evenly."""
    images = normal(2, 18, 15, 3)

    @functools.partial(jax.value_and_grad, argnums=(1, 2))
    def loss(model, params, images):
        logits, _ = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean(jnp.square(logits - 1))

    found = {}
    for implementation in ("xla", "matmul"):
        model = DenseNet(
            (1, 1), growth_rate=4, implementation=implementation, **options
        )
        variables = model.init(jax.random.key(0), np.float32(images))
        with jax.enable_x64(True):
            model = model.clone(dtype=jnp.float64)
            variables, wide = jax.tree.map(
                lambda x: jnp.array(x, jnp.float64), (variables, images)
            )
            step = jax.jit(functools.partial(loss, model))
            found[implementation] = jax.tree.map(
                np.asarray, step(variables["params"], wide)
            )
    assert np.abs(found["xla"][1][1]).max() > 1e-4
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
        found["matmul"],
        found["xla"],
    )
