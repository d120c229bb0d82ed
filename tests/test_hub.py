"""Names of published weights, from a hub on the loopback."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from densenet_jax import list_pretrained, load_pretrained, save_torch
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.models.variants import VARIANTS, create_model
from densenet_jax.runs.checkpoints import save_variables
from densenet_jax.runs.description import TASKS, Description
from densenet_jax.tools import convert, publish
from densenet_jax.weights import hub, pretrained
from densenet_jax.weights.load import load_weights
from tests.file_server import serving
from tests.random_variables import random_variables

MODEL = DenseNet(block_layers=(1, 2), growth_rate=4, num_classes=3)
VARIABLES = random_variables(MODEL)
CONFIG = {
    "architecture": "densenet121",
    "num_classes": 3,
    "label_names": ["ant", "bee", "cat"],
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    },
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_torch(VARIABLES, path)
    return path.read_bytes()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DENSENET_JAX_HOME", str(tmp_path / "cache"))
    with serving() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        yield state


def _assert_loaded(name):
    _, loaded = load_pretrained(name)
    jax.tree.map(np.testing.assert_array_equal, loaded, VARIABLES)


@pytest.mark.parametrize(
    "file_name", ["model.safetensors", "other.safetensors"]
)
def test_a_repository_is_loaded_and_then_read_offline(
    server, weights, monkeypatch, file_name
):
    server.repos["org/net"] = {"README.md": b"a net", file_name: weights}
    _assert_loaded("hf://org/net")

    with serving() as other:  # its port is closed below
        monkeypatch.setenv("HF_ENDPOINT", other.address)
    start = time.monotonic()
    _assert_loaded("hf://org/net")
    with pytest.raises(OSError, match=r"the hub is not reached.*by hand"):
        load_pretrained("hf://org/another")
    with pytest.raises(OSError, match="was not downloaded before"):
        load_pretrained("hf://org/net/another.safetensors")
    # huggingface_hub by itself tries for 24 seconds.
    assert time.monotonic() - start < 15


def test_the_hubs_own_switch_for_offline(server, weights, monkeypatch):
    server.repos["org/net"] = {"model.safetensors": weights}
    _assert_loaded("hf://org/net")
    server.requests.clear()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    _assert_loaded("hf://org/net")
    assert not server.requests


def test_a_repository_says_what_net_it_is(server, weights):
    server.repos["org/net"] = {
        "config.json": json.dumps(CONFIG).encode(),
        "pytorch_model.bin": b"not read where there is model.safetensors",
        "model.safetensors": weights,
    }

    description = load_weights("hf://org/net").description

    assert description == Description(
        preprocessing={
            "mean": (127.5,) * 3,
            "std": (63.75,) * 3,
            "image_size": 224,
            "resize_size": 256,
        },
        class_names=("ant", "bee", "cat"),
    )
    assert "/org/net/resolve/main/pytorch_model.bin" not in server.counts()


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf://org/net@v2/deep/a.safetensors", "v2/deep/a.safetensors"),
        ("hf:/org/net/deep/a.safetensors", "main/deep/a.safetensors"),
        ("hf://org/net@refs%2Fpr%2F1", "refs%2Fpr%2F1/model.safetensors"),
    ],
)
def test_revisions_and_files(server, weights, name, asked):
    server.repos["org/net"] = {
        "deep/a.safetensors": weights,
        "model.safetensors": weights,
    }

    _assert_loaded(name)

    assert server.requests[-1][1] == f"/org/net/resolve/{asked}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://org/none", "no such repository"),
        ("hf://org/two", r"expected one \(a.pth, b.pth\): give hf://ORG"),
        ("hf://org/two/c.pth", "no such file in it"),
        ("hf://or--g/..net", "org|Repo id"),
    ],
)
def test_what_is_wrong_with_a_repository_is_said_in_a_line(
    server, name, message
):
    server.repos["org/two"] = {"a.pth": b"", "b.pth": b"", "README.md": b""}

    with pytest.raises(OSError, match=message) as caught:
        load_pretrained(name)

    assert "\n" not in str(caught.value)


def test_weights_and_config_are_of_one_commit(server, weights):
    server.repos["org/net"] = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": weights,
    }
    server.commits["model.safetensors"] = "d" * 40

    with pytest.raises(OSError, match="changed meanwhile"):
        load_pretrained("hf://org/net")


def test_a_name_of_the_table(server, weights, monkeypatch):
    row = pretrained.PRETRAINED["torchvision/densenet121"]
    server.files["/models/net.pth"] = weights
    row = dataclasses.replace(row, address=f"{server.address}/models/net.pth")
    monkeypatch.setitem(pretrained.PRETRAINED, row.name, row)

    loaded = load_weights(row.name)

    jax.tree.map(np.testing.assert_array_equal, loaded.variables, VARIABLES)
    assert loaded.description.preprocessing["image_size"] == 224
    assert loaded.description.preprocessing["resize_size"] == 256
    assert loaded.description.task == "classification"


def test_commands_take_names(server, weights, tmp_path):
    server.repos["org/net"] = {"model.safetensors": weights}

    assert convert.main(["hf://org/net", str(tmp_path / "a.safetensors")]) == 0

    assert (tmp_path / "a.safetensors").read_bytes() == weights


def test_an_address(server, weights):
    server.files["/a/net.pth"] = weights

    _assert_loaded(f"{server.address}/a/net.pth")
    # As pathlib.Path writes it.
    _assert_loaded(f"{server.address}/a/net.pth".replace("//", "/"))


def test_a_path_that_exists_wins(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "densenet121").write_bytes(weights)

    _assert_loaded("torchvision/densenet121")
    _assert_loaded("~/torchvision/densenet121")


@pytest.mark.parametrize("name", ["net.pth", "models/net.pth", "/none/a.pth"])
def test_other_names_stay_paths(name):
    assert hub.resolve(name)[0].as_posix() == name


def test_a_mistyped_name_is_corrected():
    with pytest.raises(FileNotFoundError, match="mean torchvision/densenet121"):
        load_pretrained("torchvision/densnet121")


def test_a_net_is_published(server, weights, tmp_path, capsys):
    (tmp_path / "net.safetensors").write_bytes(weights)
    directory = tmp_path / "published"

    arguments = [str(tmp_path / "net.safetensors"), str(directory)]
    status = publish.main([*arguments, "--push=org/net"])

    output = capsys.readouterr()
    assert status == 0, output.err
    assert f"Uploaded to {server.address}/org/net" in output.out
    assert "no preprocessing" in output.out
    assert server.uploads == {
        path.name: path.read_bytes() for path in directory.iterdir()
    }
    server.repos["org/net"] = server.uploads
    _assert_loaded("hf://org/net")


def test_a_run_is_published_with_what_it_says(tmp_path):
    attributes = dict(block_layers=(1, 2), growth_rate=4, num_classes=3)
    preprocessing = dict(
        mean=[125.0, 123.0, 114.0],
        std=[63.0, 62.0, 66.0],
        image_size=24,
        resize_size=27,
    )
    save_variables(
        tmp_path / "run",
        VARIABLES,
        {
            "model": attributes | {"activation": "silu"},
            "preprocessing": preprocessing,
            "class_names": ["ant", "bee", "cat"],
            "task": "multilabel",
        },
    )

    directory = tmp_path / "published"
    assert publish.main([str(tmp_path / "run"), str(directory)]) == 0

    loaded = load_weights(directory)
    assert loaded.model == MODEL.clone(activation="silu")
    description = loaded.description
    assert {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in description.preprocessing.items()
    } == preprocessing
    assert description.class_names == ("ant", "bee", "cat")
    assert description.task == "multilabel"
    config = json.loads((directory / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 24, 24]
    assert config["label_names"] == ["ant", "bee", "cat"]


def test_an_upload_that_fails_is_said_in_a_line(
    weights, server, tmp_path, monkeypatch, capsys
):
    (tmp_path / "net.safetensors").write_bytes(weights)
    with serving() as other:
        monkeypatch.setenv("HF_ENDPOINT", other.address)
    monkeypatch.setenv("HF_TOKEN", "none")

    arguments = [str(tmp_path / "net.safetensors"), str(tmp_path / "published")]
    assert publish.main([*arguments, "--push=org/net"]) == 1

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match("Cannot upload to org/net: .*refused", error)


def test_the_table():
    for weights in list_pretrained():
        net = re.search(r"densenet\w*\d+d?", weights.name)[0]
        overrides = {"num_classes": 18} if weights.class_names else {}
        if net in VARIANTS:
            shapes = tensor_shapes(
                create_model(net, **overrides), len(weights.mean)
            )
            count = sum(
                int(np.prod(shape))
                for path, shape in shapes.items()
                if not path.endswith(("/mean", "/var"))
            )
            assert weights.num_parameters == count, weights.name
        assert weights.task in TASKS
        assert weights.image_size <= weights.resize_size
        assert weights.description.preprocessing["mean"] == weights.mean


def test_the_table_is_torchvisions():
    models = pytest.importorskip("torchvision").models
    rows = [w for w in list_pretrained() if w.name.startswith("torchvision/")]
    assert len(rows) == 4
    for row in rows:
        theirs = models.get_model_weights(row.name.rpartition("/")[2]).DEFAULT
        transforms = theirs.transforms()
        assert row.address == theirs.url
        assert row.num_parameters == theirs.meta["num_params"]
        metrics = theirs.meta["_metrics"]["ImageNet-1K"]
        assert row.accuracy == metrics["acc@1"]
        assert row.image_size == transforms.crop_size[0]
        assert row.resize_size == transforms.resize_size[0]
        np.testing.assert_allclose(row.mean, 255 * np.array(transforms.mean))
        np.testing.assert_allclose(row.std, 255 * np.array(transforms.std))
        megabytes = theirs.meta["_file_size"]
        assert round(row.file_size / 2**20, 3) == pytest.approx(megabytes, 1e-4)


def test_the_table_is_timms():
    timm = pytest.importorskip("timm")
    published = {
        f"timm/{name}"
        for name in timm.list_models("densenet*", pretrained=True)
    }
    rows = {w.name: w for w in list_pretrained() if w.name[:5] == "timm/"}
    assert rows.keys() == published
    for name, row in rows.items():
        cfg = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        assert row.address == f"hf://{cfg.hf_hub_id}"
        size = (cfg.test_input_size or cfg.input_size)[1]
        crop = cfg.test_crop_pct or cfg.crop_pct
        assert (row.image_size, row.resize_size) == (size, int(size / crop))
        assert row.licence == cfg.license
        np.testing.assert_allclose(row.mean, 255 * np.array(cfg.mean))
        np.testing.assert_allclose(row.std, 255 * np.array(cfg.std))


def test_the_table_is_torchxrayvisions():
    models = pytest.importorskip("torchxrayvision").models
    prefix = "torchxrayvision/"
    rows = {
        w.name.removeprefix(prefix): w
        for w in list_pretrained()
        if w.name.startswith(prefix)
    }
    theirs = {k: v for k, v in models.model_urls.items() if "densenet" in k}
    assert rows.keys() == theirs.keys()
    for name, row in rows.items():
        assert row.address == theirs[name]["weights_url"]
        assert list(row.class_names) == theirs[name]["labels"]
        pixels = np.array([0.0, 100.0, 255.0])
        np.testing.assert_allclose(
            (pixels - row.mean[0]) / row.std[0],
            models.utils.normalize(pixels, 255),
            rtol=1e-6,
        )


def test_the_environment_names_the_hub(server, weights, tmp_path):
    server.repos["org/net"] = {"model.safetensors": weights}
    code = "from densenet_jax.weights import hub; hub.resolve('hf://org/net')"
    environment = os.environ | {
        "HF_ENDPOINT": server.address,
        "HF_HUB_CACHE": str(tmp_path),
    }

    subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    assert (tmp_path / "models--org--net").is_dir()
