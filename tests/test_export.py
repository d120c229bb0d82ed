"""Nets of this project's own choices, to files and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax import (
    fold_norms,
    load_pretrained,
    save_pretrained,
    save_torch,
)
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.runs.checkpoints import save_variables
from densenet_jax.runs.description import Description
from densenet_jax.tools import convert
from densenet_jax.weights.architecture import infer_architecture
from densenet_jax.weights.export import to_torch
from densenet_jax.weights.load import load_weights
from tests.random_variables import random_variables

NET = dict(block_layers=(2, 3), stem="cifar", stem_norm=False, num_classes=3)


@pytest.mark.parametrize("bottleneck_width", [0, 4])
@pytest.mark.parametrize("growth_rate", [4, (4, 8), (8, 4, 6, 6, 2), (6, 6)])
def test_growth_rates_are_read_off_the_tensors(
    tmp_path, growth_rate, bottleneck_width
):
    model = DenseNet(
        **NET, growth_rate=growth_rate, bottleneck_width=bottleneck_width
    )
    variables = random_variables(model)
    save_torch(variables, tmp_path / "net.safetensors")

    found, loaded = load_pretrained(tmp_path / "net.safetensors")

    # Rates that agree are one number.
    expected = 6 if growth_rate == (6, 6) else growth_rate
    assert found.growth_rate == expected
    assert found.bottleneck_width == bottleneck_width
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.parametrize("growth_rate", [4, (4, 8)])
def test_one_wrong_shape_is_not_another_growth_rate(growth_rate):
    model = DenseNet(**NET, growth_rate=growth_rate)
    shapes = tensor_shapes(model, 3)
    path = "denseblock2/denselayer2/conv2/kernel"
    shapes[path] = (*shapes[path][:3], 7)

    # The commonest number: the error then lists what differs from that net.
    assert infer_architecture(shapes)["growth_rate"] == 4


@pytest.mark.parametrize(
    "options", [dict(norm="group"), dict(squeeze_excite=2)], ids=str
)
def test_nets_that_torchvision_has_no_names_for(tmp_path, options):
    variables = random_variables(DenseNet(**NET, growth_rate=4, **options))
    variables.setdefault("batch_stats", {})

    with pytest.raises(ValueError, match="no names"):
        save_torch(variables, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        dict(growth_rate=(4, 8), activation="silu", norm_epsilon=1e-3),
        dict(growth_rate=(4, 8, 4, 6, 2), norm="group", norm_groups=2),
        dict(growth_rate=4, squeeze_excite=2, dropout_rate=0.1),
    ],
    ids=str,
)
def test_a_runs_config_says_what_tensors_do_not(tmp_path, options):
    model = DenseNet(**NET, **options)
    variables = random_variables(model)
    section = {**NET, **options, "name": "densenet_bc_100_12"}
    section |= {"dtype": "float32", "remat": "convs", "kernel_init": None}
    save_variables(tmp_path / "run", variables, {"model": section})

    found, loaded = load_pretrained(tmp_path / "run")

    for name, value in {**NET, **options}.items():
        assert getattr(found, name) == value
    images = jnp.ones((2, 8, 8, 3))
    np.testing.assert_array_equal(
        jax.jit(found.apply)(loaded, images),
        jax.jit(model.apply)(variables, images),
    )


DESCRIPTION = Description(
    preprocessing={
        "mean": (124.0, 116.5, 104.25),
        "std": (58.5, 57.0, 57.5),
        "image_size": 40,
        "resize_size": 46,
    },
    class_names=("ant", "bee", "côté"),
    task="multilabel",
)


@pytest.mark.parametrize(
    "options",
    [
        dict(growth_rate=(4, 8), activation="silu", norm_epsilon=1e-3),
        dict(growth_rate=(4, 8, 4, 6, 2), norm="group", norm_groups=2),
        dict(growth_rate=4, squeeze_excite=2, compression=0.7),
        dict(growth_rate=4, bottleneck_width=0, stem_features=5),
    ],
    ids=str,
)
def test_a_directory_keeps_all_of_a_net(tmp_path, options):
    model = DenseNet(**NET, **options)
    variables = random_variables(model, in_channels=1)
    variables.setdefault("batch_stats", {})
    description = dataclasses.replace(
        DESCRIPTION,
        preprocessing={"mean": (127.5,), "std": (127.5 / 1024,)},
    )
    save_pretrained(model, variables, tmp_path / "net", description=description)

    loaded = load_weights(tmp_path / "net")

    assert loaded.model == model
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    assert loaded.description == description


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = DenseNet(**NET, growth_rate=4)
    variables = random_variables(model)

    save_torch(variables, "~/net.safetensors")
    save_pretrained(model, variables, "~/net")

    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "net",
        "net.safetensors",
    ]


def test_a_directory_needs_no_description(tmp_path):
    model = DenseNet(**NET, growth_rate=4)
    save_pretrained(model, random_variables(model), tmp_path / "net")

    assert load_weights(tmp_path / "net").description == Description()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(class_names=("a", "b")), "names 2 classes, the model has 3"),
        (dict(preprocessing={"mean": (1.0, 2.0)}), "mean has 2 values"),
    ],
    ids=str,
)
def test_a_description_of_another_net_is_refused(tmp_path, changes, message):
    model = DenseNet(**NET, growth_rate=4)
    description = dataclasses.replace(DESCRIPTION, **changes)

    with pytest.raises(ValueError, match=message):
        save_pretrained(
            model,
            random_variables(model),
            tmp_path / "net",
            description=description,
        )
    assert not list(tmp_path.iterdir())


def test_variables_of_another_net_are_refused(tmp_path):
    model = DenseNet(**NET, growth_rate=4)
    variables = random_variables(model)

    with pytest.raises(ValueError, match="of another model"):
        save_pretrained(
            model.clone(compression=1.0), variables, tmp_path / "net"
        )
    with pytest.raises(ValueError, match="norms are folded"):
        save_pretrained(*fold_norms(model, variables), tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_holds_something_is_left_alone(tmp_path):
    model = DenseNet(**NET, growth_rate=4)
    (tmp_path / "net").mkdir()
    save_pretrained(model, random_variables(model), tmp_path / "net")
    before = (tmp_path / "net" / "config.json").read_bytes()

    with pytest.raises(ValueError, match="net exists"):
        save_pretrained(
            model.clone(activation="silu"),
            random_variables(model),
            tmp_path / "net",
        )
    assert (tmp_path / "net" / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["net.h5", "net", "net.pth.tar", "net.onnx"])
def test_only_what_the_name_says_is_written(tmp_path, name):
    variables = random_variables(DenseNet(**NET, growth_rate=4))

    with pytest.raises(ValueError, match=r"ends in .*give \.safetensors"):
        save_torch(variables, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["net.pth", "net.pt", "net.bin", "NET.PTH"])
def test_files_of_pytorch(tmp_path, name):
    variables = random_variables(DenseNet(**NET, growth_rate=4))
    try:
        import torch
    except ImportError:
        with pytest.raises(ValueError, match=r"give a \.safetensors name"):
            save_torch(variables, tmp_path / name)
        assert not list(tmp_path.iterdir())
        return

    save_torch(variables, tmp_path / name)

    found = torch.load(tmp_path / name, weights_only=True)
    expected = to_torch(variables)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[key])


def test_an_activation_is_not_lost_in_a_file(tmp_path, capsys):
    model = DenseNet(**NET, growth_rate=4, activation="silu")
    section = {**NET, "growth_rate": 4, "activation": "silu"}
    save_variables(
        tmp_path / "run", random_variables(model), {"model": section}
    )

    target = tmp_path / "net.safetensors"
    assert convert.main([str(tmp_path / "run"), str(target)]) == 1

    assert "activation='silu'" in capsys.readouterr().err
    assert not target.exists()
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "copy")]) == 0
    assert load_pretrained(tmp_path / "copy")[0].activation == "silu"
