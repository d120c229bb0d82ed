"""The table of layers against published counts, shapes and operations."""

import json

import jax
import jax.numpy as jnp
import pytest

from densenet_jax import create_model, list_models
from densenet_jax.analysis import summary
from densenet_jax.models.densenet import DenseNet
from densenet_jax.runs import directory
from densenet_jax.tools import summarize
from tests.random_variables import random_variables
from tests.test_variants import CIFAR, IMAGENET

# From torchvision's pages on its models, in 1e9.
TORCHVISION_MULTIPLY_ADDS = {
    "densenet121": 2.834,
    "densenet161": 7.728,
    "densenet169": 3.36,
    "densenet201": 4.291,
}


@pytest.fixture(scope="module")
def rows_121():
    return summary.layers(create_model("densenet121"))


@pytest.mark.parametrize("name", list_models())
def test_rows_add_up_to_the_published_counts(name):
    published = IMAGENET[name] if name in IMAGENET else CIFAR[name]
    size = 224 if name in IMAGENET else 32

    rows = summary.layers(create_model(name), (size, size, 3))

    assert sum(row.parameters for row in rows) == published[0]
    if name in TORCHVISION_MULTIPLY_ADDS:
        total = sum(row.multiply_adds for row in rows)
        assert round(total / 1e9, 3) == TORCHVISION_MULTIPLY_ADDS[name]
    for merged in (summary.stages(rows), summary.stages(summary.stages(rows))):
        assert sum(row.parameters for row in merged) == published[0]
        assert sum(row.multiply_adds for row in merged) == sum(
            row.multiply_adds for row in rows
        )


def test_stages_of_densenet121_are_those_of_the_papers_table_1(rows_121):
    stages = summary.stages(rows_121)

    assert [(row.stage, row.operation, row.shape) for row in stages] == [
        ("stem", "7x7/2 conv 64, 3x3/2 max pool", (56, 56, 64)),
        ("denseblock1", "6 x (1x1 conv 128, 3x3 conv 32)", (56, 56, 256)),
        ("transition1", "1x1 conv 128, 2x2/2 average pool", (28, 28, 128)),
        ("denseblock2", "12 x (1x1 conv 128, 3x3 conv 32)", (28, 28, 512)),
        ("transition2", "1x1 conv 256, 2x2/2 average pool", (14, 14, 256)),
        ("denseblock3", "24 x (1x1 conv 128, 3x3 conv 32)", (14, 14, 1024)),
        ("transition3", "1x1 conv 512, 2x2/2 average pool", (7, 7, 512)),
        ("denseblock4", "16 x (1x1 conv 128, 3x3 conv 32)", (7, 7, 1024)),
        ("head", "global average pool, linear 1000", (1000,)),
    ]


def test_layers_of_densenet121(rows_121):
    by_layer = {row.layer: row for row in rows_121}

    assert [row.layer for row in rows_121[:4]] == [
        "conv0",
        "norm0",
        "pool0",
        "denseblock1/denselayer1",
    ]
    assert by_layer["conv0"].shape == (112, 112, 64)
    assert by_layer["conv0"].parameters == 7 * 7 * 3 * 64
    # The first dense layer: 45,056 weights, and scale and bias of two norms.
    first = by_layer["denseblock1/denselayer1"]
    assert first.operation == "1x1 conv 128, 3x3 conv 32"
    assert first.shape == (56, 56, 96)
    assert first.parameters == 45_056 + 2 * (64 + 128)
    assert first.multiply_adds == 45_056 * 56 * 56
    assert [(row.operation, row.shape) for row in rows_121[-3:]] == [
        ("norm-ReLU", (7, 7, 1024)),
        ("global average pool", (1024,)),
        ("linear 1000", (1000,)),
    ]


@pytest.mark.parametrize("remat", ["convs", "layer"])
def test_remat_makes_no_difference(remat):
    kept, recomputed = (
        create_model("densenet121", block_layers=(2, 2), remat=policy)
        for policy in ("none", remat)
    )

    assert summary.layers(recomputed) == summary.layers(kept)


def test_other_stems_and_pools():
    options = dict(stem="deep", blur_pool="all")
    model = DenseNet((1, 1), growth_rate=8, **options)
    rows = summary.layers(model, (64, 63, 3))

    found = [
        (row.layer, row.operation, row.shape)
        for row in rows
        if row.stage in ("stem", "transition1")
    ]
    assert found == [
        ("conv0", "3x3/2 conv 8", (32, 32, 8)),
        ("norm0", "norm-ReLU", (32, 32, 8)),
        ("conv1", "3x3 conv 8", (32, 32, 8)),
        ("norm1", "norm-ReLU", (32, 32, 8)),
        ("conv2", "3x3 conv 16", (32, 32, 16)),
        ("norm2", "norm-ReLU", (32, 32, 16)),
        ("pool0", "3x3 max pool", (32, 32, 16)),
        ("blur0", "3x3/2 blur pool", (16, 16, 16)),
        ("transition1/norm", "norm-ReLU", (16, 16, 24)),
        ("transition1/conv", "1x1 conv 12", (16, 16, 12)),
        ("transition1/pool", "3x3/2 blur pool", (8, 8, 12)),
    ]


def test_channels_and_size_of_the_images():
    model = create_model("densenet_bc_100_12", block_layers=(2, 2))

    rows = summary.layers(model, (8, 12, 1))

    assert rows[0].shape == (8, 12, 24)
    assert rows[0].parameters == 3 * 3 * 1 * 24


def test_formats_show_the_same_rows(rows_121):
    stages = summary.stages(rows_121)
    text = summary.format_table(stages, "text").splitlines()
    markdown = summary.format_table(stages, "markdown").splitlines()
    loaded = json.loads(summary.format_table(stages, "json"))

    assert len({len(line) for line in text}) == 1
    assert len(text[0]) <= 100
    assert text[2].split("  ")[0] == "stem"
    assert text[-1].split() == ["total", "7,978,856", "2,834,161,664"]
    assert {line.count("|") for line in markdown} == {7}
    assert markdown[-1].endswith("| 7,978,856 | 2,834,161,664 |")
    assert loaded["totals"] == {
        "parameters": 7_978_856,
        "multiply_adds": 2_834_161_664,
    }
    assert loaded["rows"][1] == {
        "stage": "denseblock1",
        "layer": "denseblock1",
        "operation": "6 x (1x1 conv 128, 3x3 conv 32)",
        "shape": [56, 56, 256],
        "parameters": 335_040,
        "multiply_adds": 1_040_449_536,
    }
    with pytest.raises(ValueError, match="Did you mean text"):
        summary.format_table(stages, "txt")


def _small(**overrides):
    return create_model(
        "densenet_bc_100_12", block_layers=(2, 2), growth_rate=4, **overrides
    )


def test_activation_bytes_are_near_what_xla_takes():
    """XLA recomputes cheap things, so takes less, but not by half."""
    model = _small()
    shape = (16, 16, 3)
    variables = random_variables(model)

    def loss(params, images):
        logits, _ = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return logits.sum()

    def taken(batch_size):
        images = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
        step = jax.jit(jax.grad(loss)).lower(variables["params"], images)
        return step.compile().memory_analysis().temp_size_in_bytes

    per_image = (taken(96) - taken(32)) / 64

    counted = summary.activation_bytes(model, shape)
    assert 0.5 * counted < per_image < 1.5 * counted


def test_activation_bytes_grow_with_the_image_and_shrink_with_remat():
    none, convs, layer = (
        summary.activation_bytes(_small(remat=policy), (16, 16, 3))
        for policy in ("none", "convs", "layer")
    )
    # The logits, 10 values, do not grow.
    larger = summary.activation_bytes(_small(), (32, 32, 3))
    dropout = summary.activation_bytes(_small(dropout_rate=0.2), (16, 16, 3))
    bfloat16 = summary.activation_bytes(_small(dtype=jnp.bfloat16), (16, 16, 3))

    assert layer < convs < none / 2
    assert larger == pytest.approx(4 * none, rel=1e-3)
    assert bfloat16 < none < dropout


def test_command_compares(capsys):
    def small(name):
        return create_model(name, block_layers=(1, 1))

    names = ["densenet_40_12", "densenet_bc_100_12"]
    options = ["--image_size=8", "--channels=1", "--model.block_layers=(1,1)"]
    assert summarize.main([*names, *options, "--format=json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert summarize.main([*names, *options]) == 0
    text = capsys.readouterr().out.splitlines()
    assert summarize.main([*names, *options, "--format=markdown"]) == 0
    markdown = capsys.readouterr().out.splitlines()

    assert [entry["name"] for entry in loaded] == names
    for entry, line, row in zip(loaded, text[-2:], markdown[2:], strict=True):
        rows = summary.layers(small(entry["name"]), (8, 8, 1))
        parameters = sum(row.parameters for row in rows)
        multiply_adds = sum(row.multiply_adds for row in rows)
        assert entry["image_shape"] == [8, 8, 1]
        assert entry["parameters"] == parameters
        assert entry["multiply_adds"] == multiply_adds
        cells = [
            entry["name"],
            "8x8x1",
            f"{parameters:,}",
            f"{multiply_adds:,}",
            f"{entry['activation_bytes'] / 2**20:.1f}",
            "MiB",
        ]
        assert line.split() == cells
        assert row.replace("|", "").split() == cells
    assert len({len(line) for line in text[-4:]}) == 1
    assert {line.count("|") for line in markdown} == {6}


def test_command_prints_the_table(capsys):
    status = summarize.main(["densenet_bc_100_12", "--format=json"])

    assert status == 0
    loaded = json.loads(capsys.readouterr().out)
    assert loaded["rows"][0]["shape"] == [32, 32, 24]
    assert loaded["totals"]["parameters"] == 769_162


def test_command_takes_size_and_channels(capsys):
    status = summarize.main(
        ["densenet_40_12", "--image_size=8", "--channels=1"]
    )

    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "densenet_40_12, one image of 8x8x1."
    assert lines[-1].startswith("total")
    assert max(len(line) for line in lines) <= 100


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["densenet12"],
            "Unknown model 'densenet12'. Did you mean densenet121",
        ),
        (["densenet121", "densenet12"], "Unknown model 'densenet12'."),
        (["densenet121", "--image_size=28"], "height and width of 29 or more"),
        (["densenet121", "--image_size=-1"], "height and width of 29 or more"),
        (["densenet121", "--model.growth"], "is not --model.KEY=VALUE"),
        (["densenet121", "--model.grwth_rate=4"], "Did you mean growth_rate"),
        (["densenet121", "--model.activation=rellu"], "Did you mean relu"),
        (["densenet121", "--model.growth_rate=(4,8)"], "4 (one a block)"),
        (["densenet121", "--config.epochs=1"], "give --config too"),
        (["--config=configs/digits.py", "--model.norm=group"], "changes names"),
        (["--config=configs/digits.py", "--config.x=1"], "has no key"),
        ([], "No network"),
    ],
)
def test_command_answers_mistakes_with_one_line(argv, message, capsys):
    assert summarize.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_command_takes_a_recipe_with_overrides(capsys):
    argv = ["--config=configs/digits.py", "--config.model.growth_rate=(4,8,12)"]
    assert summarize.main([*argv, "--format=json"]) == 0
    loaded = json.loads(capsys.readouterr().out)

    model = create_model(
        "densenet_bc_100_12", block_layers=(4, 4, 4), growth_rate=(4, 8, 12)
    )
    # The images and the classes of the data set.
    rows = summary.layers(model, (8, 8, 1))
    assert loaded["rows"][0]["shape"] == [8, 8, 8]
    assert loaded["totals"]["parameters"] == sum(r.parameters for r in rows)
    assert loaded["totals"]["multiply_adds"] == sum(
        r.multiply_adds for r in rows
    )


def test_command_takes_runs(tmp_path, capsys):
    section = {"name": "densenet_bc_100_12", "block_layers": [2, 2]}
    section |= {"growth_rate": [4, 8], "norm": "group", "num_classes": None}
    model = create_model(
        "densenet_bc_100_12",
        block_layers=(2, 2),
        growth_rate=(4, 8),
        norm="group",
        num_classes=7,
    )
    rows = summary.layers(model, (8, 12, 1))
    network = json.loads(summary.format_table(summary.stages(rows), "json"))
    network["image_shape"] = (8, 12, 1)
    directory.write_description(tmp_path, {"model": section}, network)

    assert summarize.main([str(tmp_path), "--format=json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert loaded["totals"] == network["totals"]
    assert summarize.main([str(tmp_path), "densenet_40_12"]) == 0
    assert str(tmp_path) in capsys.readouterr().out
    del network["image_shape"]
    directory.write_description(tmp_path, {"model": section}, network)
    assert summarize.main([str(tmp_path)]) == 1
    assert "start its command again" in capsys.readouterr().err
