"""Other stems and pools: golden files of timm, torchvision and Keras.

The files and their logits are made by make_golden_stems.py with the frameworks'
own modules.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from densenet_jax import save_torch
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.models.variants import create_model
from densenet_jax.weights.architecture import infer_architecture
from densenet_jax.weights.export import unsaid
from densenet_jax.weights.layouts import LAYOUTS
from densenet_jax.weights.load import load_weights
from densenet_jax.weights.unshown import guesses
from tests.random_variables import random_variables

GOLDEN = Path(__file__).parent / "data" / "stems"
LOGITS = dict(np.load(GOLDEN / "logits.npz"))
IMAGES = LOGITS.pop("images")
VERSIONS = LOGITS.pop("versions")

TOLD = {layout.name: layout.told for layout in LAYOUTS}


def assert_golden(model, variables, key):
    """Equal logits; those of the other nets of the same file are others."""
    logits = jax.jit(model.apply)(variables, IMAGES)
    np.testing.assert_allclose(logits, LOGITS[key], atol=1e-5, rtol=0)
    file = key.partition(" ")[0]
    for other, values in LOGITS.items():
        if other != key and other.partition(" ")[0] == file:
            assert np.abs(logits - values).max() > 0.01


@pytest.mark.parametrize("blur", ["none", "stem", "all"])
@pytest.mark.parametrize(
    ("stem", "features"), [("deep", None), ("deep_tiered", (3, 6, 8))]
)
def test_timms_deep_stems_and_blur_pools(stem, features, blur):
    name = f"{stem}.safetensors"
    model, variables, _, changes, _ = load_weights(GOLDEN / name)

    assert (model.stem, model.stem_features) == ("deep", features)
    assert any("blur_pool='none' is assumed" in line for line in changes)
    assert_golden(model.clone(blur_pool=blur), variables, f"{name} {blur}")


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_3x3_stem_in_torchvisions_names(stride, pool):
    name = "small.safetensors"
    model, variables, _, changes, _ = load_weights(GOLDEN / name)

    said = " ".join(changes)
    assert "1 is assumed; stem_stride=2 says otherwise" in said
    assert "none is assumed; stem_pool=True says otherwise" in said
    model = model.clone(stem_stride=stride, stem_pool=pool)
    assert_golden(model, variables, f"{name} {stride} {pool}")


@pytest.mark.parametrize(
    ("name", "layout", "padding"),
    [
        ("keras_hub.h5", "KerasHub", "same"),
        ("keras_hub_explicit.weights.h5", "KerasHub", "explicit"),
        ("keras_cv.weights.h5", "KerasCV", "same"),
    ],
)
def test_keras_nets_pad_as_their_library(name, layout, padding):
    model, variables, remarks, changes, _ = load_weights(GOLDEN / name)

    assert f"The names are those of {layout}." in remarks
    assert not changes
    assert (model.stem_padding, model.norm_epsilon) == (padding, 1.001e-5)
    assert_golden(model, variables, name)
    other = {"same": "explicit", "explicit": "same"}[padding]
    wrong = model.clone(stem_padding=other).apply(variables, IMAGES)
    assert np.abs(wrong - LOGITS[name]).max() > 0.01


def test_keras_layers_without_weights_tell_the_padding():
    def padding(layout, *modules):
        return TOLD[layout](modules)["stem_padding"]

    assert padding("KerasHub", "model_weights/zero_padding2d_1") == "explicit"
    assert padding("KerasHub", "layers/max_pooling2d") == "same"
    assert padding("KerasHub") == padding("KerasCV") == "same"
    assert padding("Keras applications", "layers/re_lu") == "explicit"


def test_torch_modules_without_tensors_tell_of_pools():
    """As `state_dict()._metadata` names them."""
    told = TOLD["torchvision and timm"]
    stem = ["", "features", "features.conv0", "features.norm0"]
    pool = "features.pool0"

    assert told() == {}
    assert told(stem) == {"stem_pool": False, "blur_pool": "none"}
    # An identity would have this name too.
    assert told([*stem, pool]) == {"blur_pool": "none"}
    blurs = {"blur_pool": "stem", "stem_pool": True}
    assert told([*stem, pool, f"module.{pool}.0", f"module.{pool}.1"]) == blurs


def test_only_guesses_are_said():
    small = DenseNet((1,), stem="cifar")

    assert len(guesses(small, {})) == 2
    assert len(guesses(small, {"stem_pool": False})) == 1
    assert not guesses(small, {"stem_pool": False, "stem_stride": 1})
    # The paper's stem for CIFAR; a 7x7 stem.
    assert not guesses(small.clone(stem_norm=False), {})
    assert not guesses(create_model("densenet121"), {})
    assert not guesses(create_model("densenet264d"), {"blur_pool": "none"})


def test_the_published_net_with_these_tensors_blurs():
    model = create_model("densenetblur121d")
    found = infer_architecture(tensor_shapes(model, 3))

    assert DenseNet(**found) == model
    (said,) = guesses(model, {})
    assert "blur_pool='stem' is assumed; blur_pool='none' or" in said
    deeper = create_model("densenet264d")
    assert DenseNet(**infer_architecture(tensor_shapes(deeper, 3))) == deeper


@pytest.mark.parametrize("features", [None, 6, (2, 3, 6)])
@pytest.mark.parametrize("stem_norm", [True, False])
def test_deep_stems_to_timms_names_and_back(tmp_path, features, stem_norm):
    model = DenseNet(
        (2, 1),
        growth_rate=(4, 6),
        stem="deep",
        stem_norm=stem_norm,
        stem_features=features,
    )
    variables = random_variables(model)
    path = tmp_path / "net.safetensors"

    save_torch(variables, path)

    found, loaded, *_ = load_weights(path)
    assert found == model
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_timms_names_are_written_as_timm_has_them(tmp_path):
    path = GOLDEN / "deep.safetensors"
    _, variables, *_ = load_weights(path)

    save_torch(variables, tmp_path / "net.safetensors")

    written = load_file(tmp_path / "net.safetensors")
    expected = {
        name: value
        for name, value in load_file(path).items()
        if not name.endswith("num_batches_tracked")
    }
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value)


def test_a_missing_convolution_of_a_deep_stem_is_named():
    shapes = tensor_shapes(create_model("densenet264d"), 3)
    del shapes["conv2/kernel"]

    assert infer_architecture(shapes)["stem"] == "deep"
    assert infer_architecture(shapes)["stem_features"] is None


@pytest.mark.parametrize(
    ("attributes", "names"),
    [
        ({}, []),
        ({"stem": "cifar", "stem_stride": 1}, []),
        ({"stem": "deep"}, []),
        ({"stem": "deep", "blur_pool": "all"}, ["blur_pool"]),
        ({"stem_padding": "same"}, ["stem_padding"]),
        ({"stem": "cifar", "stem_pool": True}, ["stem_pool"]),
        ({"stem_stride": 1, "stem_pool": False}, ["stem_stride", "stem_pool"]),
        ({"activation": "silu", "norm_epsilon": 1e-3}, None),
    ],
    ids=str,
)
def test_what_torchvisions_names_do_not_say(attributes, names):
    model = DenseNet((2, 1), growth_rate=4, **attributes)

    expected = ["norm_epsilon", "activation"] if names is None else names
    assert unsaid(model) == expected
