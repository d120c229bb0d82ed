"""Every published variant has exactly the published size.

Counts of the ImageNet nets: torchvision (121, 161, 169, 201), the arithmetic of
the paper's table 1 (264) and timm (blur121d, 264d); of the CIFAR nets: the
arithmetic of section 3, which the paper's table 2 rounds.
"""

import math

import jax
import jax.numpy as jnp
import pytest

import densenet_jax
from densenet_jax.models.variants import create_model, list_models

# Trainable parameters, those without the classifier, the classifier's input
# channels, and running means and variances.
IMAGENET = {
    "densenet121": (7_978_856, 6_953_856, 1024, 83_648),
    "densenet161": (28_681_000, 26_472_000, 2208, 219_936),
    "densenet169": (14_149_480, 12_484_480, 1664, 158_400),
    "densenet201": (20_013_928, 18_092_928, 1920, 229_056),
    "densenet264": (33_337_704, 30_648_704, 2688, 398_528),
    "densenet264_k48": (72_686_632, 68_653_632, 4032, 597_792),
    "densenetblur121d": (7_998_088, 6_973_088, 1024, 83_776),
    "densenet264d": (72_736_216, 68_703_216, 4032, 597_984),
}

# Trainable parameters with 10 and with 100 classes, and dense layers a block.
CIFAR = {
    "densenet_40_12": (1_019_722, 1_060_132, 12),
    "densenet_100_12": (6_979_642, 7_084_852, 32),
    "densenet_100_24": (27_249_082, 27_457_972, 32),
    "densenet_bc_100_12": (769_162, 800_032, 16),
    "densenet_bc_250_24": (15_324_406, 15_480_556, 41),
    "densenet_bc_190_40": (25_624_430, 25_821_620, 31),
}


def abstract_variables(model, size):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_no_variant_goes_untested():
    assert list_models() == [*IMAGENET, *CIFAR]
    assert densenet_jax.list_models() == list_models()


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_counts(name):
    trainable, without_head, width, statistics = IMAGENET[name]

    variables = abstract_variables(create_model(name), size=224)

    params = dict(variables["params"])
    assert count(params) == trainable
    classifier = params.pop("classifier")
    assert count(params) == without_head
    assert classifier["kernel"].shape == (width, 1000)
    assert count(variables["batch_stats"]) == statistics


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_counts(name, num_classes):
    *trainable, layers = CIFAR[name]
    model = create_model(name, num_classes=num_classes)

    params = abstract_variables(model, size=32)["params"]

    assert count(params) == trainable[num_classes == 100]
    assert tuple(model.block_layers) == (layers,) * 3


def test_161_has_36_layers_in_its_third_block():
    # Some ports have 32.
    assert create_model("densenet161").block_layers == (6, 12, 36, 24)


def test_overrides_change_attributes():
    model = densenet_jax.create_model("densenet121", num_classes=14)

    assert (model.num_classes, model.growth_rate) == (14, 32)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("densenet12", {}, "Unknown model 'densenet12'.*mean densenet121"),
        (
            "densenet121",
            {"grwth_rate": 12},
            "Unknown model attribute 'grwth_rate'.*mean growth_rate",
        ),
        (
            "densenet121",
            {"remat": "layers"},
            "Unknown remat policy 'layers'.*mean layer",
        ),
        ("densenet121", {"stem": "imagnet"}, "Unknown stem.*mean imagenet"),
        (
            "densenet121",
            {"kernel_init": "fan_inn"},
            "Unknown kernel_init.*mean fan_in",
        ),
    ],
)
def test_unknown_names_are_answered_with_near_ones(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **overrides)
