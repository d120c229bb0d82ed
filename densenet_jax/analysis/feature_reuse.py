"""Which earlier feature maps each layer reads: the paper's figure 5.

The paper (section 5, "Feature reuse") takes the mean absolute weight that a
layer puts on the feature maps of an earlier one as a surrogate for how much
it depends on them.
"""

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from densenet_jax.files import replacing
from densenet_jax.models import geometry
from densenet_jax.models.densenet import DenseNet

# The matrices of a picture that stand side by side, at most.
_COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class BlockReuse:
    """The weights between the layers of one dense block.

    Attributes:
      block: 'denseblock1', ...
      sources: who made the feature maps: 'input', the block's own, then
        'denselayer1', ...
      targets: who reads them: 'denselayer1', ..., then the transition that
        follows or the 'classifier'.
      weights: [sources, targets], the mean absolute weight; NaN where the
        target comes before the source, or is the source.
    """

    block: str
    sources: Sequence[str]
    targets: Sequence[str]
    weights: np.ndarray


def feature_reuse(model: DenseNet, variables: Mapping) -> list[BlockReuse]:
    """Averages the weights of every reader over each feature map's maker.

    One number is the mean of |w| over the window, the input channels that
    come from the source, and the output channels of the target's kernel: that
    of a dense layer's first convolution (1x1 with bottlenecks, else 3x3), of
    the transition's convolution, or of the classifier. That is the L1 norm
    divided by the number of weights; the paper divides it by the number of
    input channels alone, which is a constant factor for each target. Kernels
    are taken as they are, as in the paper: the scales of the norms before
    them are left out.

    Args:
      model: plain or with bottlenecks.
      variables: its 'params' are read.

    Returns:
      One for each dense block.

    Raises:
      ValueError: a kernel does not read what the model's layers make, or
        holds a NaN or an infinity.
    """
    params = flatten_dict(variables["params"], sep="/")
    reuses = []
    for block in geometry.blocks(model):
        num_layers = len(block.growth_rates)
        layers = [f"denselayer{i}" for i in range(1, num_layers + 1)]
        paths = [f"{block.name}/{layer}/conv1" for layer in layers]
        channels = [block.inputs, *block.growth_rates]
        weights = np.full((num_layers + 1, num_layers + 1), np.nan)
        for target, path in enumerate([*paths, block.reader]):
            sources = target + 1
            weights[:sources, target] = _mean_by_source(
                path, params[f"{path}/kernel"], channels[:sources]
            )
        last = block.reader.removesuffix("/conv")
        reuses.append(
            BlockReuse(block.name, ["input", *layers], [*layers, last], weights)
        )
    return reuses


def _mean_by_source(path, kernel, channels: Sequence[int]) -> list[float]:
    """Means of |kernel| [..., in, out] over each source's channels."""
    kernel = np.abs(np.asarray(kernel, np.float64))
    if kernel.shape[-2] != sum(channels):
        raise ValueError(
            f"The kernel of {path} reads {kernel.shape[-2]} channels: "
            f"expected {sum(channels)}, those of the layers before it."
        )
    if not np.isfinite(kernel).all():
        raise ValueError(f"The kernel of {path} is not finite.")
    parts = np.split(kernel, np.cumsum(channels)[:-1], axis=-2)
    return [part.mean() for part in parts]


def write_csv(blocks: Sequence[BlockReuse], path: Path) -> None:
    """Writes 'block,source,target,mean_absolute_weight', one pair a line."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["block", "source", "target", "mean_absolute_weight"])
        for reuse in blocks:
            for (i, j), weight in np.ndenumerate(reuse.weights):
                if not np.isnan(weight):
                    source, target = reuse.sources[i], reuse.targets[j]
                    row = [reuse.block, source, target, f"{weight:.6g}"]
                    writer.writerow(row)


def plot(blocks: Sequence[BlockReuse], path: Path, title: str) -> None:
    """Draws one matrix a block to a PNG.

    The kernels' sizes differ, and with them their weights: a target's column
    is shown in parts of its largest mean. (The paper's colours run from 0 to
    1 too; it does not say how they are normalised.)
    """
    rows = math.ceil(len(blocks) / _COLUMNS)
    columns = math.ceil(len(blocks) / rows)
    figure = Figure(
        figsize=(1 + 2.7 * columns, 0.5 + 3.1 * rows), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(blocks) :]:
        axes.set_visible(False)
    for axes, reuse in zip(grid.flat, blocks):
        image = _draw(axes, reuse)
    for axes in grid[:, 0]:
        axes.set_ylabel("source layer")
    figure.colorbar(
        image,
        ax=grid,
        label="mean |weight| / target's largest",
        fraction=0.02,
    )
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw(axes, reuse: BlockReuse):
    largest = np.nanmax(reuse.weights, axis=0)
    image = axes.imshow(
        reuse.weights / np.where(largest, largest, 1),
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    layers = len(reuse.sources) - 1
    step = math.ceil(layers / 8)
    shown = range(step, layers + 1, step)
    axes.set_yticks([0, *shown], ["in", *shown])
    last = reuse.targets[-1]
    letter = last[0].upper()
    # Beside the letter there is no room for another label.
    apart = [n for n in shown if n + step <= layers + 1]
    axes.set_xticks([*(n - 1 for n in apart), layers], [*apart, letter])
    axes.set(title=reuse.block, xlabel=f"target layer ({letter}: {last})")
    axes.add_patch(
        Rectangle(
            (layers - 0.5, -0.5), 1, layers + 1, fill=False, clip_on=False
        )
    )
    return image
