"""How others name a DenseNet's tensors, as tables.

A tensor's name is `module.leaf`. A layout says which of our modules theirs is;
the leaf and the rank say which of our leaves (`our_leaf`). To add a layout, add
a table to LAYOUTS.
"""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path


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
        reads the oldest first.
      norm_epsilon: that the framework's nets have.
    """

    name: str
    rules: Mapping[str, str]
    first_block: int = 1
    first_layer: int = 1
    newest_first: bool = False
    norm_epsilon: float = 1e-5

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


# Of keras.applications.
KERAS_EPSILON = 1.001e-5

_HEAD = r"(?:classifier|fc|linear|head)(?:\.\d+)?"
_LAYER = "denseblock{block}/denselayer{layer}/{kind}{n}"
_TORCHVISION = {
    # People save the features alone too.
    r"(?:features\.)?(?P<name>conv0|norm0|norm5)": "{name}",
    # norm1 in memory, norm.1 in the published files.
    r"(?:features\.)?denseblock(?P<block>\d+)\.denselayer(?P<layer>\d+)"
    r"\.(?P<kind>norm|conv)\.?(?P<n>[12])": _LAYER,
    r"(?:features\.)?transition(?P<block>\d+)\.(?P<kind>norm|conv)": (
        "transition{block}/{kind}"
    ),
    _HEAD: "classifier",
}

_CIFAR_BLOCKS = {
    "conv1": "conv0",
    r"dense(?P<block>\d+)\.(?P<layer>\d+)\.conv(?P<n>[12])": (
        "denseblock{block}/denselayer{layer}/conv{n}"
    ),
    r"dense(?P<block>\d+)\.(?P<layer>\d+)\.bn(?P<n>[12])": (
        "denseblock{block}/denselayer{layer}/norm{n}"
    ),
    "bn": "norm5",
    _HEAD: "classifier",
}

OURS = Layout(
    "this project",
    {
        r"(?P<path>conv0|norm0|norm5|classifier"
        r"|denseblock\d+/denselayer\d+/(?:norm|conv)[12]"
        r"|denseblock\d+/denselayer\d+/se/(?:squeeze|excite)"
        r"|transition\d+/(?:norm|conv))": "{path}"
    },
)

LAYOUTS = (
    OURS,
    Layout("torchvision and timm", _TORCHVISION),
    Layout(
        "efficient_densenet_pytorch (gpleiss)",
        {r"(?:features\.)?norm_final": "norm5", **_TORCHVISION},
    ),
    Layout(
        "MONAI",
        {
            r"(?:features\.)?denseblock(?P<block>\d+)\.denselayer(?P<layer>\d+)"
            r"\.layers\.(?P<kind>norm|conv)(?P<n>[12])": _LAYER,
            r"class_layers\.out": "classifier",
            **_TORCHVISION,
        },
    ),
    Layout(
        "CIFAR net with bn and fc",
        {
            "conv0": "conv0",
            r"features\.denseblock(?P<block>\d+)\.block\.(?P<layer>\d+)"
            r"\.conv(?P<n>[12])": (
                "denseblock{block}/denselayer{layer}/conv{n}"
            ),
            r"features\.denseblock(?P<block>\d+)\.block\.(?P<layer>\d+)"
            r"\.bn(?P<n>[12])": "denseblock{block}/denselayer{layer}/norm{n}",
            r"features\.transition(?P<block>\d+)\.bn": (
                "transition{block}/norm"
            ),
            r"features\.transition(?P<block>\d+)\.conv": (
                "transition{block}/conv"
            ),
            "bn": "norm5",
            _HEAD: "classifier",
        },
        first_layer=0,
    ),
    Layout(
        "pytorch-cifar (kuangliu)",
        {
            **_CIFAR_BLOCKS,
            r"trans(?P<block>\d+)\.bn": "transition{block}/norm",
            r"trans(?P<block>\d+)\.conv": "transition{block}/conv",
        },
        first_layer=0,
        newest_first=True,
    ),
    Layout(
        "pytorch-classification (bearpaw)",
        {
            **_CIFAR_BLOCKS,
            r"trans(?P<block>\d+)\.bn1": "transition{block}/norm",
            r"trans(?P<block>\d+)\.conv1": "transition{block}/conv",
        },
        first_layer=0,
    ),
    Layout(
        "Keras applications",
        {
            # Keras 2 wrote conv1/conv, Keras 3 writes conv1_conv.
            r"(?:.*/)?conv1[_/]conv": "conv0",
            r"(?:.*/)?conv1[_/]bn": "norm0",
            r"(?:.*/)?conv(?P<block>\d+)_block(?P<layer>\d+)_0_bn": (
                "denseblock{block}/denselayer{layer}/norm1"
            ),
            r"(?:.*/)?conv(?P<block>\d+)_block(?P<layer>\d+)_1_bn": (
                "denseblock{block}/denselayer{layer}/norm2"
            ),
            r"(?:.*/)?conv(?P<block>\d+)_block(?P<layer>\d+)"
            r"_(?P<n>[12])_conv": (
                "denseblock{block}/denselayer{layer}/conv{n}"
            ),
            r"(?:.*/)?pool(?P<block>\d+)_bn": "transition{block}/norm",
            r"(?:.*/)?pool(?P<block>\d+)_conv": "transition{block}/conv",
            r"(?:.*/)?bn": "norm5",
            r"(?:.*/)?predictions": "classifier",
        },
        first_block=2,
        norm_epsilon=KERAS_EPSILON,
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


def as_torch(leaf: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """A leaf's name and shape as PyTorch has them."""
    if leaf == "kernel":
        order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), range(len(shape)))
        return "weight", tuple(shape[i] for i in order)
    keras = {
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    }
    return keras.get(leaf, leaf), shape


def read_mapping(path: str | Path) -> Layout:
    r"""A layout from a TOML file, for nets that follow no table here.

    The keys are `Layout`'s; patterns are tried on the names in the file as they
    are:

        first_layer = 0
        [rules]
        'stem\.conv' = 'conv0'
        'auxiliary' = ''  (left out; tensors outside of modules: '' = '')
        'b(?P<block>\d+)\.l(?P<layer>\d+)\.(?P<kind>norm|conv)(?P<n>[12])' =
            'denseblock{block}/denselayer{layer}/{kind}{n}'  (in one line)

    Raises:
      ValueError: not such a file.
    """
    try:
        content = tomllib.loads(Path(path).read_text())
        layout = Layout(name=str(path), **content)
        for field in dataclasses.fields(Layout):
            if field.name in content and field.name != "rules":
                kind = type(field.default)
                if not isinstance(content[field.name], kind):
                    raise TypeError(f"{field.name} must be {kind.__name__}")
        for pattern, place in layout.rules.items():
            groups = re.compile(pattern).groupindex
            place.format(**dict.fromkeys(groups, 1))
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        re.error,
    ) as error:
        raise ValueError(f"{path} is no mapping of names: {error}") from error
    return layout
