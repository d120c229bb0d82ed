"""The table of a network's layers that people draw by hand, and of networks.

The layers are those of `models.geometry`.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from densenet_jax.analysis import tables
from densenet_jax.choices import check_choice
from densenet_jax.models import geometry
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import STATISTICS, Operation
from densenet_jax.models.options import check_images


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      stage: 'stem', 'denseblock1', 'transition1' ... 'head'.
      layer: the path in the parameter tree, as 'denseblock1/denselayer3'.
      operation: '7x7/2 conv 64' is a convolution with a window of 7x7, stride
        2 and 64 output channels. The norm-ReLU before each convolution of a
        dense layer is counted but not spelled out.
      shape: of the output for one image, (height, width, channels) or
        (channels,); for a dense layer that of all the feature maps so far.
      parameters: how many are trained.
      multiply_adds: for one image, those of convolutions and the linear layer.
        Norms, ReLUs, pools and biases are left out, which is how torchvision
        counts the operations that it reports for its models.
    """

    stage: str
    layer: str
    operation: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def layers(
    model: DenseNet, image_shape: tuple[int, int, int] = (224, 224, 3)
) -> list[Row]:
    """The rows of a model, in the order in which they run.

    Args:
      model: its remat policy makes no difference.
      image_shape: (height, width, channels).

    Raises:
      ValueError: the images are too small for the model.
    """
    check_images(model, (1, *image_shape), train=False)
    *size, channels = image_shape
    rows = []
    walked = geometry.walk(model, channels)
    for layer, group in itertools.groupby(walked, key=_dense_layer):
        operations = list(group)
        group = []
        for operation in operations:
            size = [operation.output_size(n) for n in size]
            group.append(_row(model, operation, size))
        if layer is not None:
            # The layer's own channels join those that it reads.
            total = operations[0].inputs + group[-1].shape[-1]
            merged = _merge(layer, group)
            group = [dataclasses.replace(merged, shape=(*size, total))]
        rows += group
    return rows


def stages(rows: Sequence[Row]) -> list[Row]:
    """Merges rows to one a stage; norms are counted but not spelled out."""
    groups = itertools.groupby(rows, key=lambda row: row.stage)
    return [_merge(stage, list(group)) for stage, group in groups]


def format_table(rows: Sequence[Row], format: str = "text") -> str:
    """Writes rows and their totals.

    Args:
      rows: from `layers` or `stages`.
      format: 'text', 'markdown' or 'json': an object of 'rows', each with the
        attributes of `Row`, and 'totals'.

    Raises:
      ValueError: an unknown format.
    """
    check_choice("format", format, FORMATS)
    totals = _totals(rows)
    if format == "json":
        rows = [dataclasses.asdict(row) for row in rows]
        return json.dumps({"rows": rows, "totals": totals}, indent=2)
    cells = [
        (
            row.layer,
            row.operation,
            "x".join(str(n) for n in row.shape[:-1]) or "1x1",
            f"{row.shape[-1]:,}",
            f"{row.parameters:,}",
            f"{row.multiply_adds:,}",
        )
        for row in rows
    ]
    total = ("total", "", "", "")
    total += (f"{totals['parameters']:,}", f"{totals['multiply_adds']:,}")
    return _TABLES[format](_HEADER, cells, [total], left_columns=2)


def compare(
    models: Mapping[str, DenseNet],
    image_shapes: Mapping[str, tuple[int, int, int]],
) -> list[dict]:
    """What networks cost, for `format_comparison`.

    Args:
      models: by name.
      image_shapes: (height, width, channels) by name.

    Returns:
      For each 'name', 'image_shape', 'parameters', 'multiply_adds' (see `Row`)
      and 'activation_bytes' (see `activation_bytes`).

    Raises:
      ValueError: images are too small for a model.
    """
    return [
        {
            "name": name,
            "image_shape": image_shapes[name],
            **_totals(layers(model, image_shapes[name])),
            "activation_bytes": activation_bytes(model, image_shapes[name]),
        }
        for name, model in models.items()
    ]


def activation_bytes(model: DenseNet, image_shape: tuple[int, int, int]) -> int:
    """What a training step keeps of one image for its backward pass, in bytes.

    Counted as JAX traces the step, with the model's remat policy and dtype, and
    implementation='xla'; parameters are not counted. What a compiled
    step takes can be less, where XLA recomputes what is cheap, and more for
    what is at work at the time.

    Args:
      image_shape: (height, width, channels).

    Raises:
      ValueError: the images are too small for the model.
    """
    key = jax.random.key(0)
    model = model.clone(implementation="xla")

    def kept(batch_size):
        images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)

        def backward_pass(images):
            variables = model.init(key, images)

            def forward(params):
                logits, _ = model.apply(
                    {**variables, "params": params},
                    images,
                    train=True,
                    rngs={"dropout": key},
                    mutable=["batch_stats"],
                )
                return logits

            return jax.vjp(forward, variables["params"])[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward_pass, images))
        return sum(x.size * x.dtype.itemsize for x in residuals)

    # The difference is free of what does not depend on the images.
    return kept(3) - kept(2)


def format_comparison(compared: Sequence[dict], format: str = "text") -> str:
    """Writes what `compare` returns, one line a network.

    Raises:
      ValueError: an unknown format.
    """
    check_choice("format", format, FORMATS)
    if format == "json":
        return json.dumps(compared, indent=2)
    cells = [
        (
            entry["name"],
            "x".join(str(n) for n in entry["image_shape"]),
            f"{entry['parameters']:,}",
            f"{entry['multiply_adds']:,}",
            f"{entry['activation_bytes'] / 2**20:,.1f} MiB",
        )
        for entry in compared
    ]
    return _TABLES[format](_COMPARISON_HEADER, cells, [], left_columns=1)


def _totals(rows: Sequence[Row]) -> dict[str, int]:
    return {
        key: sum(getattr(row, key) for row in rows)
        for key in ("parameters", "multiply_adds")
    }


def _dense_layer(operation: Operation) -> str | None:
    """The path of the dense layer that an operation belongs to."""
    found = re.match(r"denseblock\d+/denselayer\d+", operation.path)
    return found and found[0]


def _row(model: DenseNet, operation: Operation, size: Sequence[int]) -> Row:
    shapes = geometry.leaf_shapes(model, operation)
    vector = operation.kind in ("mean", "linear")
    multiply_adds = 0
    if "kernel" in shapes:
        # Each position of the output takes the whole kernel once.
        positions = 1 if vector else math.prod(size)
        multiply_adds = positions * math.prod(shapes["kernel"])
    return Row(
        operation.stage,
        operation.path,
        _describe(operation),
        (operation.outputs,) if vector else (*size, operation.outputs),
        sum(
            math.prod(shape)
            for leaf, shape in shapes.items()
            if leaf not in STATISTICS
        ),
        multiply_adds,
    )


def _describe(operation: Operation) -> str:
    window = _window(operation.size, operation.stride)
    return {
        "conv": f"{window} conv {operation.outputs}",
        "norm": "norm-ReLU",
        "max_pool": f"{window} max pool",
        "average_pool": f"{window} average pool",
        "blur_pool": f"{window} blur pool",
        "mean": "global average pool",
        "linear": f"linear {operation.outputs}",
    }[operation.kind]


def _window(size: int, stride: int) -> str:
    return f"{size}x{size}" + (f"/{stride}" if stride > 1 else "")


def _merge(layer: str, rows: list[Row]) -> Row:
    operations = [r.operation for r in rows if r.operation != "norm-ReLU"]
    merged = []
    for operation, group in itertools.groupby(operations):
        times = len(list(group))
        merged.append(operation if times == 1 else f"{times} x ({operation})")
    return Row(
        rows[0].stage,
        layer,
        ", ".join(merged),
        rows[-1].shape,
        **_totals(rows),
    )


_HEADER = (
    "layer",
    "operation",
    "output",
    "channels",
    "parameters",
    "multiply-adds",
)


_COMPARISON_HEADER = (
    "network",
    "image",
    "parameters",
    "multiply-adds",
    "activation memory",
)

_TABLES = {"text": tables.text, "markdown": tables.markdown}
FORMATS = (*_TABLES, "json")
