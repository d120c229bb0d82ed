"""Weights of PyTorch and Keras files as this project's variables."""

import collections
import dataclasses
import logging
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.models.options import TORCH_LINEAR_INIT
from densenet_jax.runs.config import make_model
from densenet_jax.runs.description import Description
from densenet_jax.weights.architecture import (
    guesses,
    infer_architecture,
    newest_first_channels,
)
from densenet_jax.weights.containers import open_tensors
from densenet_jax.weights.names import (
    Problems,
    place,
    recognise,
    without_deep_head,
)

_log = logging.getLogger(__name__)

_STATISTICS = ("mean", "var")
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


def load_pretrained(
    path: str | Path,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> tuple[DenseNet, dict]:
    """Loads weights that PyTorch or Keras saved, whoever trained them.

    The architecture is read off the tensors' names and shapes. What was
    recognised is logged as information, what is changed as a warning.

    >>> model, variables = load_pretrained("densenet121.safetensors")
    >>> logits = model.apply(variables, images)

    Args:
      path: a file of torch.save (zip, PyTorch 1.6 or later), .safetensors,
        Keras .h5 or .weights.h5, or the directory of a run of this project.
        Nothing in it is executed.
      num_classes: with another number than the file's, the classifier is new:
        random, always the same.
      in_channels: with another number than the file's, the stem's kernel is
        summed over its input channels for 1, or else repeated and scaled, as
        timm does.

    Returns:
      The model, and its variables {'params', 'batch_stats'}, float32.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, is not safe to read, or does not hold
        exactly the tensors of a DenseNet: the message lists them.
    """
    loaded = load_weights(
        path, num_classes=num_classes, in_channels=in_channels
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
    mapping: str | Path | None = None,
    seed: int = 0,
) -> Loaded:
    """`load_pretrained` that returns what it has to say instead of logging it.

    Args:
      mapping: a file for `layouts.read_mapping`, in place of the known layouts.
      seed: of a new classifier.
    """
    if in_channels is not None and in_channels < 1:
        raise ValueError(f"in_channels is {in_channels}: must be positive.")
    try:
        return _load(path, num_classes, in_channels, mapping, seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load(path, num_classes, in_channels, mapping, seed):
    file = open_tensors(path)
    remarks, changes = list(file.remarks), []
    layout, bare_names = recognise(file, mapping, remarks, changes)
    if num_classes is not None:
        bare_names = without_deep_head(layout, bare_names)
    placed, problems = place(file, layout, bare_names, changes)
    told = layout.told(file.modules)
    try:
        model = _model(
            {target: tensor.shape for target, tensor in placed.items()},
            file.attributes,
            told,
        )
    except ValueError as error:
        raise ValueError(f"{error}{_listed(problems)}") from error

    if file.attributes is None:
        changes += guesses(model, told)
    has_head = any(target.startswith(_HEAD) for target in placed)
    new_head = num_classes is not None and (
        not has_head or num_classes != model.num_classes
    )
    if not has_head and not new_head:
        raise ValueError(
            "The file has no classifier: load_pretrained(path, num_classes=N) "
            "makes a new one."
        )
    if new_head:
        model = model.clone(num_classes=num_classes)
        changes.append(
            f"The classifier is new, for {num_classes} classes, not trained."
        )
        placed = {t: p for t, p in placed.items() if not t.startswith(_HEAD)}
    expected = tensor_shapes(model, placed["conv0/kernel"].shape[2])
    head_shape = expected["classifier/kernel"]
    if new_head:
        expected = {
            t: s for t, s in expected.items() if not t.startswith(_HEAD)
        }
    _check(placed, expected, problems, model)

    channels = newest_first_channels(model) if layout.newest_first else {}
    flat = _read(file, placed, channels, changes)
    if new_head:
        flat[_HEAD + "kernel"] = TORCH_LINEAR_INIT(
            jax.random.key(seed), head_shape
        )
        flat[_HEAD + "bias"] = jnp.zeros(num_classes)
    kernel = flat["conv0/kernel"]
    if in_channels not in (None, kernel.shape[2]):
        flat["conv0/kernel"] = _adapt_stem(kernel, in_channels)
        changes.append(
            f"The stem's kernel is adapted from {kernel.shape[2]} to "
            f"{in_channels} input channels."
        )
    description = file.description
    if new_head:
        description = dataclasses.replace(description, class_names=None)
    return Loaded(model, _to_tree(flat), remarks, changes, description)


def _model(shapes, stated, told) -> DenseNet:
    """The model of a file: as it states, or else as its tensors' shapes tell.

    Args:
      shapes: path in our parameter tree -> shape in our layout.
      stated: `TensorFile.attributes`.
      told: by the names, where the file states no attributes.
    """
    if stated is None:
        return DenseNet(**infer_architecture(shapes) | told)
    head = shapes.get("classifier/kernel")
    return make_model(stated, **({"num_classes": head[-1]} if head else {}))


def _check(placed, expected, problems, model) -> None:
    """Raises ValueError unless the tensors are exactly those of the model."""
    for target, shape in expected.items():
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
            "densenet_jax.tools.convert --mapping=FILE takes places for other "
            "names, and leaves tensors out."
        )


def _listed(problems: Problems) -> str:
    return "".join(
        f"\n{kind} ({len(lines)}):" + "".join(f"\n  {line}" for line in lines)
        for kind, lines in problems.items()
        if lines
    )


def _read(file, placed, channels, changes) -> dict[str, jax.Array]:
    """Reads the tensors one by one: float32, on the device.

    Args:
      channels: for some modules, the indices that put their input channels
        into our order.
    """
    flat, dtypes = {}, collections.Counter()
    for target, (name, axes, _) in placed.items():
        dtype = file.tensors[name].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name} is {dtype}: expected floats.")
        dtypes[str(dtype)] += 1
        values = file.tensors[name].read().transpose(axes)
        module, _, leaf = target.rpartition("/")
        if module in channels and target != _HEAD + "bias":
            axis = -2 if leaf == "kernel" else 0
            values = values.take(channels[module], axis)
        with np.errstate(over="ignore"):
            single = np.array(values, np.float32, order="C")
        if dtype.itemsize > 4 and (np.isinf(single) & ~np.isinf(values)).any():
            raise ValueError(f"{name} has values beyond float32's.")
        flat[target] = jax.device_put(single)
    for dtype, count in dtypes.items():
        if dtype != "float32":
            changes.append(f"{count} tensors were {dtype}, now float32.")
    return flat


def _to_tree(flat):
    tree = {
        collection: {
            path: value
            for path, value in flat.items()
            if (path.rpartition("/")[2] in _STATISTICS)
            == (collection == "batch_stats")
        }
        for collection in ("params", "batch_stats")
    }
    return {
        collection: flax.traverse_util.unflatten_dict(leaves, sep="/")
        for collection, leaves in tree.items()
    }


def _adapt_stem(kernel: jax.Array, in_channels: int) -> jax.Array:
    """timm's adapt_input_conv, for any number of channels."""
    if in_channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    before = kernel.shape[2]
    repeats = -(-in_channels // before)
    kernel = jnp.tile(kernel, (1, 1, repeats, 1))[:, :, :in_channels]
    return kernel * (before / in_channels)


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
