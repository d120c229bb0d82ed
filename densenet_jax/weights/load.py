"""Weights of PyTorch and Keras files as this project's variables."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.models.options import TORCH_LINEAR_INIT
from densenet_jax.runs.config import make_model
from densenet_jax.runs.description import Description
from densenet_jax.weights import hub
from densenet_jax.weights.architecture import fits, infer_architecture
from densenet_jax.weights.containers import open_tensors
from densenet_jax.weights.labels import recognise_labels
from densenet_jax.weights.mapping import read_mapping
from densenet_jax.weights.names import Problems, recognise
from densenet_jax.weights.text import listed
from densenet_jax.weights.unshown import (
    guesses,
    newest_first_channels,
    plainest,
)
from densenet_jax.weights.values import adapt_stem, read, to_tree

_log = logging.getLogger(__name__)

_HEAD = "classifier/"


class Loaded(NamedTuple):
    """A model, its variables, and one sentence on each thing to know.

    Attributes:
      description: of the net, as far as the file states it.
      remarks: how the file was read.
      changes: what differs from the file, or is a guess.
    """

    model: DenseNet
    variables: dict
    remarks: list[str]
    changes: list[str]
    description: Description


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a file is read, where it does not tell by itself.

    Attributes:
      mapping: a file for `mapping.read_mapping`, places for names beside those
        of the known layouts.
      prefix: the key of a wrapper, or what the names of the net's tensors
        begin with, where a file holds several nets.
      ignore: a pattern of whole names that are left out.
      overrides: attributes of the model, for what no tensor tells.
    """

    mapping: str | Path | None = None
    prefix: str | None = None
    ignore: str | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load_pretrained(
    path: str | Path,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    mapping: str | Path | None = None,
    prefix: str | None = None,
    ignore: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[DenseNet, dict]:
    """Loads weights that PyTorch or Keras saved, whoever trained them.

    The architecture is read off the tensors' names and shapes. What was
    recognised is logged as information; what is changed, left out or a guess,
    as a warning.

    >>> model, variables = load_pretrained("densenet121.safetensors")
    >>> logits = model.apply(variables, images)

    Args:
      path: a file of torch.save, .safetensors, Keras .h5, .weights.h5 or
        .keras, the directory of a run or of `save_pretrained`, or a name of
        published weights (see `hub.resolve`). Nothing in it is executed.
      num_classes: with another number than the file's, the classifier is new:
        random, always the same.
      in_channels: with another number than the file's, the stem's kernel is
        summed over its input channels for 1, or else repeated and scaled, as
        timm does.
      mapping, prefix, ignore, overrides: see `Reading`.

    Returns:
      The model, and its variables {'params', 'batch_stats'}, float32.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, is not safe to read, holds values that
        are not finite, or does not hold exactly the tensors of a DenseNet: the
        message lists them.
    """
    loaded = load_weights(
        path,
        num_classes=num_classes,
        in_channels=in_channels,
        reading=Reading(mapping, prefix, ignore, overrides or {}),
    )
    for remark in loaded.remarks:
        _log.info("%s: %s", path, remark)
    for change in loaded.changes:
        _log.warning("%s: %s", path, change)
    return loaded.model, loaded.variables


def load_weights(
    path: str | Path,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    reading: Reading = Reading(),
    seed: int = 0,
) -> Loaded:
    """`load_pretrained` that returns what it has to say instead of logging it.

    Args:
      reading: how the file is read, where it does not tell.
      seed: of a new classifier.
    """
    if in_channels is not None and in_channels < 1:
        raise ValueError(f"in_channels is {in_channels}: must be positive.")
    try:
        return _load(path, num_classes, in_channels, reading, seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load(path, num_classes, in_channels, reading, seed):
    found, named = hub.resolve(path)
    file = open_tensors(found, prefix=reading.prefix)
    mapping = reading.mapping and read_mapping(reading.mapping)
    layout, placed, problems, heads, remarks, changes = recognise(
        file,
        fits,
        mapping=mapping,
        prefix=reading.prefix,
        ignore=reading.ignore,
        num_classes=num_classes,
    )
    remarks = [*file.remarks, *remarks]
    changes = [*file.changes, *changes]
    if heads and num_classes is None:
        raise ValueError(_headless(file, heads))
    try:
        model = _model(
            {target: tensor.shape for target, tensor in placed.items()},
            file,
            layout,
            reading.overrides,
            changes,
        )
    except ValueError as error:
        raise ValueError(f"{error}{_listed(problems)}") from error
    has_head = any(target.startswith(_HEAD) for target in placed)
    new_head = num_classes is not None and (
        not has_head or num_classes != model.num_classes
    )
    if not has_head and not new_head and not any(problems.values()):
        raise ValueError(_headless(file, heads))
    if new_head:
        model = model.clone(num_classes=num_classes)
        changes.append(
            f"The classifier is new, for {num_classes} classes, not trained."
        )
        placed = {t: p for t, p in placed.items() if not t.startswith(_HEAD)}
    expected = tensor_shapes(model, placed["conv0/kernel"].shape[2])
    head_shape = expected["classifier/kernel"]
    _check(placed, expected, problems, model, new_head)

    channels = newest_first_channels(model) if layout.newest_first else {}
    flat = read(file, placed, channels, changes)
    if new_head:
        flat[_HEAD + "kernel"] = TORCH_LINEAR_INIT(
            jax.random.key(seed), head_shape
        )
        flat[_HEAD + "bias"] = jnp.zeros(num_classes)
    if in_channels is not None:
        adapt_stem(flat, in_channels, changes)
    known, said = recognise_labels(file.tensors, model.num_classes)
    changes += said
    description = named.or_else(file.description).or_else(known)
    names = description.class_names
    if new_head or (names and len(names) != model.num_classes):
        description = dataclasses.replace(description, class_names=None)
    return Loaded(model, to_tree(flat), remarks, changes, description)


def _headless(file, heads) -> str:
    way = "load_pretrained(path, num_classes=N) makes a new one."
    if not heads:
        return f"The file has no classifier: {way}"
    shapes = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in file.tensors.items()
        if name.rpartition(".")[0] in heads
    ]
    return (
        f"The file's classifier is not one linear layer ({listed(shapes)}): "
        f"{way}"
    )


def _model(shapes, file, layout, overrides, changes) -> DenseNet:
    """The model of a file: as it states, or else as its tensors' shapes tell.

    Args:
      shapes: path in our parameter tree -> shape in our layout.
      file: of weights.
      layout: of its names, which may tell what no tensor does.
      overrides: what the user states.
      changes: where guesses are added.
    """
    if file.network is not None:
        head = shapes.get("classifier/kernel")
        classes = {"num_classes": head[-1]} if head else {}
        return make_model(file.network, **(classes | dict(overrides)))
    unknown = overrides.keys() - {f.name for f in dataclasses.fields(DenseNet)}
    if unknown:
        raise ValueError(
            f"overrides: a DenseNet has no attribute {listed(unknown)}."
        )
    named = layout.told(file.modules)
    told = named | file.attributes | dict(overrides)
    model = plainest(DenseNet(**(infer_architecture(shapes) | told)))
    changes += guesses(model, told, named)
    return model


def _check(placed, expected, problems, model, new_head) -> None:
    """Raises ValueError unless the tensors are exactly those of the model."""
    for target, shape in expected.items():
        if new_head and target.startswith(_HEAD):
            continue
        if target not in placed:
            problems["missing"].append(f"{target} {list(shape)}")
        elif placed[target].shape != shape:
            problems["mis-shaped"].append(
                f"{placed[target].name} is {list(placed[target].shape)} in the "
                f"order of {target}, expected {list(shape)}"
            )
    problems["unused"] += [
        placed[target].name for target in placed if target not in expected
    ]
    if any(problems.values()):
        raise ValueError(
            "The file does not hold exactly the tensors of the DenseNet that "
            f"it is nearest to ({describe(model)}).{_listed(problems)}\n"
            "--ignore=REGEX leaves tensors out, --mapping=FILE gives places to "
            "other names."
        )


def _listed(problems: Problems) -> str:
    return "".join(
        f"\n{kind} ({len(lines)}):" + "".join(f"\n  {line}" for line in lines)
        for kind, lines in problems.items()
        if lines
    )


def describe(model: DenseNet) -> str:
    """The attributes of a model that its weights tell, on one line."""
    names = (
        "block_layers",
        "growth_rate",
        "compression",
        "bottleneck_width",
        "stem",
        "stem_norm",
        "stem_features",
        "stem_stride",
        "stem_pool",
        "stem_padding",
        "blur_pool",
        "num_classes",
        "norm",
        "norm_groups",
        "norm_epsilon",
        "activation",
    )
    values = {name: getattr(model, name) for name in names}
    return ", ".join(f"{k}={v}" for k, v in values.items() if v is not None)
