"""Weights of PyTorch and Keras files <-> this project's variables."""

import collections
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from densenet_jax.checkpoints import layouts
from densenet_jax.checkpoints.architecture import (
    infer_architecture,
    tensor_shapes,
)
from densenet_jax.checkpoints.structure import NoMatchError, match_structure
from densenet_jax.checkpoints.tensor_files import TensorFile, open_tensors
from densenet_jax.models.densenet import TORCH_LINEAR_INIT, DenseNet

_log = logging.getLogger(__name__)

_STATISTICS = ("mean", "var")
_HEAD = "classifier/"


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

    >>> model, variables = load_pretrained("densenet121-a639ec97.pth")
    >>> logits = model.apply(variables, images)

    Args:
      path: a file of torch.save (zip, PyTorch 1.6 or later), .safetensors, or
        Keras .h5 or .weights.h5. Nothing in it is executed.
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
    places, epsilon = _locate(file, mapping, remarks, changes)

    problems = collections.defaultdict(list)
    sources = {}
    for name, target in places.items():
        if target is None:
            problems["unused"].append(name)
        elif target in sources:
            problems["duplicate"].append(
                f"{sources[target]} and {name} are both {target}"
            )
        else:
            sources[target] = name
    axes = {
        target: layouts.to_our_axes(
            name.rpartition(".")[2], len(file.tensors[name].shape)
        )
        for target, name in sources.items()
    }
    shapes = {
        target: tuple(file.tensors[name].shape[i] for i in axes[target])
        for target, name in sources.items()
    }

    try:
        attributes = infer_architecture(shapes)
    except ValueError as error:
        raise ValueError(f"{error}{_listed(problems)}") from error
    has_head = any(target.startswith(_HEAD) for target in shapes)
    new_head = num_classes is not None and (
        not has_head or num_classes != attributes["num_classes"]
    )
    if not has_head and not new_head:
        raise ValueError(
            "The file has no classifier. Give num_classes for a new one."
        )
    if new_head:
        attributes["num_classes"] = num_classes
        changes.append(
            f"The classifier is new, for {num_classes} classes, not trained."
        )
    model = DenseNet(**attributes, norm_epsilon=file.norm_epsilon or epsilon)
    expected = tensor_shapes(model, shapes["conv0/kernel"][2])
    replaced = {t for t in expected if new_head and t.startswith(_HEAD)}

    for target, shape in expected.items():
        if target in replaced:
            continue
        if target not in shapes:
            problems["missing"].append(f"{target} {list(shape)}")
        elif shapes[target] != shape:
            problems["mis-shaped"].append(
                f"{sources[target]} is {list(shapes[target])} in the order of "
                f"{target}, expected {list(shape)}"
            )
    problems["unused"] += [
        sources[target] for target in sources if target not in expected
    ]
    if any(problems.values()):
        raise ValueError(
            "The file does not hold exactly the tensors of the DenseNet that "
            f"it is nearest to ({describe(model)}).{_listed(problems)}"
        )

    flat, dtypes = {}, collections.Counter()
    for target in expected.keys() - replaced:
        values = file.tensors[sources[target]].read()
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                f"{sources[target]} is {values.dtype}: expected floats."
            )
        dtypes[str(values.dtype)] += 1
        values = values.transpose(axes[target])
        values = np.array(values, np.float32, order="C")
        flat[target] = jax.device_put(values)
    for dtype, count in dtypes.items():
        if dtype != "float32":
            changes.append(f"{count} tensors were {dtype}, now float32.")
    if new_head:
        shape = expected[_HEAD + "kernel"]
        flat[_HEAD + "kernel"] = TORCH_LINEAR_INIT(jax.random.key(seed), shape)
        flat[_HEAD + "bias"] = jnp.zeros(shape[1])
    kernel = flat["conv0/kernel"]
    if in_channels not in (None, kernel.shape[2]):
        flat["conv0/kernel"] = _adapt_stem(kernel, in_channels)
        changes.append(
            f"The stem's kernel is adapted from {kernel.shape[2]} to "
            f"{in_channels} input channels."
        )
    return Loaded(model, _to_tree(flat), remarks, changes)


def _locate(
    file: TensorFile, mapping, remarks, changes
) -> tuple[dict[str, str | None], float]:
    """Our path of every tensor (None where unknown); the norms' epsilon."""
    names = [n for n in file.tensors if not layouts.DROPPED.fullmatch(n)]
    shapes = {name: file.tensors[name].shape for name in names}
    if mapping is not None:
        layout = layouts.read_mapping(mapping)
        remarks.append(f"The names are mapped by {mapping}.")
        return _apply(layout, shapes), layout.norm_epsilon

    prefix_of = {n: layouts.PREFIXES.match(n)[0] for n in names}
    tries = [
        (_apply(layout, shapes, prefix_of), layout)
        for layout in layouts.LAYOUTS
    ]
    places, layout = min(tries, key=lambda t: list(t[0].values()).count(None))
    unknown = list(places.values()).count(None)
    if 2 * unknown > len(places):
        return _match_structure(file.container, shapes, changes), 1e-5

    for name, prefix in prefix_of.items():
        if explanation := layouts.foreign(name.removeprefix(prefix)):
            raise ValueError(explanation)
    remarks.append(f"The names are those of {layout.name}.")
    if prefixes := sorted(set(prefix_of.values()) - {""}):
        remarks.append(f"Prefixes left out: {', '.join(prefixes)}.")
    return places, layout.norm_epsilon


def _apply(layout, shapes, prefix_of=None):
    places = {}
    for name, shape in shapes.items():
        bare = name.removeprefix(prefix_of[name]) if prefix_of else name
        module, _, leaf = bare.rpartition(".")
        module = layout.our_module(module)
        leaf = layouts.our_leaf(leaf, len(shape))
        places[name] = module and leaf and f"{module}/{leaf}"
    return places


def _match_structure(container, shapes, changes):
    """The places of tensors whose names follow no table."""
    try:
        if container != "torch":
            raise NoMatchError(f"{container} files do not keep their order.")
        modules = match_structure(shapes)
    except NoMatchError as error:
        raise ValueError(
            "The names follow no known layout, and the order of the layers "
            f"does not tell them apart: {error} Write their names into a "
            "mapping file (see densenet_jax.checkpoints.layouts.read_mapping) "
            "and run densenet_jax.tools.convert with --mapping=FILE."
        ) from error
    changes.append(
        "The names follow no known layout: the layers were recognised by "
        "their order and shapes. That features are concatenated oldest first, "
        "and where the net has strides, cannot be seen in a file: check the "
        "outputs."
    )
    layout = layouts.Layout(
        "order", {layouts.re.escape(k): v for k, v in modules.items()}
    )
    return _apply(layout, shapes)


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


def _listed(problems: Mapping[str, list[str]]) -> str:
    return "".join(
        f"\n{kind} ({len(lines)}):" + "".join(f"\n  {line}" for line in lines)
        for kind, lines in problems.items()
        if lines
    )


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
    save_file(to_torch(variables), path, metadata={"format": "pt"})


def to_torch(variables: Mapping) -> dict[str, np.ndarray]:
    """The state dict of torchvision's DenseNet, as numpy arrays."""
    if not {"params", "batch_stats"} <= set(variables):
        raise ValueError(
            f"Variables have the collections {sorted(variables)}: expected "
            "'params' and 'batch_stats'."
        )
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
