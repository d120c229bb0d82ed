"""Configs as runs hold them, read as today's keys."""

import copy
from collections.abc import Mapping
from typing import Any

from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.variants import create_model

# Of the model section: how a run computes.
_COMPUTATION = ("dtype", "remat", "implementation")

# (section, earlier key, key of today, earlier values -> values of today).
_RENAMED = (
    (
        "model",
        "form",
        "implementation",
        {"products": "matmul", "native": "xla"},
    ),
    ("model", "remat", "remat", {"half": "early"}),
    ("optimizer", "body_rate", "backbone_lr_scale", {}),
)

# (section, key, value) of later keys that change no result: a run that lacks
# one is not a run of another config.
_ADDED = (
    ("checkpoint", "on_damage", "fallback"),
    ("checkpoint", "every_minutes", 10.0),
)


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gives today's names to the keys and values that earlier versions wrote.

    Args:
      config: JSON values, of config.json or of a checkpoint; not changed.

    Returns:
      The same with today's keys. Keys that the version did not have stay
      absent, which means None, but for those that change no result.
    """
    config = copy.deepcopy(dict(config))
    for section, old, new, values in _RENAMED:
        options = config.get(section, {})
        if old in options:
            value = options.pop(old)
            options[new] = values.get(value, value)
    for section, key, value in _ADDED:
        if section in config:
            config[section].setdefault(key, value)
    return config


def make_model(section: Mapping[str, Any], **changes: Any) -> DenseNet:
    """The network of a config's `model` section.

    None is unset; what says how a run computes, not what its net is, is left
    out; lists, as JSON has them, become tuples.

    Args:
      section: 'name' of a variant and attributes, or all attributes.
      **changes: attributes in place of the section's.

    Raises:
      ValueError: an unknown name or attribute, or a value out of range.
    """
    attributes = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in section.items()
        if value is not None and key not in _COMPUTATION
    } | changes
    if "name" in attributes:
        return create_model(attributes.pop("name"), **attributes)
    return DenseNet(**attributes)
