"""A DenseNet's attributes from the shapes of its tensors, and back."""

import collections
import contextlib
import re
from collections.abc import Mapping

from densenet_jax.models import geometry
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import Shape, compressed, tensor_shapes
from densenet_jax.models.variants import VARIANTS


def infer_architecture(shapes: Mapping[str, Shape]) -> dict:
    """The attributes of the `DenseNet` that has tensors of these shapes.

    Growth rates may differ between layers if that explains all tensors. Where
    tensors disagree otherwise the majority counts, so that one wrong shape
    shows as that when the result's own shapes are compared with these.

    Args:
      shapes: path in our parameter tree, leaf included -> shape in our layout.

    Raises:
      ValueError: there is no such net, or too little of it is there.
    """
    if "conv0/kernel" not in shapes:
        raise ValueError("The stem's convolution (conv0/kernel) is missing.")
    stem = shapes["conv0/kernel"]
    if what := {3: "signals (1-D)", 5: "volumes (3-D)"}.get(len(stem)):
        raise ValueError(
            f"The net reads {what}: the stem's convolution is {list(stem)}. "
            "Only nets for images (2-D) are read."
        )
    if len(stem) != 4 or stem[:2] not in ((7, 7), (3, 3)) or not stem[2]:
        raise ValueError(
            f"conv0/kernel is {list(stem)}, expected [height, width, in, out] "
            "with height and width 7 (for ImageNet) or 3 (for CIFAR, or a "
            "stem of three convolutions), and one or more channels in."
        )
    kind = "imagenet" if stem[0] == 7 else "cifar"
    kind = "deep" if "conv1/kernel" in shapes else kind
    block_layers = _block_layers(shapes)
    if not block_layers or not all(block_layers):
        raise ValueError(f"Dense layers are missing: blocks {block_layers}.")

    bottleneck = any("/conv2/" in path for path in shapes)
    last = "conv2" if bottleneck else "conv1"
    layers = [
        f"denseblock{block}/denselayer{layer}"
        for block, num_layers in enumerate(block_layers, 1)
        for layer in range(1, num_layers + 1)
    ]
    new = [(f"{path}/{last}/kernel", -1) for path in layers]
    reduced = [(f"{path}/conv1/kernel", -1) for path in layers]
    norms_stem = any(path.startswith("norm0/") for path in shapes)

    def attributes(growth_rate, width):
        return {
            "stem": kind,
            "stem_norm": norms_stem,
            "blur_pool": _likely_blur(kind, block_layers, growth_rate),
            **_widths(shapes, kind, block_layers, growth_rate, width),
            "num_classes": _size(
                shapes,
                [("classifier/kernel", -1), ("classifier/bias", 0)],
                default=DenseNet.num_classes,
            ),
        }

    rates = [_size(shapes, [place], default=0) for place in new]
    if len(set(rates)) > 1 and all(rates):
        growth_rates = _by_block(rates, block_layers)
        first_width = _size(shapes, reduced[:1]) if bottleneck else 0
        with contextlib.suppress(ValueError):  # the majority's says more
            exact = attributes(growth_rates, first_width)
            if _explains(exact, shapes):
                return exact
    width = _size(shapes, reduced) if bottleneck else 0
    return attributes(_size(shapes, new), width)


def fits(shapes: Mapping[str, Shape]) -> bool:
    """Whether some `DenseNet` has exactly these; a head may be missing."""
    try:
        model = DenseNet(**infer_architecture(shapes))
        expected = tensor_shapes(model, shapes["conv0/kernel"][2])
    except ValueError:
        return False
    head = {path for path in expected if path.startswith("classifier/")}
    return shapes == expected or shapes == {
        path: shape for path, shape in expected.items() if path not in head
    }


def _likely_blur(stem, block_layers, growth_rate) -> str:
    """Where a net blurs: as the published one with tensors of these shapes."""
    published = VARIANTS["densenetblur121d"]
    found = dict(stem=stem, block_layers=block_layers, growth_rate=growth_rate)
    same = all(published[name] == value for name, value in found.items())
    return published["blur_pool"] if same else DenseNet.blur_pool


def _by_block(rates, block_layers) -> tuple[int, ...]:
    """One growth rate a block where its layers agree; else one a layer."""
    split = geometry.growth_rates(block_layers, tuple(rates))
    if all(len(set(block)) == 1 for block in split):
        return tuple(block[0] for block in split)
    return tuple(rates)


def _explains(attributes, shapes) -> bool:
    """Whether the net has exactly these shapes; a classifier may be missing."""
    model = DenseNet(**attributes)
    expected = tensor_shapes(model, shapes["conv0/kernel"][2])
    return all(
        shapes.get(path) == shape
        for path, shape in expected.items()
        if path in shapes or not path.startswith("classifier/")
    )


def _widths(shapes, stem, block_layers, growth_rate, width) -> dict:
    """What the numbers of channels tell, given the growth rate.

    Args:
      stem: as of `DenseNet`.
      width: channels of the first layer's bottleneck; 0 without.
    """
    rates = geometry.growth_rates(block_layers, growth_rate)
    first = rates[0][0]
    if width % first:
        raise ValueError(
            f"The 1x1 convolutions make {width} channels, which is no "
            f"multiple of the growth rate {first}."
        )
    widths = _stem_widths(shapes, stem)
    stem_features = widths[-1] if set(widths[:-1]) <= {first} else widths
    return {
        "block_layers": block_layers,
        "growth_rate": growth_rate,
        "compression": _compression(shapes, rates, widths[-1]),
        "bottleneck_width": width // first,
        "stem_features": None if stem_features == 2 * first else stem_features,
    }


def _stem_widths(shapes, stem) -> tuple[int, ...]:
    """The channels that each convolution of the stem makes."""
    last = 2 if stem == "deep" else 0
    inner = [
        _size(
            shapes,
            [
                (f"conv{i}/kernel", -1),
                (f"norm{i}/scale", 0),
                (f"norm{i}/mean", 0),
                (f"conv{i + 1}/kernel", -2),
            ],
        )
        for i in range(last)
    ]
    return *inner, _entry_width(shapes, 1, f"conv{last}/kernel")


def _block_layers(shapes) -> tuple[int, ...]:
    """The highest layer's number of each block."""
    layers = collections.defaultdict(int)
    for path in shapes:
        if found := re.match(r"denseblock(\d+)/denselayer(\d+)/", path):
            block, layer = map(int, found.groups())
            layers[block] = max(layers[block], layer)
    # The numbers are a file's word; what follows builds that many layers.
    highest = max([*layers, *layers.values()], default=0)
    if highest > len(shapes) or sum(layers.values()) > len(shapes):
        raise ValueError(
            f"Blocks or layers are numbered up to {highest}, but there are "
            f"only {len(shapes)} tensors."
        )
    return tuple(layers[i] for i in range(1, max(layers, default=0) + 1))


def _size(shapes, candidates, default=None) -> int:
    """The commonest size among (path, axis) pairs."""
    sizes = collections.Counter(
        size
        for path, axis in candidates
        for size in shapes.get(path, ())[axis:][:1]
        if size > 0
    )
    if not sizes and default is None:
        raise ValueError(f"{candidates[0][0]} and all of its kind is missing.")
    return sizes.most_common(1)[0][0] if sizes else default


def _entry_width(shapes, block: int, source: str) -> int:
    """Channels that enter a block: its source makes, its first layer reads."""
    first = f"denseblock{block}/denselayer1"
    return _size(
        shapes,
        [
            (f"{first}/norm1/scale", 0),
            (f"{first}/norm1/mean", 0),
            (source, -1),
        ],
    )


def _compression(shapes, rates, channels) -> float:
    """The theta that gives every transition's width, the simplest first."""
    widths = []
    for block, block_rates in enumerate(rates[:-1], 1):
        channels += sum(block_rates)
        after = _entry_width(
            shapes, block + 1, f"transition{block}/conv/kernel"
        )
        widths.append((channels, after))
        channels = after
    simple = [0.5, 1.0]
    simple += [n / d for d in (10, 100, 1000) for n in range(1, d)]
    exact = [after / before for before, after in widths]
    for theta in simple + exact:
        # `compressed` rounds at the sixth place, and refuses to leave nothing.
        if all(
            theta * m > after - 4e-7 and compressed(m, theta) == after
            for m, after in widths
        ):
            return theta
    raise ValueError(
        "No compression theta gives every transition's width, floor(theta m): "
        + ", ".join(f"{m} -> {after}" for m, after in widths)
        + " channels."
    )
