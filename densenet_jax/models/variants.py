"""The published variants by name.

ImageNet nets: the paper's table 1; 161 and 264 with k=48 are wider nets that
the authors added; densenetblur121d and densenet264d are timm's. CIFAR and SVHN
nets: the paper's table 2; L layers are 3 equal blocks, (L - 4) / 3 layers each,
or (L - 4) / 6 with bottlenecks.
"""

import dataclasses

from densenet_jax.choices import check_choice
from densenet_jax.models.densenet import DenseNet

_CIFAR = dict(stem="cifar", stem_norm=False, num_classes=10)


def _imagenet(block_layers, growth_rate=32):
    return dict(block_layers=block_layers, growth_rate=growth_rate)


def _cifar_plain(depth, growth_rate):
    return dict(
        block_layers=((depth - 4) // 3,) * 3,
        growth_rate=growth_rate,
        compression=1.0,
        bottleneck_width=0,
        stem_features=16,
        **_CIFAR,
    )


def _cifar_bc(depth, growth_rate):
    return dict(
        block_layers=((depth - 4) // 6,) * 3, growth_rate=growth_rate, **_CIFAR
    )


VARIANTS = {
    "densenet121": _imagenet((6, 12, 24, 16)),
    "densenet161": _imagenet((6, 12, 36, 24), growth_rate=48),
    "densenet169": _imagenet((6, 12, 32, 32)),
    "densenet201": _imagenet((6, 12, 48, 32)),
    "densenet264": _imagenet((6, 12, 64, 48)),
    "densenet264_k48": _imagenet((6, 12, 64, 48), growth_rate=48),
    "densenetblur121d": dict(
        stem="deep", blur_pool="stem", **_imagenet((6, 12, 24, 16))
    ),
    "densenet264d": dict(stem="deep", **_imagenet((6, 12, 64, 48), 48)),
    "densenet_40_12": _cifar_plain(40, 12),
    "densenet_100_12": _cifar_plain(100, 12),
    "densenet_100_24": _cifar_plain(100, 24),
    "densenet_bc_100_12": _cifar_bc(100, 12),
    "densenet_bc_250_24": _cifar_bc(250, 24),
    "densenet_bc_190_40": _cifar_bc(190, 40),
}

_ATTRIBUTES = [
    field.name
    for field in dataclasses.fields(DenseNet)
    if field.name not in ("parent", "name")
]


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(VARIANTS)


def create_model(name: str, **overrides) -> DenseNet:
    """Makes a published variant, with some attributes changed.

    >>> model = create_model("densenet121", num_classes=14, dtype=jnp.bfloat16)

    Args:
      name: one of `list_models()`.
      **overrides: attributes of `DenseNet`.

    Raises:
      ValueError: an unknown name or attribute, or a value out of range.
    """
    check_choice("model", name, VARIANTS)
    for attribute in overrides:
        check_choice("model attribute", attribute, _ATTRIBUTES)
    return DenseNet(**{**VARIANTS[name], **overrides})
