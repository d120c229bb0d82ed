"""Weights of PyTorch and Keras files <-> this project's variables."""

import collections
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from densenet_jax.files import replacing
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.models.options import TORCH_LINEAR_INIT
from densenet_jax.weights import layouts
from densenet_jax.weights.architecture import (
    infer_architecture,
    newest_first_channels,
)
from densenet_jax.weights.containers import TensorFile, open_tensors
from densenet_jax.weights.structure import NoMatchError, match_structure

_log = logging.getLogger(__name__)

_STATISTICS = ("mean", "var")
_HEAD = "classifier/"

_Problems = dict[str, list[str]]  # kind -> one line each


class Loaded(NamedTuple):
    """A model, its variables, and one sentence on each thing to know.

    Attributes:
      remarks: how the file was read.
      changes: what differs from the file, or is a guess.
    """

    model: DenseNet
    variables: dict
    remarks: list[str]
    changes: list[str]


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
    layout, bare_names = _recognise(file, mapping, remarks, changes)
    if num_classes is not None:
        bare_names = _without_deep_head(layout, bare_names)
    placed, problems = _place(file, layout, bare_names, changes)
    try:
        attributes = infer_architecture({t: p.shape for t, p in placed.items()})
    except ValueError as error:
        raise ValueError(f"{error}{_listed(problems)}") from error

    has_head = any(target.startswith(_HEAD) for target in placed)
    new_head = num_classes is not None and (
        not has_head or num_classes != attributes["num_classes"]
    )
    if not has_head and not new_head:
        raise ValueError(
            "The file has no classifier: load_pretrained(path, num_classes=N) "
            "makes a new one."
        )
    if new_head:
        attributes["num_classes"] = num_classes
        changes.append(
            f"The classifier is new, for {num_classes} classes, not trained."
        )
        placed = {t: p for t, p in placed.items() if not t.startswith(_HEAD)}
    epsilon = file.norm_epsilon or layout.norm_epsilon
    model = DenseNet(**attributes, norm_epsilon=epsilon)
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
    return Loaded(model, _to_tree(flat), remarks, changes)


class _Placed(NamedTuple):
    """A tensor of the file that has a place in our tree."""

    name: str  # in the file
    axes: tuple[int, ...]  # of the file's tensor, in our order
    shape: tuple[int, ...]  # ours


def _recognise(
    file: TensorFile, mapping, remarks, changes
) -> tuple[layouts.Layout, dict[str, str]]:
    """The layout of a file, and its tensors' names without their prefixes."""
    names = [n for n in file.tensors if not layouts.DROPPED.fullmatch(n)]
    whole = {name: name for name in names}
    if mapping is not None:
        remarks.append(f"The names are mapped by {mapping}.")
        return layouts.read_mapping(mapping), whole

    prefixes = {n: layouts.PREFIXES.match(n)[0] for n in names}
    known = {name: name.removeprefix(prefixes[name]) for name in names}
    # What all names begin with, as far as the last dot, may be one more.
    common = os.path.commonprefix(list(known.values()))  # noqa: RUF071
    common = common.rpartition(".")[0]
    common = common and f"{common}."
    stripped = {n: bare.removeprefix(common) for n, bare in known.items()}

    def unknown(candidate):
        layout, bare_names = candidate
        return sum(
            layout.our_module(bare.rpartition(".")[0]) is None
            for bare in bare_names.values()
        )

    candidates = [
        (layout, bare_names)
        for bare_names in (known, stripped)
        for layout in layouts.LAYOUTS
    ]
    layout, bare_names = best = min(candidates, key=unknown)
    if 2 * unknown(best) > len(names):
        return _match_structure(file, names, changes), whole

    if any(map(layouts.DEEP_STEM.fullmatch, bare_names.values())):
        raise ValueError(
            "The net has a deep stem, three 3x3 convolutions, as timm's "
            "densenet121d, densenet264d and densenetblur121d (which also "
            "blurs where the stem pools): this project's stems have one "
            "convolution, and no blur pooling."
        )
    remarks.append(f"The names are those of {layout.name}.")
    if layout.newest_first:
        changes.append(
            "The input channels are put in another order: nets of these names "
            "concatenate the newest features first."
        )
    found = {n.removesuffix(bare_names[n]) for n in names} - {""}
    if found:
        remarks.append(f"Prefixes left out: {', '.join(sorted(found))}")
    return layout, bare_names


def _without_deep_head(layout, bare_names) -> dict[str, str]:
    """Leaves out a head of several layers, which a new head replaces."""
    modules = {name: b.rpartition(".")[0] for name, b in bare_names.items()}
    head = {m for m in modules.values() if layout.our_module(m) == "classifier"}
    if len(head) < 2:
        return bare_names
    return {n: b for n, b in bare_names.items() if modules[n] not in head}


def _match_structure(file, names, changes) -> layouts.Layout:
    """The layout of a file whose names follow no table."""
    try:
        if file.container != "torch":
            raise NoMatchError(
                f"{file.container} files do not keep their order."
            )
        modules = match_structure({n: file.tensors[n].shape for n in names})
    except NoMatchError as error:
        raise ValueError(
            "The names follow no known layout, and the order of the layers "
            f"does not tell them apart: {error} Write their names into a "
            "mapping file (see densenet_jax.weights.layouts.read_mapping) "
            "and run densenet_jax.tools.convert with --mapping=FILE."
        ) from error
    changes.append(
        "The names follow no known layout: the layers were recognised by "
        "their order and shapes. The order of concatenation, strides and "
        "ReLUs cannot be seen in a file, and are taken to be torchvision's: "
        "check the outputs."
    )
    rules = {re.escape(module): path for module, path in modules.items()}
    return layouts.Layout("order and shapes", rules)


def _place(
    file, layout, bare_names, changes
) -> tuple[dict[str, _Placed], _Problems]:
    """Finds the place of every tensor; lists those that have none or share."""
    placed, problems = {}, collections.defaultdict(list)
    for name, bare in bare_names.items():
        shape = file.tensors[name].shape
        module, _, their_leaf = bare.rpartition(".")
        path = layout.our_module(module)
        if path == "":
            changes.append(f"{name} is left out.")
            continue
        leaf = layouts.our_leaf(their_leaf, len(shape))
        if path is None or leaf is None:
            problems["unused"].append(name)
            continue
        target = f"{path}/{leaf}"
        if target in placed:
            problems["duplicate"].append(
                f"{placed[target].name} and {name} are both {target}"
            )
            continue
        axes = layouts.to_our_axes(their_leaf, len(shape))
        placed[target] = _Placed(name, axes, tuple(shape[i] for i in axes))
    return placed, problems


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


def _listed(problems: _Problems) -> str:
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


def _flatten(variables) -> dict[str, jax.Array]:
    """Parameters and statistics in one dict; their leaves' names differ."""
    return flax.traverse_util.flatten_dict(
        variables["params"], sep="/"
    ) | flax.traverse_util.flatten_dict(variables["batch_stats"], sep="/")


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
        "num_classes",
        "norm_epsilon",
    )
    return ", ".join(f"{name}={getattr(model, name)}" for name in names)


def save_torch(variables: Mapping, path: str | Path) -> None:
    """Writes variables as .safetensors in torchvision's names and layout.

    >>> save_torch(variables, "densenet.safetensors")

    `torchvision.models.densenet121().load_state_dict(
    safetensors.torch.load_file("densenet.safetensors"))` takes it as it is, if
    the net is a densenet121; `load_pretrained` gives the same variables back.
    The norms' epsilon is not in the file: PyTorch's is 1e-5.

    Args:
      variables: {'params', 'batch_stats'} of a `DenseNet`.
      path: of the new file.

    Raises:
      ValueError: variables are not those of a DenseNet.
    """
    tensors = to_torch(variables)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def to_torch(variables: Mapping) -> dict[str, np.ndarray]:
    """The state dict of torchvision's DenseNet, as numpy arrays.

    Raises:
      ValueError: variables are not those of a DenseNet.
    """
    if not {"params", "batch_stats"} <= set(variables):
        raise ValueError(
            f"Variables have the collections {sorted(variables)}: expected "
            "'params' and 'batch_stats'."
        )
    shapes = {path: value.shape for path, value in _flatten(variables).items()}
    model = DenseNet(**infer_architecture(shapes))
    if shapes != tensor_shapes(model, shapes["conv0/kernel"][2]):
        raise ValueError("The variables are not exactly those of a DenseNet.")
    leaves = {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    state_dict = {}
    for path, value in _flatten(variables).items():
        module, _, leaf = path.rpartition("/")
        module = module if module == "classifier" else f"features/{module}"
        name = f"{module.replace('/', '.')}.{leaves[leaf]}"
        value = np.asarray(value)
        axes = {"kernel": {4: (3, 2, 0, 1), 2: (1, 0)}}.get(leaf, {})
        order = axes.get(value.ndim, range(value.ndim))
        state_dict[name] = np.ascontiguousarray(value.transpose(order))
    return state_dict
