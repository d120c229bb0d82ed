"""Files written by installed frameworks, and their own logits.

Weights and statistics are random. Every test skips where the framework that
it compares with is not installed.
"""

import os
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from densenet_jax import create_model, load_pretrained, save_torch
from densenet_jax.weights.containers import open_tensors
from densenet_jax.weights.layouts import LAYOUTS
from tests.torch_writer import write

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
IMAGES = IMAGES.astype(np.float32)
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def torch():
    return _installed("torch")


def _installed(name):
    return pytest.importorskip(
        name, reason=f"{name}, which this compares with, is not installed"
    )


def _randomize(torch, net):
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def _torch_logits(torch, net, images=IMAGES):
    with torch.no_grad():
        return net(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()


def _assert_same_logits(path, expected, **arguments):
    model, variables = load_pretrained(path, **arguments)
    logits = jax.jit(model.apply)(variables, IMAGES)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    return model, variables


@pytest.mark.parametrize(
    "name",
    [
        "densenet121",
        pytest.param("densenet161", marks=SLOW),
        pytest.param("densenet169", marks=SLOW),
        pytest.param("densenet201", marks=SLOW),
    ],
)
def test_torchvision(torch, tmp_path, name):
    models = _installed("torchvision").models
    net = _randomize(torch, getattr(models, name)())
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    logits = _torch_logits(torch, net)
    model, variables = _assert_same_logits(path, logits)
    assert model == create_model(name)

    # The names in the published files.
    legacy = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", k): v
        for k, v in net.state_dict().items()
    }
    torch.save(legacy, path)
    model, again = load_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, variables, again)

    # And back.
    path = tmp_path / "weights.safetensors"
    save_torch(variables, path)
    state_dict = _installed("safetensors.torch").load_file(path)
    other = getattr(models, name)().eval()
    other.load_state_dict(state_dict)
    np.testing.assert_array_equal(_torch_logits(torch, other), logits)


def test_timm(torch, tmp_path):
    net = _randomize(torch, _installed("timm").create_model("densenet121"))
    path = tmp_path / "weights.safetensors"
    _installed("safetensors.torch").save_file(net.state_dict(), path)
    model, _ = _assert_same_logits(path, _torch_logits(torch, net))
    assert model == create_model("densenet121")


@pytest.mark.parametrize("channels", [1, 4])
def test_timm_adapts_the_stem_in_the_same_way(torch, tmp_path, channels):
    timm = _installed("timm")
    net = timm.create_model("densenet121")
    path = tmp_path / "weights.safetensors"
    _installed("safetensors.torch").save_file(net.state_dict(), path)
    name = "features.conv0.weight"
    expected = timm.models.adapt_input_conv(channels, net.state_dict()[name])
    _, variables = load_pretrained(path, in_channels=channels)
    save_torch(variables, path)
    np.testing.assert_allclose(
        load_file(path)[name], expected.numpy(), rtol=1e-6
    )


@pytest.mark.parametrize(
    "name", ["densenetblur121d", pytest.param("densenet264d", marks=SLOW)]
)
def test_timm_with_a_deep_stem(torch, tmp_path, name):
    net = _randomize(torch, _installed("timm").create_model(name))
    path = tmp_path / "weights.safetensors"
    _installed("safetensors.torch").save_file(net.state_dict(), path)

    model, variables = _assert_same_logits(path, _torch_logits(torch, net))

    assert model == create_model(name)
    # And back.
    save_torch(variables, path)
    written = _installed("safetensors.torch").load_file(path)
    net.load_state_dict(written, strict=False)
    counters = net.state_dict().keys() - written.keys()
    assert all(name.endswith("num_batches_tracked") for name in counters)


def test_timms_modules_tell_where_it_blurs(torch):
    """The names that torch.save keeps beside a state_dict."""
    net = _installed("timm").models.densenet.DenseNet
    blur = _installed("timm.layers").BlurPool2d
    (told,) = (x.told for x in LAYOUTS if x.name == "torchvision and timm")
    tiny = dict(growth_rate=4, block_config=(1, 1), stem_type="deep")
    for options, expected in [
        ({}, {"blur_pool": "none"}),
        ({"aa_layer": blur}, {"blur_pool": "stem", "stem_pool": True}),
    ]:
        modules = net(**tiny, **options).state_dict()._metadata
        assert told(modules) == expected


def test_monai(torch, tmp_path):
    net = _installed("monai").networks.nets.DenseNet121(2, 3, 5)
    _randomize(torch, net)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": net.state_dict()}, path)
    model, _ = _assert_same_logits(path, _torch_logits(torch, net))
    assert model == create_model("densenet121", num_classes=5)


def test_monai_in_three_dimensions_is_refused(torch, tmp_path):
    nets = _installed("monai").networks.nets
    path = tmp_path / "weights.pth"
    torch.save(nets.DenseNet121(3, 1, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"conv0/kernel is \[64, 1, 7, 7, 7\]"):
        load_pretrained(path)


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5"])
def test_keras(torch, tmp_path, suffix):
    # Keras on JAX needs the implicit promotion that the tests forbid.
    os.environ["KERAS_BACKEND"] = "torch"
    keras = _installed("keras")
    net = keras.applications.DenseNet121(
        weights=None, input_shape=(64, 64, 3), classifier_activation=None
    )
    rng = np.random.default_rng(0)
    for layer in net.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.get_weights()[0].shape
            scale, var = rng.uniform(0.5, 1.5, (2, *shape))
            bias, mean = rng.normal(0, 0.1, (2, *shape))
            layer.set_weights([scale, bias, mean, var])
    path = tmp_path / f"net{suffix}"
    if suffix == ".h5":
        net.save(path)
    else:
        net.save_weights(path)
    logits = keras.ops.convert_to_numpy(net(IMAGES, training=False))
    model, _ = _assert_same_logits(path, logits)
    assert model == create_model("densenet121", norm_epsilon=1.001e-5)


def test_torch_reads_the_tests_own_files(torch, tmp_path):
    """The writer that tests without torch use makes what torch.save makes."""
    tree = {
        "epoch": 3,
        "state_dict": {
            "a": np.arange(6, dtype=np.float32).reshape(2, 3),
            "b": np.arange(4).astype(np.float16),
        },
    }
    path = write(tmp_path / "weights.pth", tree)
    read = torch.load(path, weights_only=True)
    assert read["epoch"] == 3
    for name, value in tree["state_dict"].items():
        np.testing.assert_array_equal(read["state_dict"][name], value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves(torch, tmp_path, protocol):
    """Parameters, views, transposes and every type, in each protocol."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "parameter": torch.nn.Parameter(base.clone()),
        "transposed": base.T,
        "view": base[1:3, ::2],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    for name in (
        "float64",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ):
        tensors[name] = torch.arange(5).to(getattr(torch, name))
    path = tmp_path / "weights.pth"
    torch.save(tensors, path, pickle_protocol=protocol)
    read = open_tensors(path).tensors
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        expected = value.detach().numpy()
        assert read[name].read().dtype == expected.dtype
        np.testing.assert_array_equal(read[name].read(), expected)

    torch.save({"a": base.bfloat16()}, path, pickle_protocol=protocol)
    found = open_tensors(path).tensors["a"].read()
    np.testing.assert_array_equal(found.astype(np.float32), base.numpy())


def test_refuses_what_torch_saves_whole(torch, tmp_path):
    net = torch.nn.Linear(2, 3)
    path = tmp_path / "weights.pth"
    torch.save(net, path)
    with pytest.raises(
        ValueError, match=r"'torch\.nn\.modules\.linear\.Linear'"
    ):
        open_tensors(path)
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="PyTorch's format from before"):
        open_tensors(path)
    torch.jit.save(torch.jit.script(net), path)
    with pytest.raises(ValueError, match="TorchScript"):
        open_tensors(path)
