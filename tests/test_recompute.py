"""Every policy trains what is evaluated, whatever the layer is."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.models import densenet, layers, recompute
from densenet_jax.models.densenet import REMAT_POLICIES, DenseLayer, DenseNet
from densenet_jax.models.layer_options import LayerOptions
from densenet_jax.models.layers import Norm, concatenate
from densenet_jax.models.stages import StagedLayer

NET = dict(block_layers=(2, 1), growth_rate=4, stem="cifar", num_classes=3)
SMALL = {**NET, "block_layers": (2,)}
# 'early' takes one of two others for each block, which has a test of its own.
OTHERS = [
    pytest.param(policy, marks=pytest.mark.slow)
    if policy == "early"
    else policy
    for policy in REMAT_POLICIES
    if policy != "none"
]


def make_images():
    return np.random.default_rng(1).standard_normal((4, 4, 4, 3))


@pytest.fixture
def images():
    return make_images()


def random_like(tree):
    """Leaves drawn by numpy, norms unlike their initial 0 and 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim > 1:
            fan_in = np.prod(leaf.shape[:-1])
            return rng.standard_normal(leaf.shape) * np.sqrt(2 / fan_in)
        centred = path[-1].key in ("bias", "mean")
        return rng.uniform(0.5, 1.5, leaf.shape) - centred

    return jax.tree_util.tree_map_with_path(draw, tree)


def float64(model, images):
    """The model, its variables and the images, in float64."""
    init = functools.partial(model.init, jax.random.key(0))
    with jax.enable_x64(False):
        shapes = jax.eval_shape(init, np.float32(images))
    variables = jax.tree.map(jnp.array, random_like(shapes))
    return model.copy(dtype=jnp.float64), variables, jnp.array(images)


def step(model, images):
    """Loss, logits, new statistics and gradients in float64, under jit.

    Gradients of the images too, as another net may lie before this one.
    """
    with jax.enable_x64(True):
        model, variables, images = float64(model, images)

        def loss(params, images):
            logits, updates = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0, impl="unsafe_rbg")},
            )
            return jnp.mean(jnp.square(logits - 1)), (logits, updates)

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.tree.map(
            np.asarray, jax.jit(gradient)(variables["params"], images)
        )


def assert_equal_steps(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
        found,
        expected,
    )


OPTIONS = {
    "the paper's, with dropout": dict(dropout_rate=0.2),
    "plain, instance norm": dict(
        norm="instance", bottleneck_width=0, dropout_rate=0.2
    ),
    "a growth rate a layer": dict(growth_rate=(4, 6, 2), activation="gelu"),
    "all of it": dict(
        growth_rate=(4, 6),
        activation="elu",
        norm="group",
        norm_groups=2,
        dropout_rate=0.2,
        drop_path_rate=0.5,
        squeeze_excite=2,
        blur_pool="all",
    ),
}


@functools.cache
def kept_step(name):
    return step(DenseNet(**{**NET, **OPTIONS[name]}), make_images())


@pytest.mark.parametrize("remat", OTHERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_recomputing_changes_no_result(name, remat, images):
    model = DenseNet(**{**NET, **OPTIONS[name]}, remat=remat)

    assert_equal_steps(step(model, images), kept_step(name))


@pytest.mark.parametrize("remat", ["convs", "layer"])
def test_sums_of_pending_gradients_change_no_result(monkeypatch, remat, images):
    """In a block of more layers than gradients may be pending."""
    options = dict(
        block_layers=(4,), growth_rate=3, bottleneck_width=0, stem="cifar"
    )
    expected = step(DenseNet(**options), images)
    for max_pending in (1, 3):
        monkeypatch.setattr(recompute, "_MAX_PENDING", max_pending)
        found = step(DenseNet(**options, remat=remat), images)

        assert_equal_steps(found, expected)


def test_bfloat16_gradients_are_summed_in_float32(monkeypatch):
    """Pending gradients 1, 2^-8 and 2^-8 are 1 in bfloat16, added in turn."""
    pending = [jnp.full((1, 1, 1, 1), v, jnp.bfloat16) for v in (1, 2**-8)]

    total = recompute._total([*pending, pending[1]], slice(None))

    assert total.dtype == jnp.float32
    assert total.item() == 1 + 2**-7


class SelfMeasuring(nn.Module):
    """A layer of a researcher: no stages, moments of its own, its own dropout.

    The same function as a plain layer of the paper with another activation.
    """

    growth_rate: int
    drop_path_rate: float
    options: LayerOptions

    @nn.compact
    def __call__(self, features, train):
        x = jnp.concatenate([maps.array for maps in features], axis=-1)
        norm = self.options.norm_layer(name="norm1")
        x = jnp.sin(norm(self.options.measure(x, train), train))
        x = self.options.conv(self.growth_rate, 3, padding=1, name="conv1")(x)
        return nn.Dropout(0.2, deterministic=not train)(x)


class Sandwich(StagedLayer):
    """A layer of a researcher, in three stages with a gate between them."""

    stages = ("narrow", "gate", "widen")

    def setup(self):
        self.norm1 = self.options.norm_layer()
        self.conv1 = self.options.conv(6, 1)
        self.scale = self.param("scale", nn.initializers.ones, (6,))
        self.norm2 = self.options.norm_layer()
        self.conv2 = self.options.conv(self.growth_rate, 5, padding=2)

    def narrow(self, x, train, key):
        return self.conv1(jnp.tanh(self.norm1(x, train)))

    def gate(self, x, train, key):
        noise = 0.0
        if train:
            noise = jax.random.normal(key, x.array.shape[:1], x.array.dtype)
            noise = jnp.expand_dims(noise, (1, 2, 3))
        scale = jnp.expand_dims(self.scale, (0, 1, 2)).astype(x.array.dtype)
        return x.array * jnp.cos(x.array * scale) + noise * x.array

    def widen(self, x, train, key):
        return self.conv2(nn.softplus(self.norm2(x, train)))


@functools.cache
def kept_unknown_step(layer):
    return step(DenseNet(**SMALL, dense_layer=layer), make_images())


class Doubled(DenseLayer):
    """The paper's layer, whose call does more than its stages."""

    def __call__(self, features, train):
        return 2 * super().__call__(features, train)


@pytest.mark.parametrize("remat", OTHERS)
@pytest.mark.parametrize("layer", [SelfMeasuring, Sandwich, Doubled])
def test_a_layer_that_the_library_does_not_know(layer, remat, images):
    kept = kept_unknown_step(layer)

    found = step(DenseNet(**SMALL, dense_layer=layer, remat=remat), images)

    assert_equal_steps(found, kept)


@pytest.mark.parametrize("remat", ["none", "convs", "nn_layer"])
def test_moments_computed_once_are_those_of_every_reader(remat, images):
    class OwnMoments(DenseLayer):
        """Normalises with moments that it computes itself."""

        def __call__(self, features, train):
            x = concatenate(features).array
            return super().__call__([self.options.measure(x, train)], train)

    shared = step(DenseNet(**SMALL, remat=remat), images)
    own = step(DenseNet(**SMALL, dense_layer=OwnMoments), images)

    assert_equal_steps(shared, own)


def trained_and_evaluated(model, images):
    """Logits in training, and in evaluation with the moments of that batch."""
    model, variables, images = float64(model.copy(norm_momentum=0.0), images)

    def forward(params):
        logits, updates = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return logits, updates

    # A vjp: policies with a backward pass of their own run its forward pass.
    logits, updates = jax.jit(
        lambda params: jax.vjp(forward, params, has_aux=True)[::2]
    )(variables["params"])

    def biased(path, statistic):
        # Running variances are n / (n - 1) larger.
        n = images[..., 0].size
        return statistic * ((n - 1) / n if path[-1].key == "var" else 1)

    updates = jax.tree_util.tree_map_with_path(biased, updates)
    return logits, jax.jit(model.apply)({**variables, **updates}, images)


@pytest.mark.parametrize("remat", ["none", "convs", "nn_layer"])
@pytest.mark.parametrize(
    "options",
    [
        dict(activation="silu"),
        dict(norm="group"),
        dict(norm="instance", bottleneck_width=0),
    ],
    ids=str,
)
def test_what_is_trained_is_what_is_evaluated(options, remat, images):
    """One field changes both, whatever differentiates it."""
    with jax.enable_x64(True):
        model = DenseNet(**SMALL, **options, remat=remat)
        trained, evaluated = trained_and_evaluated(model, images)

        np.testing.assert_allclose(trained, evaluated, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_editing_the_composite_function_is_one_edit(monkeypatch, remat, images):
    """Another activation or norm in the library's own code, in one place."""
    with jax.enable_x64(True):
        before, _ = trained_and_evaluated(
            DenseNet(**SMALL, remat=remat), images
        )
        with monkeypatch.context() as edit:
            edit.setattr(LayerOptions, "activate", lambda _, x: nn.silu(x))
            trained, evaluated = trained_and_evaluated(
                DenseNet(**SMALL, remat=remat), images
            )
        np.testing.assert_allclose(trained, evaluated, rtol=1e-10, atol=1e-12)
        assert not np.allclose(trained, before, rtol=1e-3)

        with monkeypatch.context() as edit:
            edit.setattr(
                layers,
                "normalisation",
                lambda scale, bias, moments, epsilon: layers.Affine(
                    scale * jnp.exp(-moments.variance), bias - moments.mean
                ),
            )
            trained, evaluated = trained_and_evaluated(
                DenseNet(**SMALL, remat=remat), images
            )
        np.testing.assert_allclose(trained, evaluated, rtol=1e-10, atol=1e-12)
        assert not np.allclose(trained, before, rtol=1e-3)


@pytest.mark.parametrize("remat", ["none", "nn_convs", "nn_layer"])
def test_forward_mode_and_second_derivatives(remat, images):
    """The policies by nn.remat take any derivative, against differences."""
    with jax.enable_x64(True):
        options = {**SMALL, "activation": "tanh", "implementation": "xla"}
        model, variables, images = float64(
            DenseNet(**options, remat=remat), images
        )
        direction = jax.tree.map(np.cos, variables["params"])

        @jax.jit
        def loss(t):
            params = jax.tree.map(
                lambda p, d: p + t * d, variables["params"], direction
            )
            logits, _ = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.mean(jnp.square(logits - 1))

        _, slope = jax.jvp(loss, (jnp.float64(0),), (jnp.float64(1),))
        curvature = jax.jit(jax.grad(jax.grad(loss)))(jnp.float64(0))

        h = 1e-4
        low, middle, high = (loss(jnp.float64(t)).item() for t in (-h, 0, h))
    np.testing.assert_allclose(slope, (high - low) / (2 * h), rtol=1e-3)
    np.testing.assert_allclose(
        curvature, (high - 2 * middle + low) / h**2, rtol=1e-2
    )


def test_recomputing_keeps_less_and_less(images):
    """Values kept for the backward pass, apart from the variables."""
    images = jnp.array(images, jnp.float32)

    def kept_values(remat):
        model = DenseNet(**NET, remat=remat, implementation="xla")
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

        def backward(variables):
            def forward(params):
                return model.apply(
                    {**variables, "params": params},
                    images,
                    train=True,
                    mutable=["batch_stats"],
                )[0]

            return jax.vjp(forward, variables["params"])[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, variables))
        return sum(leaf.size for leaf in leaves)

    kept = {remat: kept_values(remat) for remat in REMAT_POLICIES}

    assert kept["none"] > kept["convs"] > kept["early"] > kept["layer"]
    assert kept["convs"] < 0.5 * kept["none"]
    assert kept["none"] > kept["nn_convs"] > kept["nn_layer"]
    # nn.remat keeps what a layer reads; ours the output of the block.
    assert kept["convs"] <= kept["nn_convs"]


@pytest.mark.slow
def test_recomputing_saves_memory_in_the_compiled_program():
    """On CPU too, where the compiler drops the barriers of nn.remat."""

    def temporary_bytes(remat):
        model = DenseNet(
            (12,), growth_rate=8, stem="cifar", num_classes=2, remat=remat
        )
        images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

        def loss(params, batch_stats, images):
            logits, _ = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return logits.sum()

        lowered = jax.jit(jax.grad(loss)).lower(
            variables["params"], variables["batch_stats"], images
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    none, convs, layer = map(temporary_bytes, ("none", "convs", "layer"))

    assert layer < convs < none / 2


def test_early_is_layer_in_the_first_half_and_convs_in_the_second():
    policies = [recompute.block_policy("early", i, 5) for i in range(1, 6)]

    assert policies == ["layer", "layer", "convs", "convs", "convs"]
    assert recompute.block_policy("nn_convs", 1, 5) == "nn_convs"


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_initial_variables_have_the_same_paths_and_values(remat, images):
    images = jnp.array(images, jnp.float32)
    model = DenseNet(**NET, dropout_rate=0.2, squeeze_excite=2)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    def init(model, **kwargs):
        return jax.jit(functools.partial(model.init, **kwargs))(keys, images)

    expected = init(model)
    for train in (False, True):
        found = init(model.copy(remat=remat), train=train)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_dropout_follows_every_convolution_but_the_first(remat, images):
    model = DenseNet(**NET, dropout_rate=0.5, remat=remat)
    images = jnp.array(images, jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    convs, dropped = [], []

    def record(method, args, kwargs, context):
        output = method(*args, **kwargs)
        if isinstance(context.module, layers.Conv):
            convs.append("/".join(context.module.path))
        if isinstance(context.module, nn.Dropout):
            assert context.module.rate == 0.5
            dropped.append(convs[-1])
        return output

    with nn.intercept_methods(record):
        jax.eval_shape(functools.partial(model.init, train=True), keys, images)

    # 2 convolutions in each of 3 layers, and 1 in the transition.
    assert convs[0] == "conv0"
    assert dropped == convs[1:]
    assert len(dropped) == 7


def test_keys_of_dropout_differ_between_convolutions_and_layers(monkeypatch):
    keys = []

    def dropout(self, x, train, key):
        keys.append(key)
        return x

    monkeypatch.setattr(LayerOptions, "dropout", dropout)
    model = DenseNet(**NET, dropout_rate=0.5)
    images = jnp.zeros((1, 4, 4, 3))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    variables = model.init(rngs, images)
    keys.clear()
    model.apply(
        variables,
        jnp.zeros((2, 4, 4, 3)),
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(1)},
    )

    found = {tuple(jax.random.key_data(key).tolist()) for key in keys}
    assert len(found) == 6


def test_stochastic_depth_drops_whole_examples_more_in_deeper_layers():
    model = DenseNet(
        (4,), growth_rate=4, stem="cifar", num_classes=2, drop_path_rate=0.8
    )
    images = np.random.default_rng(0).standard_normal((512, 2, 2, 1))
    images = jnp.array(images, jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    block = {}

    def record(method, args, kwargs, context):
        output = method(*args, **kwargs)
        called = context.method_name == "__call__"
        if called and isinstance(context.module, densenet.DenseBlock):
            block["features"] = output.array
        return output

    with nn.intercept_methods(record):
        model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(3)},
        )

    new = np.asarray(block["features"])[..., 8:].reshape(512, 4, 4, 4)
    dropped = (new == 0).all(axis=(1, 3))  # [example, layer]
    # l / L of 0.8; the standard error is at most 2.2%.
    np.testing.assert_allclose(
        dropped.mean(axis=0), [0.2, 0.4, 0.6, 0.8], atol=0.08
    )


def test_which_mechanism_serves_a_layer():
    assert recompute.wrap_layer(DenseLayer, "convs") is DenseLayer
    assert recompute.wrap_layer(SelfMeasuring, "none") is SelfMeasuring
    assert recompute.wrap_layer(SelfMeasuring, "convs") is not SelfMeasuring
    assert recompute.has_own_backward(DenseLayer, "convs")
    assert recompute.has_own_backward(Sandwich, "layer")
    assert not recompute.has_own_backward(Doubled, "convs")
    assert not recompute.has_own_backward(Norm, "convs")
