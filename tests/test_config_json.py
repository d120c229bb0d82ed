"""config.json as timm reads and writes it."""

import json
import math

import jax
import numpy as np
import pytest

from densenet_jax import create_model, save_pretrained
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.layers import ACTIVATIONS
from densenet_jax.runs.description import Description
from densenet_jax.weights import config_json
from densenet_jax.weights.load import load_weights
from tests.random_variables import random_variables

TINY = dict(block_layers=(1, 2), growth_rate=4, num_classes=3)
CFG = {
    "input_size": [3, 224, 224],
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": [0.5, 0.25, 0.125],
    "std": [0.25, 0.5, 1.0],
}


def _read(tmp_path, config):
    path = tmp_path / "config.json"
    text = config if isinstance(config, str) else json.dumps(config)
    path.write_text(text)
    return config_json.read(path)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (224, 256)),
        # What timm published its nets with: larger than they were trained.
        (dict(test_input_size=[3, 288, 288], test_crop_pct=0.95), (288, 303)),
        (dict(test_input_size=[3, 288, 288]), (288, 329)),
        (dict(crop_pct=None), (224, 256)),
        (dict(crop_pct=1.0), (224, 224)),
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [True, False])
def test_timms_preprocessing(tmp_path, changes, sizes, nested):
    cfg = CFG | changes
    config = {"architecture": "densenet121"}
    config |= {"pretrained_cfg": cfg} if nested else cfg

    stated = _read(tmp_path, config)

    assert stated.description.preprocessing == {
        "mean": (127.5, 63.75, 31.875),
        "std": (63.75, 127.5, 255.0),
        "image_size": sizes[0],
        "resize_size": sizes[1],
    }
    assert stated.remarks == ()


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        (dict(crop_mode="squash"), "squash"),
        (dict(input_size=[3, 224, 192]), "224 x 192"),
        (dict(crop_pct=1.2), "1.2"),
    ],
    ids=str,
)
def test_a_crop_that_is_not_ours_is_said(tmp_path, changes, remark):
    stated = _read(tmp_path, {"pretrained_cfg": CFG | changes})

    assert stated.description.preprocessing.keys() == {"mean", "std"}
    assert remark in stated.remarks[0]


def test_another_interpolation_is_said(tmp_path):
    config = {"pretrained_cfg": CFG | {"interpolation": "bicubic"}}

    assert "bicubic" in _read(tmp_path, config).remarks[0]


@pytest.mark.parametrize(
    "config",
    [
        {"label_names": ["a", "b"]},
        {"label_names": {"1": "b", "0": "a"}},
        {"pretrained_cfg": {"label_names": ["a", "b"]}},
        {"labels": ["a", "b"], "architecture": "densenet121"},
        {"id2label": {"1": "b", "0": "a"}, "label2id": {"a": 0, "b": 1}},
    ],
    ids=str,
)
def test_names_of_classes(tmp_path, config):
    description = _read(tmp_path, config).description

    assert description == Description(class_names=("a", "b"))


def test_names_with_gaps_are_said(tmp_path):
    stated = _read(tmp_path, {"id2label": {"0": "a", "2": "c"}})

    assert stated.description.class_names is None
    assert "leave numbers out" in stated.remarks[0]


def test_the_task(tmp_path):
    config = {"problem_type": "multi_label_classification"}

    assert _read(tmp_path, config).description.task == "multilabel"


@pytest.mark.parametrize(
    ("config", "attributes"),
    [
        ({}, {}),
        ({"architecture": "resnet50"}, {}),
        ({"architecture": "densenet121"}, ("relu", "none")),
        ({"architecture": "tv_densenet121"}, ("relu", "none")),
        ({"architecture": "densenetblur121d"}, ("relu", "stem")),
        (
            {
                "architecture": "densenetblur121d",
                "model_args": {"aa_stem_only": False, "act_layer": "silu"},
            },
            ("silu", "all"),
        ),
    ],
    ids=str,
)
def test_what_tensors_do_not_show(tmp_path, config, attributes):
    expected = dict(zip(("activation", "blur_pool"), attributes))

    assert _read(tmp_path, config).attributes == expected


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[1]",
        "{" * 100_000,
        '{"a":' * 100_000,
        {"pretrained_cfg": 3},
        {"pretrained_cfg": {"mean": "ab", "std": [1.0]}},
        {"pretrained_cfg": CFG | {"input_size": [3, 224]}},
        {"pretrained_cfg": CFG | {"crop_pct": "all"}},
        {"id2label": {"a": "b"}},
        {"architecture": "densenet121", "model_args": {"act_layer": "mish"}},
        {"densenet_jax": {}},
        {"densenet_jax": {"model": {"block_layers": "all"}}},
        {"densenet_jax": {"model": {"block_layers": [1], "depth": 3}}},
    ],
    ids=lambda config: str(config)[:30],
)
def test_a_damaged_file_is_refused_in_a_line(tmp_path, config):
    with pytest.raises(ValueError, match="is no description") as caught:
        _read(tmp_path, config)

    assert "\n" not in str(caught.value)


def test_every_pair_of_sizes_is_what_timm_computes(tmp_path):
    model = DenseNet(**TINY)
    for size in (32, 224, 288, 299):
        for resized in range(size, 2 * size):
            preprocessing = dict(
                mean=(1.0,), std=(1.0,), image_size=size, resize_size=resized
            )
            description = Description(preprocessing=preprocessing)
            config = config_json.write(model, 3, description)
            share = config["pretrained_cfg"]["crop_pct"]
            # timm.data.transforms_factory
            assert math.floor(size / share) == resized


@pytest.mark.parametrize(
    "options",
    [
        dict(stem="cifar"),
        dict(compression=0.7),
        dict(bottleneck_width=0),
        dict(growth_rate=(4, 8)),
        dict(stem_features=5),
        dict(stem_norm=False),
        dict(norm_epsilon=1e-3),
        dict(norm="group"),
        dict(squeeze_excite=2),
        dict(stem_pool=False),
        dict(stem_padding="same"),
        dict(stem="deep", stem_features=(3, 4, 8)),
    ],
    ids=str,
)
def test_what_timm_cannot_build_is_not_called_its_net(options):
    config = config_json.write(DenseNet(**TINY | options), 3, Description())

    assert config["architecture"] == "densenet_jax"


_NAMED = ("densenet121", "densenet161", "densenet169", "densenet201")


@pytest.mark.parametrize("name", [*_NAMED, "densenetblur121d", "densenet264d"])
def test_nets_that_timm_has_by_name(name):
    config = config_json.write(
        create_model(name, num_classes=5), 3, Description()
    )

    assert config["architecture"] == name
    assert "model_args" not in config
    assert config["num_classes"] == 5


def _centred(variables):
    """Kernels around 0, so that activations see both signs."""
    rng = np.random.default_rng(0)

    def centre(x):
        if x.ndim == 1:
            return x
        fan_in = np.prod(x.shape[:-1])
        return rng.normal(0, (2 / fan_in) ** 0.5, x.shape).astype(np.float32)

    return jax.tree.map(centre, variables)


@pytest.mark.parametrize(
    "options",
    [
        *({"activation": name} for name in ACTIVATIONS),
        dict(growth_rate=(4, 4), bottleneck_width=2),
        dict(in_channels=1),
        dict(stem="deep"),
        dict(stem="deep", blur_pool="stem"),
        dict(stem="deep", blur_pool="all"),
        dict(blur_pool="stem"),
        dict(blur_pool="all"),
    ],
    ids=str,
)
def test_timm_computes_the_same_logits(tmp_path, options):
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    options = dict(options)
    channels = options.pop("in_channels", 3)
    model = DenseNet(**TINY | options)
    variables = _centred(random_variables(model, channels))
    description = Description(
        preprocessing=dict(
            mean=(100.0,) * channels,
            std=(50.0,) * channels,
            image_size=64,
            resize_size=73,
        ),
        class_names=("a", "b", "c"),
    )
    save_pretrained(model, variables, tmp_path / "net", description=description)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, channels))
    images[1] *= 5  # so that the logits differ
    images = images.astype(np.float32)

    net = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)

    with torch.no_grad():
        inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        expected = net.eval()(inputs).numpy()
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(
        logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    assert np.abs(np.diff(expected, axis=0)).max() > 0.01 * abs(expected).max()
    assert list(net.pretrained_cfg["label_names"]) == ["a", "b", "c"]
    data = timm.data.resolve_model_data_config(net)
    np.testing.assert_allclose(data["mean"], [100 / 255] * channels)
    np.testing.assert_allclose(data["std"], [50 / 255] * channels)
    assert list(data["input_size"]) == [channels, 64, 64]
    assert math.floor(64 / data["crop_pct"]) == 73
    assert data["interpolation"] == "bilinear"


def test_a_directory_that_timm_wrote(tmp_path):
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = timm.create_model(
        "densenet121.ra_in1k",
        growth_rate=4,
        block_config=(1, 2),
        act_layer="silu",
        num_classes=3,
        in_chans=1,
    )
    timm.models.save_for_hf(net, tmp_path / "net", safe_serialization=True)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 1))
    images = images.astype(np.float32)
    with torch.no_grad():
        inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        expected = net.eval()(inputs).numpy()

    loaded = load_weights(tmp_path / "net")

    assert loaded.model.activation == "silu"
    logits = jax.jit(loaded.model.apply)(loaded.variables, images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)
    preprocessing = loaded.description.preprocessing
    assert preprocessing["image_size"] == 288
    assert preprocessing["resize_size"] == 303
