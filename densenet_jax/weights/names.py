"""Which tensor of a file has which place in this project's variables."""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from densenet_jax.weights import layouts
from densenet_jax.weights.heads import HEAD, Names, droppable, find_heads
from densenet_jax.weights.layouts import Layout
from densenet_jax.weights.state_dicts import AVERAGES
from densenet_jax.weights.structure import NoMatchError, match_structure
from densenet_jax.weights.tensor_file import TensorFile
from densenet_jax.weights.text import listed

Problems = dict[str, list[str]]  # kind -> one line each


class Placed(NamedTuple):
    """A tensor of the file that has a place in our tree."""

    name: str  # in the file
    axes: tuple[int, ...]  # of the file's tensor, in our order
    shape: tuple[int, ...]  # ours


class Recognised(NamedTuple):
    """How the names of a file were read.

    Attributes:
      layout: of the names.
      placed: path in our parameter tree -> tensor.
      problems: the tensors that have no place, or that of another.
      heads: the modules that may be the classifier, where not one is.
      remarks, changes: as of `load.Loaded`.
    """

    layout: Layout
    placed: dict[str, Placed]
    problems: Problems
    heads: list[str]
    remarks: list[str]
    changes: list[str]


def recognise(
    file: TensorFile,
    fits: Callable[[Mapping[str, tuple[int, ...]]], bool],
    *,
    mapping: Layout | None = None,
    prefix: str | None = None,
    ignore: str | None = None,
    num_classes: int | None = None,
) -> Recognised:
    """Finds the place of every tensor.

    Args:
      file: of weights.
      fits: whether shapes, by path in our tree, are those of a net.
      mapping: places for names, tried before those of the known layouts.
      prefix: what the names of the net's tensors begin with.
      ignore: a pattern of names that are left out.
      num_classes: asked for: a classifier of others is not needed.

    Raises:
      ValueError: the file holds no net, or more than one.
    """
    left_out, changes = [], []
    names = Names(file, _kept(file, ignore, left_out))
    remarks = list(left_out)
    table = _by_table(names, mapping, prefix, num_classes, remarks, changes)
    if table is not None:
        shapes = {path: tensor.shape for path, tensor in table.placed.items()}
        if not any(table.problems.values()) and fits(shapes):
            return table
    try:
        return _by_structure(names, left_out)
    except NoMatchError as error:
        if table is not None:
            return table
        raise ValueError(
            "The names follow no known layout, and the order of the layers "
            f"does not tell them apart: {error} Write their names into a "
            "mapping file (see densenet_jax.weights.mapping.read_mapping), "
            "for --mapping=FILE."
        ) from error


def _kept(file, ignore, remarks) -> list[str]:
    """The names without counters, strays and what is to be ignored."""
    names = [n for n in file.tensors if not layouts.DROPPED.fullmatch(n)]
    if ignore is not None:
        try:
            ignored = [n for n in names if re.fullmatch(ignore, n)]
        except re.error as error:
            raise ValueError(
                f"ignore={ignore!r} is no pattern: {error}."
            ) from error
        if not ignored:
            raise ValueError(f"No tensor has a name like ignore={ignore!r}.")
        remarks.append(f"Ignored: {listed(ignored)}.")
        names = [n for n in names if n not in ignored]
    floats = {
        n.rpartition(".")[0]
        for n in names
        if file.tensors[n].dtype.kind not in "iub"
        or len(file.tensors[n].shape) > 2
    }
    strays = [
        n
        for n in names
        if layouts.STRAY.search(n) or n.rpartition(".")[0] not in floats
    ]
    if strays:
        remarks.append(f"Left out, as no part of the net: {listed(strays)}.")
    return [n for n in names if n not in strays]


def _by_table(names, mapping, prefix, num_classes, remarks, changes):
    """The reading by the layout that places the most; None: none places half.

    A net inside of a larger one counts by itself.
    """
    own = {}
    if mapping is not None:
        remarks.append(f"The names are mapped by {mapping.name}.")
        own = {m: mapping.our_module(m) for m in names.leaves}
        own = {m: path for m, path in own.items() if path is not None}
    rest = [m for m in names.leaves if m not in own]
    if prefix is not None:
        prefix = prefix and prefix.rstrip(".") + "."
        inside = [m for m in rest if m.startswith(prefix)]
        # The key of a wrapper is no part of the names.
        if not inside and prefix.rstrip(".") != names.file.key:
            starts = {m.partition(".")[0] for m in rest}
            raise ValueError(
                f"No tensor's name begins with prefix={prefix!r}, but with "
                f"{listed(sorted(starts))}."
            )
        rest = inside or rest
    layout, start, modules, twins = _best(rest)
    if twins:
        trained = [p for p in (start, *twins) if not AVERAGES.search(p)]
        if len(trained) != 1:
            raise ValueError(
                "The file holds several nets, whose names begin with "
                f"{listed(map(repr, [start, *twins]))}: prefix=... chooses."
            )
        layout, start, modules, _ = _best(
            [m for m in rest if m.startswith(trained[0])]
        )
        remarks.append(f"Of several nets {start!r} was taken.")
    if own and not modules:
        layout = mapping
    elif mapping is not None and layout is not None:
        layout = _extended(layout, mapping)
    inside = [m for m in rest if m.startswith(start)]
    blocks = any(path.startswith("denseblock") for path in modules.values())
    if not own and (not blocks or 2 * len(modules) < len(inside)):
        return None
    modules |= own
    heads = find_heads(names, rest, modules, start, layout)
    new_head = num_classes is not None
    if len(heads) == 1:
        modules[heads[0]] = HEAD
        new_head &= (names.linear(heads[0]) or [0])[-1] != num_classes
    _say(layout, mapping, start, remarks, changes)

    left = [m for m in names.leaves if m not in modules]
    dropped = droppable(names, left, start, modules, heads, new_head)
    if dropped:
        changes.append(f"Left out: {listed(dropped)}.")
    kept = [m for m in left if m not in dropped]
    placed, problems = _place(names, modules, kept, changes)
    return Recognised(
        layout,
        placed,
        problems,
        heads if HEAD not in modules.values() else [],
        remarks,
        changes,
    )


def _best(modules):
    """(layout, prefix, module -> path, prefixes of other whole nets).

    The classifier is not among the modules.
    """
    best, count = None, 0
    for layout in layouts.LAYOUTS:
        nets = collections.defaultdict(dict)
        for module in modules:
            for start in _starts(module):
                path = layout.our_module(module[len(start) :])
                if path is not None:
                    if path != HEAD:
                        nets[start][module] = path
                    break
        for start, places in nets.items():
            if len(set(places.values())) > count:
                best, count = (layout, start, nets), len(set(places.values()))
    if best is None:
        return None, "", {}, []
    layout, start, nets = best
    twins = [
        other
        for other, places in nets.items()
        if other != start
        and {"conv0", "norm5"} <= set(places.values())
        and "conv0" in nets[start].values()
    ]
    return layout, start, nets[start], twins


def _starts(module):
    """'' and all parts of a name that end in a dot."""
    yield ""
    for match in re.finditer(r"\.", module):
        yield module[: match.end()]


def _extended(layout, mapping):
    """A known layout with what a mapping says beside its rules."""
    stated = {"attributes": layout.attributes | mapping.attributes}
    if mapping.newest_first is not None:
        stated["newest_first"] = mapping.newest_first
    return dataclasses.replace(layout, **stated)


def _say(layout, mapping, start, remarks, changes):
    if layout is not mapping and layout is not layouts.OURS:
        remarks.append(f"The names are those of {layout.name}.")
    if layout.newest_first:
        changes.append(
            "The input channels are put in another order: nets of these names "
            "concatenate the newest features first (a mapping with "
            "newest_first = false says otherwise)."
        )
    if start:
        remarks.append(f"Prefixes left out: {start}")


def _place(names, modules, left, changes) -> tuple[dict, Problems]:
    placed, problems = {}, collections.defaultdict(list)
    problems["unused"] += [
        name for module in left for name in names.leaves[module].values()
    ]
    for module, leaves in names.leaves.items():
        path = modules.get(module)
        if path == "":
            changes += [f"{name} is left out." for name in leaves.values()]
        if not path:
            continue
        for their_leaf, name in leaves.items():
            shape = names.file.tensors[name].shape
            leaf = layouts.our_leaf(their_leaf, len(shape))
            target = f"{path}/{leaf}"
            if leaf is None:
                problems["unused"].append(name)
            elif target in placed:
                problems["duplicate"].append(
                    f"{placed[target].name} and {name} are both {target}"
                )
            else:
                axes = layouts.to_our_axes(their_leaf, len(shape))
                ours = tuple(shape[i] for i in axes)
                placed[target] = Placed(name, axes, ours)
    return placed, problems


def _by_structure(names, remarks) -> Recognised:
    """The reading of a file whose names follow no table, by its order."""
    file = names.file
    if not file.ordered:
        raise NoMatchError(f"{file.container} files do not keep their order.")
    shapes = {}
    for module, leaves in names.leaves.items():
        for leaf, name in leaves.items():
            leaf, shape = layouts.as_torch(leaf, file.tensors[name].shape)
            shapes[f"{module}.{leaf}"] = shape
    modules = match_structure(shapes)
    changes = [
        "The names follow no known layout: the layers were recognised by "
        "their order and shapes. The order of concatenation, strides and "
        "ReLUs cannot be seen in a file, and are taken to be torchvision's: "
        "check the outputs."
    ]
    placed, problems = _place(names, modules, [], changes)
    keras = {"norm_epsilon": layouts.KERAS_EPSILON}
    layout = Layout(
        "order and shapes",
        {},
        attributes=keras if file.container == "keras" else {},
    )
    return Recognised(layout, placed, problems, [], remarks, changes)
