"""Recipes on the command line: --config=FILE and --config.KEY=VALUE."""

import ast
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from densenet_jax.models.densenet import DenseNet
from densenet_jax.runs.config import make_model


def split_overrides(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """--config.KEY=VALUE and the other words of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    overrides = [word for word in argv if word.startswith("--config.")]
    return overrides, [word for word in argv if word not in overrides]


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a recipe, for words that a user wrote.

    Raises:
      ValueError: no such file or key, or a value of another type.
    """
    # First as it is: what is wrong in the file is not the overrides' fault.
    parse_config([f"--config={path}"])
    try:
        return parse_config([f"--config={path}", *overrides])
    except (AttributeError, KeyError) as error:
        # An unknown key, or one of its parts.
        cause = error if isinstance(error, KeyError) else error.args[0]
        raise ValueError(f"{path} has no key {cause.args[0]}") from None


def parse_config(words: Sequence[str]) -> ConfigDict:
    """The config that train.py makes of --config and --config.KEY=VALUE.

    Raises:
      ValueError: no such file, or a value of another type.
      AttributeError, KeyError: no such key.
    """
    words = ["train.py", *words]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=words
    )
    try:
        values(words)
    except flags.Error as error:
        raise ValueError(str(error)) from None
    return config.value


def change_model(
    section: Mapping[str, Any], changes: Sequence[str]
) -> DenseNet:
    """The net of a config's model section, changed by --model.KEY=VALUE.

    Raises:
      ValueError: an unknown name or key, or a value out of range.
    """
    attributes = {}
    for change in changes:
        key, equals, value = change.removeprefix("--model.").partition("=")
        if not equals:
            raise ValueError(f"{change} is not --model.KEY=VALUE.")
        try:
            attributes[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            attributes[key] = value  # a word, as silu
    return make_model(section, **attributes)
