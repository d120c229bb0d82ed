"""Which tensor of a file has which place in this project's variables."""

import collections
import os
import re
from typing import NamedTuple

from densenet_jax.weights import layouts
from densenet_jax.weights.containers import TensorFile
from densenet_jax.weights.structure import NoMatchError, match_structure

Problems = dict[str, list[str]]  # kind -> one line each


class Placed(NamedTuple):
    """A tensor of the file that has a place in our tree."""

    name: str  # in the file
    axes: tuple[int, ...]  # of the file's tensor, in our order
    shape: tuple[int, ...]  # ours


def recognise(
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


def without_deep_head(layout, bare_names) -> dict[str, str]:
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


def place(
    file, layout, bare_names, changes
) -> tuple[dict[str, Placed], Problems]:
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
        placed[target] = Placed(name, axes, tuple(shape[i] for i in axes))
    return placed, problems
