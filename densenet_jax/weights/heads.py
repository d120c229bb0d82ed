"""Which module of a file is the net's classifier, and what is none of it."""

import re
from collections.abc import Mapping, Sequence

from densenet_jax.weights.layouts import Layout
from densenet_jax.weights.tensor_file import TensorFile

HEAD = "classifier"


class Names:
    """The tensors of a file that may be a net's, by module."""

    def __init__(self, file: TensorFile, names: Sequence[str]):
        self.file = file
        self.leaves = {}  # module -> leaf -> name
        for name in names:
            module, _, leaf = name.rpartition(".")
            self.leaves.setdefault(module, {})[leaf] = name

    def shape(self, module: str, *leaves: str) -> tuple[int, ...] | None:
        for leaf in leaves:
            if leaf in self.leaves[module]:
                return self.file.tensors[self.leaves[module][leaf]].shape
        return None

    def linear(self, module: str) -> tuple[int, int] | None:
        """(inputs, outputs) of a linear layer; None for another module."""
        if (shape := self.shape(module, "weight")) and len(shape) == 2:
            return shape[1], shape[0]
        if (shape := self.shape(module, "kernel")) and len(shape) == 2:
            return shape[0], shape[1]
        return None


def find_heads(
    names: Names,
    rest: Sequence[str],
    modules: Mapping[str, str],
    start: str,
    layout: Layout,
) -> list[str]:
    """The linear layers that may be the classifier: one, where it is clear.

    It reads as many features as the last norm has, and no linear layer reads
    its outputs.

    Args:
      names: of the file.
      rest: the modules that the mapping does not place.
      modules: module -> path in our tree, of all others.
      start: what the names of the net's modules begin with.
      layout: of the names.
    """
    if HEAD in modules.values():
        return [m for m, path in modules.items() if path == HEAD]
    norms = [m for m, path in modules.items() if path == "norm5"]
    shape = norms and names.shape(norms[0], "weight", "gamma", "scale", "bias")
    linear = {
        m: found
        for m in rest
        if m not in modules and (found := names.linear(m))
    }
    first = [m for m, (inputs, _) in linear.items() if (inputs,) == shape]
    named = [
        m
        for m in names.leaves
        if m not in modules
        and start.startswith(common := _parent(m, start))
        and layout.our_module(m[len(common) :]) == HEAD
    ]
    if len(first) > 1 and len(set(first) & set(named)) == 1:
        first = [m for m in first if m in named]
    if len(first) == 1:
        (outputs,) = [linear[m][1] for m in first]
        first += [
            m
            for m, (inputs, _) in linear.items()
            if inputs == outputs and m not in first
        ]
        return first
    return first or named


def _parent(module, start):
    """The part of a net's prefix that a module's name begins with."""
    while not module.startswith(start):
        start = start[: start.rstrip(".").rfind(".") + 1]
    return start


def droppable(
    names: Names,
    left: Sequence[str],
    start: str,
    modules: Mapping[str, str],
    heads: Sequence[str],
    new_head: bool,
) -> list[str]:
    """The modules that may be left out with a word.

    Those are an old classifier's that a new one replaces, and what lies
    outside of a net that is whole.

    Args:
      names: of the file.
      left: the modules that have no place.
      start, modules, heads: as of `find_heads`.
      new_head: whether the classifier is replaced.
    """
    dropped = []
    if new_head:
        # Layers after the pooling read vectors.
        dropped += [
            m
            for m in left
            if all(
                len(names.file.tensors[name].shape) <= 2
                for name in names.leaves[m].values()
            )
            and (m in heads or not m.startswith(f"{start}features"))
            and not _is_body(m, start)
        ]
    ends = [m for m, path in modules.items() if path == HEAD]
    whole = all(m.startswith(start) for m in ends)
    if start and (ends or new_head) and whole:
        dropped += [m for m in left if not m.startswith(start)]
    return list(dict.fromkeys(dropped))


def _is_body(module, start):
    return re.search(r"block|layer\d|trans", module[len(start) :]) is not None
