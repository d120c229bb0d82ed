"""Feature reuse against planted weights, averaged one number at a time."""

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from densenet_jax import save_torch
from densenet_jax.analysis.feature_reuse import BlockReuse, feature_reuse, plot
from densenet_jax.models.densenet import DenseNet
from densenet_jax.tools import feature_reuse as tool
from tests.random_variables import random_variables

GOLDEN = Path(__file__).parent / "data" / "weights"


def _net(bottleneck_width, compression=0.5):
    model = DenseNet(
        block_layers=(2, 3),
        growth_rate=4,
        bottleneck_width=bottleneck_width,
        compression=compression,
        stem="cifar",
        stem_norm=False,
        stem_features=6,
        num_classes=3,
    )
    return model, random_variables(model)


def _plant(kernel, channels, rng):
    """Gives every source's weights one size and random signs."""
    sizes = rng.uniform(1, 2, len(channels))
    first = 0
    for size, count in zip(sizes, channels):
        part = kernel[..., first : first + count, :]
        part[...] = size * rng.choice([-1, 1], part.shape)
        first += count
    assert first == kernel.shape[-2]
    return sizes


@pytest.mark.parametrize(
    ("bottleneck_width", "compression", "between"),
    [(0, 1.0, 14), (2, 0.5, 7)],
)
def test_planted_weights_are_found(bottleneck_width, compression, between):
    model, variables = _net(bottleneck_width, compression)
    params = variables["params"]
    rng = np.random.default_rng(0)
    channels = {
        ("denseblock1", "denselayer1", "conv1"): [6],
        ("denseblock1", "denselayer2", "conv1"): [6, 4],
        ("transition1", "conv"): [6, 4, 4],
        ("denseblock2", "denselayer1", "conv1"): [between],
        ("denseblock2", "denselayer2", "conv1"): [between, 4],
        ("denseblock2", "denselayer3", "conv1"): [between, 4, 4],
        ("classifier",): [between, 4, 4, 4],
    }
    planted = []
    for path, counts in channels.items():
        module = params
        for name in path:
            module = module[name]
        planted.append(_plant(module["kernel"], counts, rng))

    first, second = feature_reuse(model, variables)

    assert (first.block, second.block) == ("denseblock1", "denseblock2")
    assert first.sources == ["input", "denselayer1", "denselayer2"]
    assert first.targets == ["denselayer1", "denselayer2", "transition1"]
    assert second.targets[-2:] == ["denselayer3", "classifier"]
    columns = [*first.weights.T, *second.weights.T]
    for column, sizes in zip(columns, planted, strict=True):
        np.testing.assert_allclose(column[: len(sizes)], sizes, rtol=1e-6)
        assert np.isnan(column[len(sizes) :]).all()


def test_random_weights_are_averaged():
    model, variables = _net(bottleneck_width=0)
    kernel = variables["params"]["denseblock2"]["denselayer3"]["conv1"][
        "kernel"
    ]
    kernel *= np.random.default_rng(1).choice([-1, 1], kernel.shape)
    totals, counts = [0.0, 0.0, 0.0], [0, 0, 0]
    for row in range(3):
        for column in range(3):
            for channel in range(7 + 4 + 4):
                for output in range(4):
                    source = 0 if channel < 7 else 1 if channel < 11 else 2
                    weight = kernel[row, column, channel, output]
                    totals[source] += abs(float(weight))
                    counts[source] += 1

    found = feature_reuse(model, variables)[1].weights[:3, 2]

    np.testing.assert_allclose(found, np.divide(totals, counts), rtol=1e-12)


def test_only_kernels_of_the_readers_count():
    model, variables = _net(bottleneck_width=2)
    before = feature_reuse(model, variables)
    layer = variables["params"]["denseblock1"]["denselayer2"]
    layer["norm1"]["scale"] *= 10
    layer["conv2"]["kernel"] *= 10

    after = feature_reuse(model, variables)
    assert len(before) == 2
    for reuse, same in zip(after, before, strict=True):
        np.testing.assert_array_equal(reuse.weights, same.weights)


def test_each_target_is_drawn_in_parts_of_its_own_largest(
    tmp_path, monkeypatch
):
    weights = np.array([[4.0, 0.5], [np.nan, 0.2]])
    block = BlockReuse(
        "denseblock1",
        ["input", "denselayer1"],
        ["denselayer1", "classifier"],
        weights,
    )
    drawn = []

    def record(axes, image, **kwargs):
        drawn.append(np.array(image))
        return imshow(axes, image, **kwargs)

    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", record)
    plot([block], tmp_path / "reuse.png", "a net")

    np.testing.assert_array_equal(drawn, [[[1.0, 1.0], [np.nan, 0.4]]])


def test_refuses_weights_of_another_net_and_broken_ones():
    model, variables = _net(bottleneck_width=2)
    with pytest.raises(
        ValueError, match="denseblock1/denselayer2/conv1 reads 10 channels"
    ):
        feature_reuse(model.clone(growth_rate=8), variables)
    variables["params"]["classifier"]["kernel"][0, 0] = np.nan
    with pytest.raises(ValueError, match="kernel of classifier is not finite"):
        feature_reuse(model, variables)


@pytest.mark.parametrize("block_layers", [(2, 1), (1, 2, 9, 1)])
def test_command(block_layers, tmp_path, capsys):
    model = DenseNet(
        block_layers=block_layers, growth_rate=4, stem="cifar", stem_norm=False
    )
    variables = random_variables(model)
    # A layer whose weights are all 0 has no largest to divide by.
    variables["params"]["denseblock1"]["denselayer1"]["conv1"]["kernel"] *= 0
    weights = tmp_path / "net.safetensors"
    save_torch(variables, weights)
    output = tmp_path / "new" / "pictures"

    assert tool.main([str(weights), f"--output={output}"]) == 0

    picture, numbers = (
        output / "feature_reuse.png",
        output / "feature_reuse.csv",
    )
    assert f"Wrote {picture} and {numbers}" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert image.format == "PNG"
    with numbers.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum((n + 1) * (n + 2) // 2 for n in block_layers)
    expected = feature_reuse(model, variables)[-1]
    last = rows[-1]
    assert last["block"] == f"denseblock{len(block_layers)}"
    assert last["source"] == f"denselayer{block_layers[-1]}"
    assert last["target"] == "classifier"
    assert float(last["mean_absolute_weight"]) == pytest.approx(
        expected.weights[-1, -1], rel=1e-5
    )


def test_command_refuses(tmp_path, capsys):
    assert tool.main([str(tmp_path / "absent.pth")]) == 1
    assert "absent.pth" in capsys.readouterr().err
    assert tool.main([str(tmp_path)]) == 1
    assert "no checkpoints/" in capsys.readouterr().err
    occupied = tmp_path / "file"
    occupied.touch()
    weights = GOLDEN / "cifar.pth"
    assert tool.main([str(weights), f"--output={occupied}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
