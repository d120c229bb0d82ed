"""A net with folded norms computes what the net computed before."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax import (
    create_model,
    fold_norms,
    list_models,
    load_pretrained,
    save_torch,
)
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from tests import numpy_densenet as reference
from tests.random_variables import random_variables

WEIGHTS = Path(__file__).parent / "data/weights"
TINY = dict(growth_rate=4, num_classes=5, norm_epsilon=1e-3)
NETS = {
    "imagenet": DenseNet((2, 1), **TINY),
    "imagenet, no stem norm": DenseNet((1, 2), stem_norm=False, **TINY),
    "deep, blurred": DenseNet((2, 1), stem="deep", blur_pool="all", **TINY),
    "same padding": DenseNet((1, 1), stem_padding="same", **TINY),
    "cifar": DenseNet((2, 1), stem="cifar", stem_norm=False, **TINY),
    "cifar, stem norm": DenseNet((1, 1), stem="cifar", **TINY),
    "plain": DenseNet((2, 1), bottleneck_width=0, stem="cifar", **TINY),
    "nothing to fold": DenseNet(
        (2, 1), bottleneck_width=0, stem="cifar", stem_norm=False, **TINY
    ),
}


@pytest.fixture(scope="module")
def images():
    images = np.random.default_rng(1).standard_normal((3, 17, 20, 3))
    return images.astype(np.float32)


def assert_relatively_close(found, expected, tolerance):
    """Apart by at most tolerance of the largest value of expected."""
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", NETS)
def test_outputs_are_the_same(kind, images):
    model, variables = NETS[kind], random_variables(NETS[kind])

    folded, folded_variables = fold_norms(model, variables)

    logits = jax.jit(folded.apply)(folded_variables, images)
    assert_relatively_close(
        logits, jax.jit(model.apply)(variables, images), 1e-5
    )


@pytest.mark.parametrize("kind", NETS)
def test_feature_maps_are_numpys_in_float64(kind, images):
    with jax.enable_x64(True):
        model = NETS[kind].copy(dtype=jnp.float64)
        variables, wide_images = jax.tree.map(
            lambda leaf: leaf.astype(np.float64),
            (random_variables(model), images),
        )

        folded, folded_variables = fold_norms(model, variables)

        apply = functools.partial(folded.apply, method="features")
        maps = jax.jit(apply)(folded_variables, wide_images)
    expected, _, _ = reference.densenet(
        model, variables, wide_images, train=False
    )
    for found, wanted in zip(maps, expected, strict=True):
        assert found.dtype == np.float64
        assert_relatively_close(found, wanted, 1e-12)


@pytest.mark.parametrize("name", list_models())
def test_variables_are_those_of_every_folded_variant(name):
    model = create_model(name)
    model = model.copy(block_layers=(1,) * len(model.block_layers))
    shapes = {}
    for path, shape in tensor_shapes(model, 3).items():
        *modules, leaf = path.split("/")
        branch = shapes.setdefault(
            "batch_stats" if leaf in ("mean", "var") else "params", {}
        )
        for module in modules:
            branch = branch.setdefault(module, {})
        branch[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)

    found = jax.eval_shape(lambda v: fold_norms(model, v)[1], shapes)

    folded = model.copy(folded=True)
    smallest = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert found == jax.eval_shape(folded.init, jax.random.key(0), smallest)
    leaves = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(found):
        leaves.setdefault(path[-2].key, set()).add(path[-1].key)
    assert leaves["conv0"] == {"kernel"}
    assert leaves["norm1"] == {"scale", "bias", "mean", "var"}
    for norm in {"norm0", "norm2"} & leaves.keys():
        assert leaves[norm] == {"bias"}


def test_norms_without_running_statistics_cannot_be_folded():
    model = DenseNet((1,), growth_rate=4, norm="group")

    with pytest.raises(ValueError, match="norm='group'"):
        fold_norms(model, {"params": {}})


def test_converted_weights(images):
    model, variables = load_pretrained(WEIGHTS / "torchvision.pth")
    images = np.tile(images, (1, 2, 2, 1))

    folded, folded_variables = fold_norms(model, variables)

    logits = jax.jit(folded.apply)(folded_variables, images)
    assert_relatively_close(
        logits, jax.jit(model.apply)(variables, images), 1e-5
    )


def test_bfloat16(images):
    model = NETS["imagenet"].copy(dtype=jnp.bfloat16)
    variables = random_variables(model)

    folded, folded_variables = fold_norms(model, variables)

    logits = jax.jit(folded.apply)(folded_variables, images)
    assert logits.dtype == jnp.float32
    assert_relatively_close(
        logits, jax.jit(model.apply)(variables, images), 0.02
    )


def test_what_was_given_is_left_as_it_is():
    model = NETS["imagenet"]
    variables = random_variables(model)
    before = jax.tree.map(np.copy, variables)

    fold_norms(model, variables)

    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert not model.folded


def test_training_is_refused(images):
    model = NETS["imagenet"]
    folded, variables = fold_norms(model, random_variables(model))

    with pytest.raises(ValueError, match="folded norms cannot train"):
        folded.apply(variables, images, train=True, mutable=["batch_stats"])


def test_folding_twice_is_refused():
    model = NETS["imagenet"]

    with pytest.raises(ValueError, match="folded already"):
        fold_norms(*fold_norms(model, random_variables(model)))


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"params": {}}, "batch_stats"),
        (random_variables(NETS["plain"]), "denselayer1/norm2/scale"),
    ],
)
def test_variables_of_another_model_are_refused(variables, missing):
    with pytest.raises(ValueError, match=f"no '.*{missing}'"):
        fold_norms(NETS["cifar"], variables)


def test_folded_variables_are_not_written_as_pytorchs(tmp_path):
    model = NETS["imagenet"]
    _, variables = fold_norms(model, random_variables(model))

    with pytest.raises(ValueError, match="not exactly those of a DenseNet"):
        save_torch(variables, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())
