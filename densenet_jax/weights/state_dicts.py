"""Which of the things in a file of torch.save are the net's tensors.

People save a state dict, a dict that holds one beside an optimizer's state, or
the whole module.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from densenet_jax.runs.description import Description
from densenet_jax.weights.text import listed
from densenet_jax.weights.torch_objects import Placeholder, Tensor, classes

# Where training scripts keep the state dict, in the order of preference.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")

# Of two copies of the weights, the one that is not trained by itself.
AVERAGES = re.compile(r"ema|averag|swa|teacher|shadow", re.IGNORECASE)

# No file keeps its weights deeper, and no net has more modules.
_DEEPEST = 6
_MOST_MODULES = 100_000

# torch's class -> ours. What follows the classifier is not ours.
_ACTIVATIONS = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "ELU": "elu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Tanh": "tanh",
}
_AFTER = {"Sigmoid", "Softmax", "LogSoftmax"}
# Our activations have no parameters: those that torch's have by default.
_DEFAULTS = {"negative_slope": 0.01, "alpha": 1.0, "approximate": "none"}

# Under these keys and attributes lie the names of the classes.
_CLASS_NAMES = ("class_names", "classes", "pathologies", "targets", "labels")


class Found(NamedTuple):
    """The tensors of a net, and what the file says beside them.

    Attributes:
      tensors: by name.
      remarks: how they were found, and what was left out.
      attributes: of the model, where a module's own attributes tell.
      description: of the net, as far as the file states it.
      modules: the names of all modules, where they are known.
      key: under which the tensors lie.
    """

    tensors: dict[str, Tensor]
    remarks: list[str]
    attributes: dict[str, Any]
    description: Description
    modules: frozenset[str]
    key: str


def find(tree: Any, prefix: str | None = None) -> Found:
    """Finds the net's tensors in what a file of torch.save holds.

    Args:
      tree: of `torch_pickle.Interpreter`.
      prefix: the key under which they lie, where there are several.

    Raises:
      ValueError: there are none, or several nets.
    """
    places = dict(_walk(tree))
    candidates = {k: v for k, v in places.items() if _is_candidate(v)}
    # Or else a dict of tensors whose names are no paths.
    candidates = candidates or {
        key: value
        for key, value in places.items()
        if isinstance(value, dict) and _named_tensors(value)[0]
    }
    if not candidates:
        raise ValueError(_nothing(tree))
    key = _choose(candidates, prefix)
    chosen = candidates[key]
    others = [other for other in candidates if other != key]
    remarks = [f"The weights are under the key {key!r}."] if key else []
    if others:
        remarks.append(
            f"There are tensors of nets under {listed(others)} too, which "
            "were not read: prefix=KEY chooses."
        )
    attributes = {}
    if isinstance(chosen, Placeholder):
        remarks.append(
            f"The file holds a whole module, {chosen.name}: its tensors were "
            "read, its code was not."
        )
        attributes = _module_attributes(chosen)
    tensors, rest = _named_tensors(chosen)
    if rest:
        remarks.append(f"No tensors, left out: {listed(rest)}.")
    if isinstance(tree, dict) and (found := classes([*tree.values()])):
        remarks.append(f"Objects in the file were not built: {listed(found)}.")
    description = Description(class_names=_class_names(tree, chosen, tensors))
    modules = _module_names(chosen)
    return Found(tensors, remarks, attributes, description, modules, key)


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """The dicts and modules in nested containers, by dotted keys."""
    todo, seen = [("", tree, 0)], set()
    while todo:
        path, value, depth = todo.pop(0)
        # A container can hold itself, or one other many times.
        if id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        yield path, value
        if isinstance(value, Placeholder):
            if _is_module(value):
                continue
            inner = [(None, value.items), (None, value.state)]
        elif isinstance(value, dict):
            inner = list(value.items())
        elif isinstance(value, list | tuple):
            inner = list(enumerate(value[:100]))
        else:
            continue
        for key, part in inner:
            if isinstance(part, dict | list | tuple | Placeholder):
                name = path if key is None else f"{path}.{key}".lstrip(".")
                todo.append((name, part, depth + 1))


def _is_module(value: Any) -> bool:
    return (
        isinstance(value, Placeholder)
        and isinstance(value.state, dict)
        and isinstance(value.state.get("_modules"), dict)
    )


def _is_candidate(value: Any) -> bool:
    """Whether it holds tensors as modules name them.

    An optimizer's state has a dict of tensors for each parameter, whose names
    are no paths.
    """
    if _is_module(value):
        return bool(_named_tensors(value)[0])
    return isinstance(value, dict) and any(
        isinstance(name, str) and "." in name and isinstance(part, Tensor)
        for name, part in value.items()
    )


def _choose(candidates: Mapping[str, Any], prefix: str | None) -> str:
    if prefix is not None and prefix in candidates:
        return prefix
    if "" in candidates or len(candidates) == 1:
        return next(iter(candidates))
    for wrapper in WRAPPERS:
        # The shallowest comes first.
        for key in candidates:
            if key.rpartition(".")[2] == wrapper and not AVERAGES.search(key):
                return key
    trained = [key for key in candidates if not AVERAGES.search(key)]
    if len(trained) == 1:
        return trained[0]
    raise ValueError(
        "The file holds the tensors of several nets, under the keys "
        f"{listed(candidates)}: prefix=KEY chooses one."
    )


def _nothing(tree: Any) -> str:
    if not isinstance(tree, dict):
        name = getattr(tree, "name", type(tree).__name__)
        return f"The file holds a {name}, expected a dict of tensors."
    kinds = [
        f"{key} ({getattr(value, 'name', type(value).__name__)})"
        for key, value in tree.items()
    ]
    return (
        "The file holds no dict of tensors, at its top or below a key. It "
        f"holds {listed(kinds) if kinds else 'nothing: the dict is empty'}."
    )


def _named_tensors(value: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, and what else is there."""
    tensors, rest = {}, []
    if isinstance(value, dict):
        for name, part in value.items():
            if isinstance(name, str) and isinstance(part, Tensor):
                tensors[name] = part
            else:
                kind = getattr(part, "name", type(part).__name__)
                rest.append(f"{name!s:.80} ({kind})")
        return tensors, rest
    for path, module in _modules(value):
        for kind in ("_parameters", "_buffers"):
            for name, part in _dict(module.state.get(kind)).items():
                if isinstance(part, Tensor):
                    tensors[f"{path}{name}"] = part
                elif part is not None:
                    rest.append(f"{path}{name}")
    return tensors, rest


def _module_names(chosen: Any) -> frozenset[str]:
    """Of a module, or as PyTorch keeps them beside a state dict."""
    if isinstance(chosen, Placeholder):
        return frozenset(path.rstrip(".") for path, _ in _modules(chosen))
    metadata = _dict(_dict(getattr(chosen, "state", None)).get("_metadata"))
    return frozenset(name for name in metadata if isinstance(name, str))


def _modules(module: Placeholder) -> Iterator[tuple[str, Placeholder]]:
    """A module and all below it, each with its path and a dot."""
    todo, count = [("", module)], 0
    while todo:
        path, module = todo.pop(0)
        yield path, module
        children = _dict(module.state.get("_modules"))
        count += len(children)
        if count > _MOST_MODULES or path.count(".") > 50:
            raise ValueError("The module in the file holds itself.")
        todo[:0] = [
            (f"{path}{name}.", child)
            for name, child in children.items()
            if _is_module(child)
        ]


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _module_attributes(module: Placeholder) -> dict[str, Any]:
    """What the modules tell that their tensors do not.

    Raises:
      ValueError: the modules differ where a `DenseNet` has one value, or have
        an activation that it has not.
    """
    found = {"norm_epsilon": set(), "activation": set(), "stem_stride": set()}
    for path, part in _modules(module):
        kind = part.name.rpartition(".")[2]
        if path.endswith("features.conv0."):
            found["stem_stride"].update(part.state.get("stride", ()))
        if kind.startswith("BatchNorm") and "eps" in part.state:
            found["norm_epsilon"].add(part.state["eps"])
        if part.name.startswith("torch.nn.modules.activation."):
            if kind not in _ACTIVATIONS.keys() | _AFTER or any(
                part.state.get(key, value) != value
                for key, value in _DEFAULTS.items()
            ):
                raise ValueError(
                    f"The module has an activation {kind}, with other "
                    "parameters than torch's defaults or none of "
                    f"{', '.join(_ACTIVATIONS)}."
                )
            if kind in _ACTIVATIONS:
                found["activation"].add(_ACTIVATIONS[kind])
    for name, values in found.items():
        if len(values) > 1:
            raise ValueError(
                f"The module has more than one {name}: "
                f"{listed(map(str, values))}."
            )
    return {name: values.pop() for name, values in found.items() if values}


def _class_names(tree, chosen, tensors) -> tuple[str, ...] | None:
    """Names that are as many as some bias of the file has values."""
    places = [tree, chosen.state if _is_module(chosen) else None]
    sizes = {tensor.shape[0] for tensor in tensors.values() if tensor.shape}
    for place in map(_dict, places):
        names = [place.get(key) for key in _CLASS_NAMES]
        index = place.get("class_to_idx")
        if isinstance(index, dict) and all(
            isinstance(i, int) for i in index.values()
        ):
            names.insert(0, sorted(index, key=index.get))
        for found in names:
            if (
                isinstance(found, list | tuple)
                and len(found) in sizes
                and all(isinstance(name, str) for name in found)
            ):
                return tuple(found)
    return None
