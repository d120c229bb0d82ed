"""Each building block against numpy, or against the definition."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from densenet_jax.models.layers import (
    ACTIVATIONS,
    NORM_AXES,
    Conv,
    Norm,
    add_moments_gradient,
    concatenate,
    measure,
)
from densenet_jax.models.ops import operations
from tests import numpy_densenet as reference

OPS = operations()
BatchNorm = functools.partial(Norm, "batch")


def measured(x, train=True):
    return measure(x, "batch", train)


def normal(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(np.float32)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(7, 2, 3), (3, 1, 1), (1, 1, 0), (1, 2, 0)]
)
def test_convolve_equals_numpy(size, stride, padding):
    x, kernel = normal(2, 10, 13, 3), normal(size, size, 3, 4)

    found = OPS.convolve(x, kernel, stride, padding)

    expected = reference.conv(x, kernel, stride, padding)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_on_cpu_equals_the_1x1_convolution(dtype):
    x = jnp.array(normal(2, 5, 7, 64), dtype)
    kernel = jnp.array(normal(1, 1, 64, 16), dtype)

    found = OPS.convolve(x, kernel, stride=1, padding=0)

    native = lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert found.dtype == native.dtype == dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32),
        native.astype(jnp.float32),
        rtol=4 * float(jnp.finfo(dtype).eps),
        atol=16 * float(jnp.finfo(dtype).eps),
    )


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 2), (1, 1, 1, 1)])
def test_max_pool_equals_numpy(shape):
    # Below 0, where padding with zeros would show.
    x = normal(*shape) - 5

    found = OPS.max_pool(x, 3, stride=2, padding=1)

    np.testing.assert_array_equal(found, reference.max_pool(x, 3, 2, 1))


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 2)])
def test_average_pool_equals_numpy(shape):
    x = normal(*shape)

    found = OPS.average_pool(x, 2)

    assert found.shape == (shape[0], shape[1] // 2, shape[2] // 2, shape[3])
    np.testing.assert_allclose(
        found, reference.average_pool(x, 2), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("kernel_init", "fan"), [("fan_out", 128), ("fan_in", 64)]
)
def test_kernels_start_normal_with_variance_2_over_fan(kernel_init, fan):
    conv = Conv(128, 3, OPS, kernel_init=kernel_init)

    kernel = conv.init(jax.random.key(0), normal(1, 3, 3, 64))["params"][
        "kernel"
    ]

    # 73,728 values: the standard error of their deviation is 0.26%.
    std = np.sqrt(2 / (3 * 3 * fan))
    np.testing.assert_allclose(np.std(kernel), std, rtol=0.01)
    np.testing.assert_allclose(np.mean(kernel), 0, atol=0.02 * std)
    # Not truncated at two deviations, outside of which 4.55% should lie.
    outside = np.mean(np.abs(kernel) > 2 * std)
    np.testing.assert_allclose(outside, 0.0455, rtol=0.1)


@pytest.fixture
def norm_variables():
    return {
        "params": {"scale": normal(3, seed=1), "bias": normal(3, seed=2)},
        "batch_stats": {
            "mean": normal(3, seed=3),
            "var": normal(3, seed=4) ** 2 + 0.5,
        },
    }


def test_batch_norm_trains_as_pytorchs(norm_variables):
    x = 2 * normal(2, 3, 2, 3, seed=5) + 1
    norm = BatchNorm(epsilon=1e-3, momentum=0.7)

    y, updates = norm.apply(
        norm_variables, measured(x), train=True, mutable=["batch_stats"]
    )

    params, running = norm_variables["params"], norm_variables["batch_stats"]
    mean, biased = x.mean((0, 1, 2)), x.var((0, 1, 2))
    unbiased = x.var((0, 1, 2), ddof=1)
    expected = (x - mean) / np.sqrt(biased + 1e-3)
    expected = expected * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    updated = updates["batch_stats"]
    np.testing.assert_allclose(
        updated["mean"], 0.7 * running["mean"] + 0.3 * mean, rtol=1e-5
    )
    np.testing.assert_allclose(
        updated["var"], 0.7 * running["var"] + 0.3 * unbiased, rtol=1e-5
    )


def test_batch_norm_evaluates_with_running_statistics(norm_variables):
    x = normal(1, 1, 1, 3, seed=5)

    y = BatchNorm(epsilon=1e-3).apply(
        norm_variables, measured(x, train=False), train=False
    )

    params, running = norm_variables["params"], norm_variables["batch_stats"]
    expected = (x - running["mean"]) / np.sqrt(running["var"] + 1e-3)
    expected = expected * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_starts_with_0_and_1():
    variables = BatchNorm().init(
        jax.random.key(0), measured(normal(2, 2, 2, 3)), train=True
    )

    np.testing.assert_array_equal(variables["params"]["scale"], np.ones(3))
    np.testing.assert_array_equal(variables["params"]["bias"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))


def test_batch_norm_refuses_one_value_a_channel(norm_variables):
    with pytest.raises(ValueError, match="2 values or more"):
        BatchNorm().apply(
            norm_variables,
            measured(normal(1, 1, 1, 3)),
            train=True,
            mutable=["batch_stats"],
        )


def test_a_constant_channel_stays_finite(norm_variables):
    # E[x^2] - E[x]^2 may round to less than 0 here.
    x = np.full((7, 3, 3, 3), 1000.1, np.float32)

    y, _ = BatchNorm().apply(
        norm_variables, measured(x), train=True, mutable=["batch_stats"]
    )

    assert np.all(np.isfinite(y))


def test_norm_and_conv_compute_in_dtype_and_store_float32():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Conv(4, 1, OPS, dtype=jnp.bfloat16, name="conv")(x)
            return BatchNorm(dtype=jnp.bfloat16, name="norm")(
                measured(x), train=True
            )

    y, variables = jax.eval_shape(
        Both().init_with_output, jax.random.key(0), normal(2, 2, 2, 3)
    )

    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
        jnp.dtype(jnp.float32)
    }


def test_a_narrow_norm_rounds_once(norm_variables):
    """It multiplies and adds in float32, and rounds the result to bfloat16."""
    x = jnp.array(normal(8, 16, 16, 3), jnp.bfloat16)

    found = BatchNorm(dtype=jnp.bfloat16).apply(
        norm_variables, measured(x, train=False), train=False
    )

    params, running = norm_variables["params"], norm_variables["batch_stats"]
    expected = (np.asarray(x, np.float64) - running["mean"]) / np.sqrt(
        running["var"] + 1e-5
    )
    expected = jnp.array(
        expected * params["scale"] + params["bias"], jnp.bfloat16
    )
    # Only where the exact result lies between two bfloat16 numbers.
    assert np.mean(np.asarray(found != expected)) < 0.01


def test_moments_are_computed_in_float32():
    x = jnp.array(normal(8, 16, 16, 3) + 1, jnp.bfloat16)

    _, moments = measured(x)

    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(moments.mean, wide.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, wide.var((0, 1, 2)), rtol=1e-5)


def test_concatenated_moments_are_those_of_concatenated_maps():
    a, b = normal(2, 3, 3, 2), normal(2, 3, 3, 1, seed=1)

    array, moments = concatenate([measured(a), measured(b)])

    expected, together = measured(np.concatenate([a, b], axis=-1))
    np.testing.assert_array_equal(array, expected)
    np.testing.assert_allclose(moments.mean, together.mean, rtol=1e-6)
    np.testing.assert_allclose(moments.variance, together.variance, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "num_groups"), [("group", 2), ("group", 4), ("instance", 1)]
)
@pytest.mark.parametrize("train", [True, False])
def test_group_and_instance_norm_equal_flaxs(kind, num_groups, train):
    x = 2 * normal(3, 4, 5, 6, seed=5) + 1
    params = {"scale": normal(6, seed=1), "bias": normal(6, seed=2)}
    norm = Norm(kind, num_groups=num_groups, epsilon=1e-3)

    y = norm.apply({"params": params}, measure(x, kind, train), train)

    # gcd(4, 6) groups: 4 do not divide the channels.
    groups = 6 if kind == "instance" else 2
    theirs = nn.GroupNorm(num_groups=groups, epsilon=1e-3)
    expected = theirs.apply({"params": params}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NORM_AXES)
def test_the_gradient_through_moments_is_that_of_differentiating_them(kind):
    with jax.enable_x64(True):
        x, cotangent = (
            jnp.array(normal(3, 4, 5, 6, seed=i), jnp.float64) for i in (0, 1)
        )
        maps, vjp = jax.vjp(lambda x: measure(x, kind, train=True), x)
        moments_gradient = jax.tree.map(jnp.cos, maps.moments)

        found = add_moments_gradient(cotangent, maps, moments_gradient)

        (expected,) = vjp(type(maps)(cotangent, moments_gradient))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_activations_are_those_of_their_papers():
    x = np.linspace(-8, 8, 33)

    found = {
        name: activation(jnp.array(x, jnp.float32))
        for name, activation in ACTIVATIONS.items()
    }

    gauss = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    expected = {
        "relu": np.maximum(x, 0),
        "relu6": np.clip(x, 0, 6),
        "leaky_relu": np.where(x > 0, x, 0.01 * x),
        "elu": np.where(x > 0, x, np.exp(x) - 1),
        "gelu": x * gauss,
        "silu": x / (1 + np.exp(-x)),
        "tanh": np.tanh(x),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)
