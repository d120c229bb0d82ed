"""How others name a DenseNet's tensors, as tables.

A tensor's name is `module.leaf`. A layout says which of our modules theirs is;
the leaf and the rank say which of our leaves (`our_leaf`). To add a layout, add
a table to LAYOUTS.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Sign(NamedTuple):
    """What a module without tensors tells of the net.

    Attributes:
      module: a pattern that fits its whole name.
      present, absent: attributes of the net where there is such a module, and
        where there is none.
    """

    module: str
    present: Mapping[str, Any]
    absent: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way of naming the modules.

    Attributes:
      name: for messages.
      rules: pattern -> path in our parameter tree. A pattern fits a module's
        whole name; the first that fits counts. Its named groups fill the
        {braces} of the path. The path '' leaves the module out.
      first_block: what the first block's number (the group `block`) is.
      first_layer: what the first layer's number (the group `layer`) is.
      newest_first: whether a layer reads the newest features first; here it
        reads the oldest first. None is no.
      attributes: of `DenseNet`, that nets of these names have, and that their
        tensors do not show.
      signs: what changes these attributes, in files that name all modules.
    """

    name: str
    rules: Mapping[str, str]
    first_block: int = 1
    first_layer: int = 1
    newest_first: bool | None = None
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    signs: tuple[Sign, ...] = ()

    def our_module(self, module: str) -> str | None:
        """The path of a module in our tree; None if no rule fits."""
        for pattern, path in self.rules.items():
            if match := re.fullmatch(pattern, module):
                groups = match.groupdict()
                for number, first in (
                    ("block", self.first_block),
                    ("layer", self.first_layer),
                ):
                    if groups.get(number) is not None:
                        groups[number] = int(groups[number]) - first + 1
                return path.format(**groups)
        return None

    def told(self, modules: Iterable[str] = ()) -> dict[str, Any]:
        """The attributes of a net that the names in its file tell.

        Args:
          modules: the names of all modules, also of those without tensors; none
            where a file does not name these.
        """
        found, modules = dict(self.attributes), list(modules)
        for module, present, absent in self.signs if modules else ():
            fits = any(re.fullmatch(module, name) for name in modules)
            found |= present if fits else absent
        return found


_HEAD = r"(?:classifier|fc|linear|head)(?:\.\d+)?"
_LAYER = "denseblock{block}/denselayer{layer}/{kind}{n}"
_TORCHVISION = {
    # People save the features alone too.
    r"(?:features\.)?(?P<name>(?:conv|norm)[0-2]|norm5)": "{name}",
    # norm1 in memory, norm.1 in the published files.
    r"(?:features\.)?denseblock(?P<block>\d+)\.denselayer(?P<layer>\d+)"
    r"\.(?P<kind>norm|conv)\.?(?P<n>[12])": _LAYER,
    r"(?:features\.)?transition(?P<block>\d+)\.(?P<kind>norm|conv)": (
        "transition{block}/{kind}"
    ),
    _HEAD: "classifier",
}
_TORCHVISION_SIGNS = (
    Sign(r"(?:.*\.)?pool0", {}, {"stem_pool": False}),
    # A max pool and timm's blur.
    Sign(
        r"(?:.*\.)?pool0\.1",
        {"blur_pool": "stem", "stem_pool": True},
        {"blur_pool": "none"},
    ),
)


def _with_bn(
    layer: str, transition: str, stem: str, n: str = ""
) -> dict[str, str]:
    """The rules of PyTorch nets whose norms are named bn."""
    path = "denseblock{block}/denselayer{layer}"
    return {
        stem: "conv0",
        rf"{layer}\.conv(?P<n>[12])": path + "/conv{n}",
        rf"{layer}\.bn(?P<n>[12])": path + "/norm{n}",
        rf"{transition}\.bn{n}": "transition{block}/norm",
        rf"{transition}\.conv{n}": "transition{block}/conv",
        "bn": "norm5",
        _HEAD: "classifier",
    }


def _keras(layer: str, first_norm: int, transition: str) -> dict[str, str]:
    """The rules of Keras nets, which differ in these patterns."""
    path = "denseblock{block}/denselayer{layer}"
    rules = {
        # Keras 2 wrote conv1/conv, Keras 3 writes conv1_conv.
        "conv1[_/]conv": "conv0",
        "conv1[_/]bn": "norm0",
        rf"{layer}_{first_norm}_bn": f"{path}/norm1",
        rf"{layer}_{first_norm + 1}_bn": f"{path}/norm2",
        rf"{layer}_(?P<n>[12])_conv": path + "/conv{n}",
        rf"{transition}(?P<block>\d+)_bn": "transition{block}/norm",
        rf"{transition}(?P<block>\d+)_conv": "transition{block}/conv",
        "bn": "norm5",
        "predictions": "classifier",
    }
    return {rf"(?:.*/)?{name}": path for name, path in rules.items()}


KERAS_EPSILON = 1.001e-5
_KERAS_SIGNS = (
    Sign(r"(?:.*/)?zero_padding2d(?:_\d+)?", {"stem_padding": "explicit"}, {}),
)

# Known CIFAR nets, whose stems are the paper's.
_STEM_AS_ITS_KIND = {"stem_pool": None, "stem_stride": None}

OURS = Layout(
    "this project",
    {
        r"(?P<path>(?:conv|norm)[0-2]|norm5|classifier"
        r"|denseblock\d+/denselayer\d+/(?:norm|conv)[12]"
        r"|denseblock\d+/denselayer\d+/se/(?:squeeze|excite)"
        r"|transition\d+/(?:norm|conv))": "{path}"
    },
)

LAYOUTS = (
    OURS,
    Layout("torchvision and timm", _TORCHVISION, signs=_TORCHVISION_SIGNS),
    Layout(
        "efficient_densenet_pytorch (gpleiss)",
        {r"(?:features\.)?norm_final": "norm5", **_TORCHVISION},
        signs=_TORCHVISION_SIGNS,
    ),
    Layout(
        "MONAI",
        {
            r"(?:features\.)?denseblock(?P<block>\d+)\.denselayer(?P<layer>\d+)"
            r"\.layers\.(?P<kind>norm|conv)(?P<n>[12])": _LAYER,
            r"class_layers\.out": "classifier",
            **_TORCHVISION,
        },
        signs=_TORCHVISION_SIGNS,
    ),
    Layout(
        "CIFAR net with bn and fc",
        _with_bn(
            r"features\.denseblock(?P<block>\d+)\.block\.(?P<layer>\d+)",
            r"features\.transition(?P<block>\d+)",
            stem="conv0",
        ),
        first_layer=0,
        attributes=_STEM_AS_ITS_KIND,
    ),
    Layout(
        "pytorch-cifar (kuangliu)",
        _with_bn(
            r"dense(?P<block>\d+)\.(?P<layer>\d+)",
            r"trans(?P<block>\d+)",
            stem="conv1",
        ),
        first_layer=0,
        newest_first=True,
        attributes=_STEM_AS_ITS_KIND,
    ),
    Layout(
        "pytorch-classification (bearpaw)",
        _with_bn(
            r"dense(?P<block>\d+)\.(?P<layer>\d+)",
            r"trans(?P<block>\d+)",
            stem="conv1",
            n="1",
        ),
        first_layer=0,
        attributes=_STEM_AS_ITS_KIND,
    ),
    Layout(
        "Keras applications",
        _keras(r"conv(?P<block>\d+)_block(?P<layer>\d+)", 0, "pool"),
        first_block=2,
        attributes={"norm_epsilon": KERAS_EPSILON, "stem_padding": "explicit"},
    ),
    Layout(
        "KerasCV",
        _keras(r"conv(?P<block>\d+)_block_(?P<layer>\d+)", 0, "pool"),
        first_block=2,
        first_layer=0,
        attributes={"norm_epsilon": KERAS_EPSILON, "stem_padding": "same"},
        signs=_KERAS_SIGNS,
    ),
    Layout(
        "KerasHub",
        _keras(r"stack(?P<block>\d+)_block(?P<layer>\d+)", 1, "transition"),
        attributes={"norm_epsilon": KERAS_EPSILON, "stem_padding": "same"},
        signs=_KERAS_SIGNS,
    ),
)

# Counters of batches seen; nothing reads them.
DROPPED = re.compile(r"(?:.*\.)?num_batches_tracked")

# Tensors of losses, metrics, averages and thresholds beside a net's.
STRAY = re.compile(
    r"(?:^|\.)(?:criterion|losses|(?:\w+_)?loss(?:_\w+)?|metrics?"
    r"|(?:train|val|valid|test)_\w+"
    r"|(?:\w+_)?(?:acc|accuracy|auroc|auc|f1|precision|recall))\.[\w.]+$"
    r"|(?:^|\.)(?:op_threshs|n_averaged|pos_weight|class_weights?)$"
)


def our_leaf(leaf: str, rank: int) -> str | None:
    """The leaf in our tree; None for one that a DenseNet does not have."""
    if leaf == "weight":
        return "scale" if rank == 1 else "kernel"
    if leaf in ("kernel", "scale", "bias", "mean", "var"):
        return leaf
    return {
        "running_mean": "mean",
        "running_var": "var",
        "gamma": "scale",
        "beta": "bias",
        "moving_mean": "mean",
        "moving_variance": "var",
    }.get(leaf)


def to_our_axes(leaf: str, rank: int) -> tuple[int, ...]:
    """The order in which our tensor has the axes of theirs.

    PyTorch's `weight` is [out, in, height, width] or [out, in], our kernel
    [height, width, in, out] or [in, out]. Keras has the latter already.
    """
    if leaf == "weight" and rank in (2, 4):
        return {2: (1, 0), 4: (2, 3, 1, 0)}[rank]
    return tuple(range(rank))


def torch_leaf(leaf: str, rank: int) -> tuple[str, tuple[int, ...]]:
    """PyTorch's name of our leaf, and the order in which it has our axes."""
    name = {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }[leaf]
    axes = {2: (1, 0), 4: (3, 2, 0, 1)} if leaf == "kernel" else {}
    return name, axes.get(rank, tuple(range(rank)))


def as_torch(leaf: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """A leaf of any framework as PyTorch has it; one it has not, as it is."""
    ours = our_leaf(leaf, len(shape))
    if ours is None:
        return leaf, tuple(shape)
    name, axes = torch_leaf(ours, len(shape))
    shape = [shape[i] for i in to_our_axes(leaf, len(shape))]
    return name, tuple(shape[i] for i in axes)
