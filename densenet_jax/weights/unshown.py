"""What no tensor of a DenseNet shows."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from densenet_jax.models import geometry
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.options import BLUR_POOLS


def guesses(
    model: DenseNet,
    told: Mapping[str, Any],
    named: Mapping[str, Any] | None = None,
) -> list[str]:
    """What was assumed of a net's stem because no tensor shows it.

    Args:
      model: as its tensors tell.
      told: the attributes that something else tells.
      named: those of them that the names tell (see `Layout.told`).

    Returns:
      One sentence on each guess, with the attributes that say otherwise.
    """
    found = []
    # Without a norm it is the paper's stem for CIFAR.
    if model.stem == "cifar" and model.stem_norm:
        if "stem_stride" not in told:
            found.append(
                "A 3x3 stem may have stride 2, which no tensor shows: 1 is "
                "assumed; stem_stride=2 says otherwise."
            )
        if "stem_pool" not in told:
            found.append(
                "A 3x3 stem may keep its 3x3 max pool, which no tensor shows: "
                "none is assumed; stem_pool=True says otherwise."
            )
    if model.stem == "deep" and "blur_pool" not in told:
        others = [v for v in BLUR_POOLS if v != model.blur_pool]
        found.append(
            "A net with a deep stem may blur where it pools, as timm's "
            "densenetblur121d, which no tensor shows: "
            f"blur_pool={model.blur_pool!r} is assumed; "
            f"{' or '.join(f'blur_pool={v!r}' for v in others)} say otherwise."
        )
    # The paper's stem has one, and code that is not read may pool too.
    if model.stem_pool is (named or {}).get("stem_pool") is False:
        found.append(
            "No module has the name of the stem's max pool, so none is "
            "assumed: a net that pools in its code needs stem_pool=True."
        )
    return found


def plainest(model: DenseNet) -> DenseNet:
    """The same net, with None for what its kind of stem has anyway."""
    for name, value_of in (
        ("stem_stride", geometry.stem_stride),
        ("stem_pool", geometry.has_stem_pool),
    ):
        plain = model.clone(**{name: None})
        if value_of(plain) == value_of(model):
            model = plain
    return model


def newest_first_channels(model: DenseNet) -> dict[str, np.ndarray]:
    """Where a net that concatenates the newest first has our channels.

    Returns:
      For the path of each module that reads a block's features, the indices
      [channels] that take its input channels to our order, oldest first.
    """
    channels = {}
    for block in geometry.blocks(model):
        widths = [block.inputs, *block.growth_rates]
        layers = [f"{block.name}/denselayer{i}" for i in range(1, len(widths))]
        readers = [(f"{layer}/norm1", f"{layer}/conv1") for layer in layers]
        readers.append((block.reader_norm, block.reader))
        for i, paths in enumerate(readers, 1):
            ends = np.cumsum(widths[:i][::-1])[::-1]
            ours = [np.arange(end - n, end) for n, end in zip(widths, ends)]
            channels |= dict.fromkeys(paths, np.concatenate(ours))
    return channels
