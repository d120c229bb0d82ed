"""The network's shapes and arithmetic, and what recomputing leaves as it is."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax import create_model
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import (
    compressed,
    growth_rates,
    min_image_size,
)
from densenet_jax.models.options import STEMS
from tests import numpy_densenet as reference


# Compiles faster than the default generator.
def fast_key(seed):
    return jax.random.key(seed, impl="unsafe_rbg")


def feature_shapes(model, *image_shape):
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    maps, _ = jax.eval_shape(
        functools.partial(model.init_with_output, method="features"),
        jax.random.key(0),
        images,
    )
    return [x.shape[1:] for x in maps]


def test_feature_maps_of_densenet121():
    assert feature_shapes(create_model("densenet121"), 224, 224, 3) == [
        (112, 112, 64),
        (56, 56, 256),
        (28, 28, 512),
        (14, 14, 1024),
        (7, 7, 1024),
    ]


def test_feature_maps_of_a_cifar_net():
    assert feature_shapes(create_model("densenet_40_12"), 32, 32, 3) == [
        (32, 32, 16),
        (32, 32, 160),
        (16, 16, 304),
        (8, 8, 448),
    ]


@pytest.mark.parametrize("stem", STEMS)
def test_any_channels_and_odd_sizes(stem):
    model = DenseNet((1, 1, 1), growth_rate=4, stem=stem)
    size = {"imagenet": 2, "deep": 2, "cifar": 1}[stem]

    shapes = feature_shapes(model, 39, 51, 5)

    assert shapes[0] == (math.ceil(39 / size), math.ceil(51 / size), 8)


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        *({"stem": stem} for stem in STEMS),
        {"stem": "deep", "blur_pool": "stem"},
        {"stem": "cifar", "stem_pool": True, "blur_pool": "all"},
        {"stem_padding": "same", "stem_stride": 3},
    ],
    ids=str,
)
def test_smallest_image(options, num_blocks):
    model = DenseNet((1,) * num_blocks, growth_rate=4, **options)
    smallest = min_image_size(model)

    assert feature_shapes(model, smallest, smallest + 9, 3)[-1][0] == 1
    for shape in [(smallest - 1, smallest + 9), (smallest + 9, smallest - 1)]:
        with pytest.raises(ValueError, match=f"width of {smallest} or more"):
            feature_shapes(model, *shape, 3)


def test_smallest_image_of_the_imagenet_nets_is_torchvisions():
    # `min_size` of torchvision's DenseNet weights.
    assert min_image_size(create_model("densenet121")) == 29


def test_a_stem_without_a_pool_cannot_blur():
    with pytest.raises(ValueError, match="give stem_pool=True"):
        DenseNet((1,), stem="cifar", blur_pool="stem")
    with pytest.raises(ValueError, match="or 3 of them"):
        DenseNet((1,), stem="deep", stem_features=(4, 8))


def test_images_without_channels_are_refused():
    with pytest.raises(ValueError, match="height, width, channels"):
        feature_shapes(create_model("densenet_40_12"), 32, 32)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("block_layers", ()),
        ("block_layers", (6, 0)),
        ("growth_rate", 0),
        ("compression", 0),
        ("compression", 1.5),
        ("bottleneck_width", -1),
        ("stem_features", 0),
        ("num_classes", 0),
        ("dropout_rate", -0.1),
        ("dropout_rate", 1.0),
        ("norm_epsilon", 0.0),
        ("norm_momentum", 1.1),
        ("remat", "all"),
        ("stem", "resnet"),
        ("stem_features", (4, 8)),
        ("stem_features", ()),
        ("stem_stride", 0),
        ("stem_pool", "yes"),
        ("stem_padding", "valid"),
        ("blur_pool", "transitions"),
        ("kernel_init", "fan"),
        ("activation", "rellu"),
        ("norm", "layer"),
        ("norm_groups", 0),
        ("drop_path_rate", 1.0),
        ("squeeze_excite", -1),
        ("growth_rate", (4, 0)),
        ("growth_rate", (4, 8, 12)),
        ("growth_rate", (24,)),
        ("growth_rate", "12"),
        ("growth_rate", 1.5),
    ],
)
def test_attributes_out_of_range_are_refused_on_construction(attribute, value):
    with pytest.raises(ValueError, match=attribute.replace("remat", "remat p")):
        DenseNet(**{"block_layers": (1, 1), attribute: value})


def test_compression_rounds_down_on_paper_not_in_binary():
    assert compressed(25, 0.5) == 12
    assert compressed(100, 0.29) == 29
    assert compressed(37, 1.0) == 37
    with pytest.raises(ValueError, match="none of 8 channels: must be at le"):
        compressed(8, 0.1)


def random_variables(model, images):
    """Variables drawn by numpy, norms unlike their initial 0 and 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim > 1:
            fan_in = math.prod(leaf.shape[:-1])
            values = rng.standard_normal(leaf.shape) * np.sqrt(2 / fan_in)
        else:
            centred = path[-1].key in ("bias", "mean")
            values = rng.uniform(0.5, 1.5, leaf.shape) - centred
        return values.astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(stem_norm=False, bottleneck_width=0),
        dict(stem="cifar", bottleneck_width=0),
        dict(stem="cifar", stem_norm=False, bottleneck_width=2),
        dict(stem="cifar", growth_rate=(3, 5), activation="silu"),
        dict(growth_rate=(2, 4, 3), squeeze_excite=2),
        dict(stem="cifar", norm="instance", bottleneck_width=0),
        dict(norm="group", norm_groups=2, activation="silu"),
        dict(stem="deep"),
        dict(stem="deep", stem_features=(2, 4, 5), stem_norm=False),
        dict(stem="deep", blur_pool="stem", activation="silu"),
        dict(stem="cifar", blur_pool="all"),
        dict(stem="cifar", stem_pool=True),
        dict(stem="cifar", stem_pool=True, blur_pool="all"),
        dict(stem_padding="same", activation="silu"),
        dict(stem="deep", stem_padding="same", stem_pool=False),
        dict(stem="cifar", stem_stride=3, stem_padding="same"),
        dict(stem_stride=1, stem_pool=False),
    ],
    ids=str,
)
def test_forward_pass_equals_numpy(options):
    """All stems with and without norm, plain and bottleneck layers, ..."""
    model = DenseNet(
        (2, 1),
        **{"growth_rate": 3, "stem_features": 6, **options},
        compression=0.7,
        num_classes=4,
        norm_epsilon=1e-3,
        norm_momentum=0.8,
    )
    images = np.random.default_rng(0).standard_normal((3, 15, 18, 2))
    images = images.astype(np.float32)

    @jax.jit
    def forward(variables):
        features = model.apply(variables, images, method="features")
        logits, updates = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        return features, logits, updates.get("batch_stats", {})

    variables = random_variables(model, images)
    features, logits, batch_stats = forward(variables)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    expected, _, _ = reference.densenet(model, variables, images, train=False)
    for found, wanted in zip(features, expected, strict=True):
        close(found, wanted)
    _, expected, expected_stats = reference.densenet(
        model, variables, images, train=True
    )
    close(logits, expected)
    assert len(jax.tree.leaves(batch_stats)) == 2 * len(expected_stats)
    for path, wanted in expected_stats.items():
        found = reference.at(batch_stats, path)
        close(found["mean"], wanted["mean"])
        close(found["var"], wanted["var"])


def test_growth_rates_of_blocks_and_layers():
    assert growth_rates((2, 1), 4) == ((4, 4), (4,))
    assert growth_rates((2, 1), (4, 8)) == ((4, 4), (8,))
    assert growth_rates((2, 1), [4, 6, 8]) == ((4, 6), (8,))
    with pytest.raises(ValueError, match="one a layer"):
        growth_rates((2, 1), (4, 6, 8, 10))


TINY = dict(
    block_layers=(2, 1),
    growth_rate=4,
    stem="cifar",
    num_classes=3,
    dropout_rate=0.2,
)


def loss_of(model, images, rng):
    """A function of the variables: (loss, (logits, batch_stats))."""

    def loss(params, batch_stats):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        return jnp.mean(jnp.square(logits - 1)), (
            logits,
            updates["batch_stats"],
        )

    return loss


@pytest.fixture(scope="module")
def images():
    images = np.random.default_rng(1).standard_normal((4, 8, 8, 3))
    return images.astype(np.float32)


@pytest.fixture(scope="module")
def tiny_variables(images):
    return random_variables(DenseNet(**TINY), images)


@pytest.mark.parametrize("bottleneck_width", [0, 4])
def test_dropout_is_random_in_training_alone(images, bottleneck_width):
    # One block: no transition, whose dropout is another.
    options = {**TINY, "block_layers": (2,)}
    options["bottleneck_width"] = bottleneck_width
    variables = random_variables(DenseNet(**options), images)

    def logits(seed):
        loss = loss_of(DenseNet(**options), images, fast_key(seed))
        return jax.jit(loss)(variables["params"], variables["batch_stats"])[1][
            0
        ]

    assert not np.allclose(logits(0), logits(1), rtol=1e-2)
    np.testing.assert_array_equal(logits(0), logits(0))
    # Evaluation draws nothing, and scales nothing.
    plain = DenseNet(**{**options, "dropout_rate": 0.0})
    np.testing.assert_array_equal(
        jax.jit(DenseNet(**options).apply)(variables, images),
        jax.jit(plain.apply)(variables, images),
    )


def test_the_head_averages_in_float32(tiny_variables, images):
    model = DenseNet(**TINY, dtype=jnp.bfloat16)
    classifier = tiny_variables["params"]["classifier"]
    channels = classifier["kernel"].shape[0]
    x = np.random.default_rng(0).standard_normal((2, 5, 5, channels)) + 1
    x = jnp.array(x, jnp.bfloat16)

    found = model.apply(tiny_variables, x, method="head")

    mean = np.asarray(x, np.float64).mean((1, 2))
    expected = mean @ classifier["kernel"] + classifier["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_computes_narrow_and_keeps_wide(tiny_variables, images):
    options = {**TINY, "dropout_rate": 0.0}

    def forward(dtype):
        model = DenseNet(**options, dtype=dtype)
        logits, updates = model.apply(
            tiny_variables, images, train=True, mutable=["batch_stats"]
        )
        features = model.apply(tiny_variables, images, method="features")
        return logits, updates["batch_stats"], features

    logits, batch_stats, features = jax.jit(forward, static_argnums=0)(
        jnp.bfloat16
    )
    exact_logits, exact_stats, _ = jax.jit(forward, static_argnums=0)(
        jnp.float32
    )

    assert {x.dtype for x in features} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((logits, batch_stats))} == {
        jnp.dtype(jnp.float32)
    }
    assert not np.array_equal(logits, exact_logits)
    np.testing.assert_allclose(logits, exact_logits, atol=0.05)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=0.01, rtol=0.01),
        batch_stats,
        exact_stats,
    )
    variables = jax.eval_shape(
        DenseNet(**options, dtype=jnp.bfloat16).init, jax.random.key(0), images
    )
    assert {x.dtype for x in jax.tree.leaves(variables)} == {
        jnp.dtype(jnp.float32)
    }


def test_classifier_starts_as_pytorchs_linear_layer_with_bias_0():
    model = DenseNet((1,), growth_rate=4, stem="cifar", num_classes=2000)

    variables = model.init(fast_key(0), jnp.zeros((1, 2, 2, 3)))

    classifier = variables["params"]["classifier"]
    np.testing.assert_array_equal(classifier["bias"], np.zeros(2000))
    # Uniform within 1 / sqrt(in): 24,000 values.
    bound = 1 / np.sqrt(12)
    assert np.abs(classifier["kernel"]).max() <= bound
    np.testing.assert_allclose(
        np.std(classifier["kernel"]), bound / np.sqrt(3), rtol=0.02
    )
