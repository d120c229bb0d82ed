"""The network's shapes and arithmetic, and what recomputing leaves as it is."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax import create_model
from densenet_jax.models import densenet
from densenet_jax.models import recompute as dense_block
from densenet_jax.models.densenet import (
    REMAT_POLICIES,
    STEMS,
    DenseNet,
    compressed,
    min_image_size,
)
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
    size = {"imagenet": 2, "cifar": 1}[stem]

    shapes = feature_shapes(model, 39, 51, 5)

    assert shapes[0] == (math.ceil(39 / size), math.ceil(51 / size), 8)


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
@pytest.mark.parametrize("stem", STEMS)
def test_smallest_image(stem, num_blocks):
    model = DenseNet((1,) * num_blocks, growth_rate=4, stem=stem)
    smallest = min_image_size(stem, num_blocks)

    assert feature_shapes(model, smallest, smallest + 9, 3)[-1][0] == 1
    for shape in [(smallest - 1, smallest + 9), (smallest + 9, smallest - 1)]:
        with pytest.raises(ValueError, match=f"width of {smallest} or more"):
            feature_shapes(model, *shape, 3)


def test_smallest_image_of_the_imagenet_nets_is_torchvisions():
    # `min_size` of torchvision's DenseNet weights.
    assert min_image_size("imagenet", 4) == 29


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
        ("kernel_init", "fan"),
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
    ("stem", "stem_norm", "bottleneck_width"),
    [
        ("imagenet", True, 4),
        ("imagenet", False, 0),
        ("cifar", True, 0),
        ("cifar", False, 2),
    ],
)
def test_forward_pass_equals_numpy(stem, stem_norm, bottleneck_width):
    """Both stems with and without norm, plain and bottleneck layers."""
    model = DenseNet(
        (2, 1),
        growth_rate=3,
        compression=0.7,
        bottleneck_width=bottleneck_width,
        stem=stem,
        stem_norm=stem_norm,
        stem_features=5,
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
        return features, logits, updates["batch_stats"]

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


def step_results(remat, variables, images):
    model = DenseNet(**TINY, remat=remat)
    loss = loss_of(model, images, fast_key(0))
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"], variables["batch_stats"]
    )


@pytest.fixture(scope="module")
def kept(tiny_variables, images):
    """The results with every activation kept."""
    return step_results("none", tiny_variables, images)


@pytest.mark.parametrize("remat", [p for p in REMAT_POLICIES if p != "none"])
@pytest.mark.parametrize("max_pending", [1, 4])
def test_recomputing_changes_no_result(
    monkeypatch, remat, max_pending, tiny_variables, images, kept
):
    """Loss, logits, batch_stats (updated once) and gradients, with dropout."""
    monkeypatch.setattr(dense_block, "_MAX_PENDING", max_pending)

    found = step_results(remat, tiny_variables, images)

    assert jax.tree.structure(found) == jax.tree.structure(kept)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        found,
        kept,
    )


def test_recomputing_keeps_less_and_less(tiny_variables, images):
    """Values kept for the backward pass, apart from the variables."""

    def kept_values(remat):
        model = DenseNet(**{**TINY, "dropout_rate": 0.0}, remat=remat)
        loss = loss_of(model, images, fast_key(0))
        backward = jax.eval_shape(
            lambda params, batch_stats: jax.vjp(
                lambda params: loss(params, batch_stats)[0], params
            )[1],
            tiny_variables["params"],
            tiny_variables["batch_stats"],
        )
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    kept = {remat: kept_values(remat) for remat in REMAT_POLICIES}

    assert list(kept) == ["none", "convs", "half", "layer"]
    assert kept["none"] > kept["convs"] > kept["half"] > kept["layer"]
    assert kept["convs"] < 0.5 * kept["none"]


@pytest.mark.slow
def test_recomputing_saves_memory_in_the_compiled_program():
    """On CPU too, where compilers drop the barriers of `jax.checkpoint`."""

    def temporary_bytes(remat):
        model = DenseNet(
            (12,), growth_rate=8, stem="cifar", num_classes=2, remat=remat
        )
        images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        loss = loss_of(model, jnp.zeros(images.shape), fast_key(0))
        step = jax.jit(jax.grad(loss, has_aux=True))
        lowered = step.lower(variables["params"], variables["batch_stats"])
        return lowered.compile().memory_analysis().temp_size_in_bytes

    none, convs, layer = (
        temporary_bytes(remat) for remat in ("none", "convs", "layer")
    )

    assert layer < convs < none / 2


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_dropout_follows_every_convolution_but_the_first(remat, images):
    model = DenseNet(**TINY, remat=remat)
    followed = []
    convs = []

    def record(method, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            assert context.module.rate == 0.2
            assert not context.module.deterministic
            followed.append(convs[-1])
        output = method(*args, **kwargs)
        if isinstance(context.module, densenet.Conv):
            convs.append("/".join(context.module.path))
        return output

    with nn.intercept_methods(record):
        jax.eval_shape(
            functools.partial(model.init, train=True),
            {"params": jax.random.key(0), "dropout": jax.random.key(1)},
            images,
        )

    # 2 convolutions in each of 3 layers, and 1 in the transition.
    assert convs[0] == "conv0"
    assert followed == convs[1:]
    assert len(followed) == 7


def test_dropout_is_random_in_training_alone(tiny_variables, images, kept):
    loss = loss_of(DenseNet(**TINY), images, fast_key(1))
    _, (logits, _) = jax.jit(loss)(
        tiny_variables["params"], tiny_variables["batch_stats"]
    )

    assert not np.allclose(logits, kept[0][1][0], rtol=1e-2)
    # No rng 'dropout' here.
    jax.eval_shape(DenseNet(**TINY).apply, tiny_variables, images)


def test_moments_computed_once_are_those_of_every_reader(
    monkeypatch, tiny_variables, images
):
    """In float64: a norm that computes its own moments, against shared ones."""
    options = {**TINY, "dropout_rate": 0.0}

    def results():
        model = DenseNet(**options, dtype=jnp.float64)
        loss = loss_of(model, wide_images, fast_key(0))
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(
            variables["params"], variables["batch_stats"]
        )

    with jax.enable_x64(True):
        variables, wide_images = jax.tree.map(
            lambda leaf: leaf.astype(np.float64), (tiny_variables, images)
        )
        shared = results()
        monkeypatch.setattr(densenet, "concatenate_moments", lambda _: None)
        own = results()

    assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {np.dtype("f8")}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13),
        shared,
        own,
    )


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
