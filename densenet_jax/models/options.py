"""A net's attributes and their ranges."""

import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from densenet_jax.choices import check_choice
from densenet_jax.models import geometry
from densenet_jax.models.layers import (
    ACTIVATIONS,
    KERNEL_INITS,
    NORM_AXES,
)
from densenet_jax.models.ops import IMPLEMENTATIONS

STEMS = ("imagenet", "deep", "cifar")
BLUR_POOLS = ("none", "stem", "all")
PADDINGS = ("explicit", "same")

# What the forward pass keeps for the backward pass; the rest is recomputed.
REMAT_POLICIES = {
    "none": "every activation is kept",
    "convs": "conv outputs are kept; concatenation, norm and ReLU recomputed",
    "early": "as 'layer' in the first half of the blocks, else as 'convs'",
    "layer": "the outputs of dense layers are kept, bottlenecks recomputed",
    "nn_convs": "as 'convs', by nn.remat: for any layer and any derivative",
    "nn_layer": "as 'layer', by nn.remat: for any layer and any derivative",
}

# Torch's initial weights: uniform within 1 / sqrt(in).
TORCH_LINEAR_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_CHOICES = {
    "stem": STEMS,
    "stem_padding": PADDINGS,
    "blur_pool": BLUR_POOLS,
    "activation": ACTIVATIONS,
    "norm": NORM_AXES,
    "kernel_init": KERNEL_INITS,
    "remat": REMAT_POLICIES,
    "implementation": ("auto", *IMPLEMENTATIONS),
}
_RANGES = {
    "block_layers": (
        lambda v: len(v) > 0 and all(n > 0 for n in v),
        "one or more positive numbers of layers",
    ),
    "compression": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "bottleneck_width": (lambda v: v >= 0, "0 (no bottleneck) or more"),
    "stem_stride": (lambda v: v is None or v > 0, "positive or None"),
    "stem_pool": (lambda v: v in (None, False, True), "True, False or None"),
    "num_classes": (lambda v: v > 0, "positive"),
    "norm_groups": (lambda v: v > 0, "positive"),
    "norm_epsilon": (lambda v: v > 0, "positive"),
    "norm_momentum": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "dropout_rate": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "drop_path_rate": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "squeeze_excite": (lambda v: v >= 0, "0 (none) or more"),
}


class NetAttributes(nn.Module):
    """The attributes of a `DenseNet`.

    Attributes:
      block_layers: the number of dense layers of each block.
      growth_rate: k, the number of channels each dense layer adds: one number,
        one a block, or one a layer (of all blocks, in order).
      compression: theta in (0, 1], the share of channels that a transition
        keeps, rounded down.
      bottleneck_width: the 1x1 convolutions make bottleneck_width * growth_rate
        channels; 0 leaves them out (the plain net).
      stem: 'imagenet' (7x7 conv, stride 2, and a 3x3 max pool, stride 2),
        'deep' (timm's: three 3x3 convs, the first with stride 2, and the same
        pool) or 'cifar' (3x3 conv).
      stem_norm: whether norm and ReLU follow the stem's convs.
      stem_features: channels of the stem; None is twice the first growth rate
        k. The first two convs of a deep stem make k; a tuple says all three.
      stem_stride: of the stem's first conv; None is as `stem` has it.
      stem_pool: whether the stem has its max pool; None is as `stem` has it.
      stem_padding: 'explicit' (PyTorch's), or 'same' (TensorFlow's), which puts
        the windows of the stem's convs and pool elsewhere for even sizes.
      blur_pool: where a blur halves the size (see `windows.blur_pool`): 'none',
        'stem' (the max pool has stride 1, and a blur follows) or 'all' (in
        transitions too, in place of the average pool).
      num_classes: the number of logits.
      activation: a key of `layers.ACTIVATIONS`, where the paper has ReLU.
      norm: 'batch', 'group' or 'instance'.
      norm_groups: gcd(norm_groups, channels) groups for norm='group'.
      norm_epsilon: added to variances.
      norm_momentum: share of the old running statistics kept at each step;
        PyTorch's momentum is one minus this.
      dropout_rate: after each convolution but the stem's, when training.
      drop_path_rate: of the last dense layer's stochastic depth; that of layer
        l of L is l / L of it.
      squeeze_excite: the reduction of squeeze-and-excitation after each dense
        layer, as 16 in its paper; 0 leaves it out.
      kernel_init: 'fan_out' (the authors') or 'fan_in' (torchvision's).
      dtype: of the computation; parameters, statistics and logits are float32.
      remat: what is kept for the backward pass, a key of REMAT_POLICIES.
      implementation: of convolutions and pools: 'auto' for what suits the
        device, or a key of `ops.IMPLEMENTATIONS`.
      folded: norm0 and every norm2 are part of the conv before them but for
        their biases; for inference alone (see `fold_norms`).

    Raises:
      ValueError: on construction, for an attribute outside its range.
    """

    block_layers: Sequence[int]
    growth_rate: int | Sequence[int] = 32
    compression: float = 0.5
    bottleneck_width: int = 4
    stem: str = "imagenet"
    stem_norm: bool = True
    stem_features: int | Sequence[int] | None = None
    stem_stride: int | None = None
    stem_pool: bool | None = None
    stem_padding: str = "explicit"
    blur_pool: str = "none"
    num_classes: int = 1000
    activation: str = "relu"
    norm: str = "batch"
    norm_groups: int = 32
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    squeeze_excite: int = 0
    kernel_init: str = "fan_out"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    implementation: str = "auto"
    folded: bool = False

    def __post_init__(self):
        _check_attributes(self)
        super().__post_init__()


def _check_attributes(model: NetAttributes) -> None:
    """Raises ValueError for an attribute of a model outside its range."""
    for name, choices in _CHOICES.items():
        what = "remat policy" if name == "remat" else name
        check_choice(what, getattr(model, name), choices)
    for name, (inside, expected) in _RANGES.items():
        value = getattr(model, name)
        if not inside(value):
            raise ValueError(f"{name} is {value!r}: must be {expected}.")
    rates = geometry.growth_rates(model.block_layers, model.growth_rate)
    if min(map(min, rates)) < 1:
        raise ValueError(
            f"growth_rate is {model.growth_rate!r}: must be positive."
        )
    _check_stem(model)
    geometry.blocks(model)  # compression may leave no channel


def _check_stem(model: NetAttributes) -> None:
    expected = 3 if model.stem == "deep" else 1
    widths = geometry.stem_widths(model)
    if len(widths) != expected or min(widths) < 1:
        raise ValueError(
            f"stem_features is {model.stem_features!r}: must be None, a "
            f"positive number, or {expected} of them (one a convolution of the "
            f"{model.stem!r} stem)."
        )
    if model.blur_pool == "stem" and not geometry.has_stem_pool(model):
        raise ValueError(
            "blur_pool is 'stem', but this stem has no pool: give "
            "stem_pool=True, or blur_pool='none'."
        )


def unseen_differences(one: NetAttributes, other: NetAttributes) -> list[str]:
    """What two nets with tensors of the same shapes compute differently.

    Returns:
      The names of attributes, of those that shapes do not show.
    """
    names = ["norm", "norm_epsilon", "activation", "stem_padding", "blur_pool"]
    names += ["norm_groups"] if one.norm == "group" else []
    found = [n for n in names if getattr(one, n) != getattr(other, n)]
    if geometry.stem_stride(one) != geometry.stem_stride(other):
        found.append("stem_stride")
    if geometry.has_stem_pool(one) != geometry.has_stem_pool(other):
        found.append("stem_pool")
    return found


def check_images(
    model: NetAttributes, shape: tuple[int, ...], train: bool
) -> None:
    """Raises ValueError unless a model can take images of this shape."""
    if train and model.folded:
        raise ValueError(
            "A DenseNet with folded norms cannot train: they have no batch "
            "moments. Train the model that was given to fold_norms, and "
            "fold its variables afterwards."
        )
    if len(shape) == 4:
        sizes = [geometry.output_size(model, size) for size in shape[1:3]]
        if min(sizes) >= 1:
            return
    smallest = geometry.min_image_size(model)
    raise ValueError(
        f"Images of shape {shape} do not fit: expected [batch, height, width, "
        f"channels] with height and width of {smallest} or more for "
        f"{len(model.block_layers)} blocks behind the {model.stem!r} stem."
    )


def drop_path_rates(model: NetAttributes) -> list[list[float]]:
    """The rate of each layer of each block: l / L of the last layer's.

    Huang et al., Deep Networks with Stochastic Depth, 1603.09382, equation 4.
    """
    depths = itertools.count(1)
    total = sum(model.block_layers)
    return [
        [model.drop_path_rate * next(depths) / total for _ in range(num_layers)]
        for num_layers in model.block_layers
    ]
