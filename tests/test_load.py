"""Weights of other frameworks: golden files, strictness, and the way out.

The golden files and their logits are made by make_golden_weights.py with the
frameworks' own modules.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from densenet_jax import (
    create_model,
    list_models,
    load_pretrained,
    save_torch,
)
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.weights.architecture import infer_architecture
from densenet_jax.weights.containers import open_tensors
from densenet_jax.weights.export import to_torch
from densenet_jax.weights.load import Reading, load_weights
from tests.random_variables import random_variables
from tests.tiny_nets import GOLDEN, TINY, assert_same
from tests.torch_writer import tensor, write

LOGITS = dict(np.load(GOLDEN / "logits.npz"))
IMAGES = LOGITS.pop("images")
VERSIONS = LOGITS.pop("versions")


@pytest.fixture(scope="module")
def variables():
    return random_variables(TINY)


@pytest.fixture
def state_dict(variables):
    """TINY's tensors in torchvision's names."""
    return to_torch(variables)


def refused(path, match, **arguments):
    with pytest.raises(ValueError, match=match) as error:
        load_pretrained(path, **arguments)
    assert str(path) in str(error.value)
    return str(error.value)


# What is recognised.


@pytest.mark.parametrize("name", LOGITS)
def test_golden_logits(name):
    model, loaded, *_ = load_weights(GOLDEN / name)
    logits = jax.jit(model.apply)(loaded, IMAGES)
    assert np.abs(LOGITS[name]).max() > 0.5
    np.testing.assert_allclose(logits, LOGITS[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision.pth", ["torchvision and timm"]),
        ("torchvision_legacy.pth", ["torchvision and timm"]),
        ("timm.safetensors", ["torchvision and timm"]),
        ("gpleiss.pth", ["under the key 'model'", "gpleiss"]),
        (
            "chexnet.pth",
            ["key 'state_dict'", "torchvision", r"module\.densenet121\."],
        ),
        ("monai.pth", ["key 'model_state_dict'", "MONAI"]),
        ("cifar.pth", ["CIFAR net with bn and fc"]),
        (
            "newest_first.pth",
            ["key 'net'", "kuangliu", r"module\.", "newest features first"],
        ),
        ("unknown_names.pth", ["recognised by their order and shapes"]),
        ("keras.h5", ["Keras applications"]),
        ("keras.weights.h5", ["Keras applications"]),
    ],
)
def test_says_what_it_recognised(name, said):
    _, _, remarks, changes, _ = load_weights(GOLDEN / name)
    for line, expected in zip(remarks + changes, said, strict=True):
        assert re.search(expected, line)


def test_logs_what_it_recognised(caplog):
    with caplog.at_level("INFO", logger="densenet_jax"):
        load_pretrained(GOLDEN / "monai.pth", num_classes=5)
    levels = {r.getMessage(): r.levelname for r in caplog.records}
    path = GOLDEN / "monai.pth"
    assert levels[f"{path}: The names are those of MONAI."] == "INFO"
    new = f"{path}: The classifier is new, for 5 classes, not trained."
    assert levels[new] == "WARNING"


def test_keras_epsilon():
    assert load_pretrained(GOLDEN / "keras.h5")[0].norm_epsilon == 1.001e-5
    assert load_pretrained(GOLDEN / "monai.pth")[0].norm_epsilon == 1e-5


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "backbone.",
        "densenet121.",
        "_orig_mod.",
        "module.model.backbone.",
        "student.",
        "module.my_net.body.",
    ],
)
def test_prefixes(tmp_path, variables, state_dict, prefix):
    path = tmp_path / "prefixed.safetensors"
    save_file({prefix + k: v for k, v in state_dict.items()}, path)
    _, loaded, remarks, *_ = load_weights(path)
    assert_same(loaded, variables)
    assert f"Prefixes left out: {prefix}" in remarks


@pytest.mark.parametrize("head", ["fc", "classifier.1", "head", "linear"])
def test_names_of_the_head(tmp_path, variables, state_dict, head):
    path = tmp_path / "head.safetensors"
    renamed = {k.replace("classifier", head): v for k, v in state_dict.items()}
    save_file(renamed, path)
    assert_same(load_pretrained(path)[1], variables)


# The architecture.


@pytest.mark.parametrize("name", list_models())
def test_architecture_of_every_variant(name):
    model = create_model(name)
    shapes = tensor_shapes(model, in_channels=3)
    assert DenseNet(**infer_architecture(shapes)) == model


@pytest.mark.parametrize(
    "model",
    [
        TINY,
        TINY.clone(stem="cifar", stem_norm=False, stem_features=7),
        TINY.clone(bottleneck_width=0, compression=1.0),
        TINY.clone(block_layers=(1, 2, 3), compression=0.3),
        TINY.clone(block_layers=(2, 2, 2), compression=1 / 3),
        TINY.clone(block_layers=(2,), stem_norm=False),
    ],
)
def test_other_architectures(model):
    shapes = tensor_shapes(model, in_channels=2)
    traced = jax.eval_shape(
        model.init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 32, 32, 2), jnp.float32),
    )
    leaves = jax.tree_util.tree_leaves_with_path(traced)
    assert shapes == {
        "/".join(key.key for key in path[1:]): leaf.shape
        for path, leaf in leaves
    }
    inferred = DenseNet(**infer_architecture(shapes))
    assert tensor_shapes(inferred, in_channels=2) == shapes
    if model.compression in (0.3, 0.5, 1.0):
        assert inferred == model


def test_no_architecture(tmp_path, state_dict):
    path = tmp_path / "weights.safetensors"

    def save_with(**tensors):
        save_file(state_dict | tensors, path)

    stem = {"features.conv0.weight": np.ones((8, 3, 5, 5), np.float32)}
    save_with(**stem)
    refused(path, r"conv0/kernel is \[5, 5, 3, 8\], expected .* 7 .* or 3")
    stem = {"features.conv0.weight": np.ones((8, 1, 7, 7, 7), np.float32)}
    save_with(**stem)
    refused(path, "The net reads volumes")

    shapes = tensor_shapes(TINY.clone(block_layers=(2, 2, 2)), 3)
    shapes["transition2/conv/kernel"] = (1, 1, 16, 3)
    for leaf in ("scale", "mean"):
        shapes[f"denseblock3/denselayer1/norm1/{leaf}"] = (3,)
    with pytest.raises(ValueError, match="16 -> 8, 16 -> 3 channels"):
        infer_architecture(shapes)


# Strictness.


def test_lists_all_that_is_wrong(tmp_path, state_dict):
    path = tmp_path / "wrong.safetensors"
    layer = "features.denseblock1.denselayer2"
    del state_dict[f"{layer}.conv1.weight"]
    del state_dict["features.norm0.bias"]
    state_dict[f"{layer}.norm.1.weight"] = state_dict[f"{layer}.norm1.weight"]
    state_dict[f"{layer}.conv2.weight"] = np.ones((4, 9, 3, 3), np.float32)
    state_dict["features.norm5.running_var"] = np.ones(9, np.float32)
    state_dict["features.conv0.bias"] = np.ones(8, np.float32)
    state_dict["features.se.weight"] = np.ones(8, np.float32)
    save_file(state_dict, path)
    message = refused(path, "exactly the tensors of the DenseNet")
    for line in [
        "missing (2):",
        "denseblock1/denselayer2/conv1/kernel [1, 1, 12, 8]",
        "norm0/bias [8]",
        "duplicate (1):",
        f"{layer}.norm.1.weight and {layer}.norm1.weight are both",
        "mis-shaped (2):",
        f"{layer}.conv2.weight is [3, 3, 9, 4]",
        "expected [3, 3, 8, 4]",
        "features.norm5.running_var is [9]",
        "unused (2):",
        "features.conv0.bias",
        "features.se.weight",
        "growth_rate=4",
    ]:
        assert line in message


@pytest.mark.parametrize("change", ["drop", "grow", "empty", "integer"])
def test_no_tensor_may_be_wrong(tmp_path, state_dict, change):
    """Each tensor in turn is missing, of another shape, or of integers."""
    path = tmp_path / "wrong.safetensors"
    for name, value in state_dict.items():
        wrong = dict(state_dict)
        if change == "drop":
            del wrong[name]
            match = "missing"
        elif change == "integer":
            wrong[name] = value.astype(np.int32)
            match = f"{name} is int32: expected floats"
        else:
            size = 0 if change == "empty" else value.shape[0] + 1
            wrong[name] = np.ones((size, *value.shape[1:]), np.float32)
            # Of a head's two tensors either may be the wrong one.
            name = re.sub("classifier.*", r"classifier.(weight|bias)", name)
            match = rf"mis-shaped \(1\):\n  {name} is \["
        save_file(wrong, path)
        refused(path, match)


def test_damaged_files(tmp_path):
    for name in ("timm.safetensors", "keras.h5"):
        path = tmp_path / name
        path.write_bytes((GOLDEN / name).read_bytes()[:10_000])
        refused(path, "truncated or damaged")
    with pytest.raises(FileNotFoundError):
        load_pretrained(tmp_path / "absent.pth")


def test_keras_values_outside_the_file(tmp_path):
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(36))
    for name, content in {
        "sparse.h5": {"shape": (10**9,)},
        "external.h5": {"shape": (9,), "external": [(str(other), 0, 36)]},
    }.items():
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            file.create_dataset("conv1_conv/kernel", dtype="f4", **content)
        refused(path, "not in this file")


# Small files that claim to be large.


def test_layers_numbered_beyond_the_tensors(tmp_path, state_dict):
    for name in (
        "denseblock1000000000.denselayer1",
        "denseblock1.denselayer9" + 8 * "0",
    ):
        path = tmp_path / "numbered.safetensors"
        extra = {f"features.{name}.norm1.weight": np.ones(1, np.float32)}
        save_file(state_dict | extra, path)
        refused(path, "numbered up to [0-9]+, but there are only")


def test_tensors_that_share_their_bytes(tmp_path, state_dict):
    storage = np.ones(10_000, np.float32)
    storages = [storage]
    views = {
        name: tensor(storage, 0, value.shape, value.strides, [])
        for name, value in state_dict.items()
    }
    views |= {
        f"more.{i}": tensor(storage, 0, (10_000,), (1,), []) for i in range(9)
    }

    def add_storage(entries):
        entries["data/0"] = storages[0].tobytes()

    path = write(tmp_path / "shared.pth", views, edit=add_storage)
    refused(path, "claim [0-9,]+ bytes that are not in this file")


def test_a_dict_that_holds_itself(tmp_path):
    def edit(entries):
        entries["data.pkl"] = b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."

    path = write(tmp_path / "cycle.pth", {}, edit=edit)
    refused(path, "no dict of tensors")


def test_values_beyond_float32(tmp_path, state_dict):
    state_dict["features.conv0.weight"] = np.full(
        state_dict["features.conv0.weight"].shape, 1e300
    )
    path = tmp_path / "large.safetensors"
    save_file(state_dict, path)
    refused(path, "conv0.weight has values beyond float32's")


# Data types.


@pytest.mark.parametrize("container", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.float32]
)
def test_data_types(tmp_path, variables, state_dict, dtype, container):
    path = tmp_path / f"weights.{container}"
    cast = {name: value.astype(dtype) for name, value in state_dict.items()}
    if container == "pth":
        write(path, cast)
    else:
        save_file(cast, path)
    _, loaded, _, changes, _ = load_weights(path)
    expected = jax.tree.map(
        lambda x: x.astype(dtype).astype(np.float32), variables
    )
    assert_same(loaded, expected)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    count = len(state_dict)
    remark = f"{count} tensors were {np.dtype(dtype)}, now float32."
    assert (remark in changes) == (dtype != np.float32)


# A new head, another number of input channels.


def test_a_new_head(tmp_path, variables, state_dict):
    path = tmp_path / "weights.safetensors"
    save_torch(variables, path)
    model, loaded, _, changes, _ = load_weights(path, num_classes=5)
    assert model == TINY.clone(num_classes=5)
    head = loaded["params"].pop("classifier")
    assert head["kernel"].shape == (12, 5)
    assert 0.1 < jnp.abs(head["kernel"]).max() < 12**-0.5
    np.testing.assert_array_equal(head["bias"], np.zeros(5))
    assert "The classifier is new, for 5 classes, not trained." in changes
    body = variables["params"] | {}
    del body["classifier"]
    assert_same(loaded["params"], body)

    model, loaded, _, changes, _ = load_weights(path, num_classes=3)
    assert_same(loaded, variables)
    assert not any("classifier" in change for change in changes)


def test_no_head(tmp_path, state_dict):
    path = tmp_path / "weights.safetensors"
    body = {k: v for k, v in state_dict.items() if "classifier" not in k}
    save_file(body, path)
    refused(path, "no classifier: load_pretrained")
    assert load_pretrained(path, num_classes=5)[0].num_classes == 5
    # A number that happens to be the default.
    assert load_pretrained(path, num_classes=1000)[0].num_classes == 1000
    save_file(body | {"classifier.bias": np.zeros(3, np.float32)}, path)
    refused(path, "missing")


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_input_channels(tmp_path, variables, channels):
    """Images that repeat their channels keep the sum over them."""
    path = tmp_path / "weights.safetensors"
    save_torch(variables, path)
    _, loaded, _, changes, _ = load_weights(path, in_channels=channels)
    kernel = loaded["params"].pop("conv0")["kernel"]
    before = variables["params"]["conv0"]["kernel"]
    if channels == 1:
        expected = before[:, :, :1] + before[:, :, 1:2] + before[:, :, 2:]
    else:
        order = [i % 3 for i in range(channels)]
        expected = before[:, :, order] * np.float32(3 / channels)
    np.testing.assert_allclose(kernel, expected, rtol=1e-6)
    assert f"adapted from 3 to {channels} input" in changes[-1]
    assert_same(loaded["batch_stats"], variables["batch_stats"])


def test_same_input_channels(tmp_path, variables):
    path = tmp_path / "weights.safetensors"
    save_torch(variables, path)
    _, loaded, _, changes, _ = load_weights(path, in_channels=3)
    assert_same(loaded, variables)
    assert not any("adapted" in change for change in changes)
    refused(path, "num_classes is 0", num_classes=0)
    with pytest.raises(ValueError, match="in_channels is 0"):
        load_pretrained(path, in_channels=0)


# Nets that follow no table.


def unknown_names(model, path, edit=lambda modules: modules):
    """A net's modules in the order of use, in names without meaning."""
    modules = {}
    for name, shape in tensor_shapes(model, 3).items():
        module, _, leaf = name.rpartition("/")
        modules.setdefault(module, {})[leaf] = shape
    tensors = {}
    rng = np.random.default_rng(0)
    for i, leaves in enumerate(edit(list(modules.values()))):
        for leaf, shape in leaves.items():
            order = {2: (1, 0), 4: (3, 2, 0, 1)}.get(len(shape), (0,))
            leaf = {
                "kernel": "weight",
                "scale": "weight",
                "mean": "running_mean",
                "var": "running_var",
            }.get(leaf, leaf)
            value = rng.uniform(0.5, 1.5, [shape[j] for j in order])
            tensors[f"m{i}.{leaf}"] = value.astype(np.float32)
    return write(path, tensors)


@pytest.mark.parametrize(
    "model",
    [
        TINY,
        TINY.clone(bottleneck_width=0, compression=1.0, stem_features=16),
        TINY.clone(block_layers=(1, 2, 2), stem="cifar", stem_norm=False),
        TINY.clone(bottleneck_width=0, stem_norm=False, block_layers=(3,)),
        create_model("densenet_bc_100_12"),
    ],
)
def test_order_and_shapes(tmp_path, model):
    path = unknown_names(model, tmp_path / "weights.pth")
    loaded, _, _, changes, _ = load_weights(path)
    assert loaded == model
    assert "recognised by their order and shapes" in changes[0]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        # The norms before the convolutions, as some modules list them.
        (
            lambda m: [*m[:3], m[4], m[3], *m[5:]],
            "m3 follows the last layer",
        ),
        # Two layers swapped.
        (lambda m: [*m[:2], *m[6:10], *m[2:6], *m[10:]], "channels"),
        # A layer left out.
        (lambda m: m[:2] + m[6:], "reads 12 channels"),
        (lambda m: [*m, m[-1]], "m18 follows the last layer"),
        (lambda m: m[:-2] + m[-1:], "as norm5, a norm"),
        (lambda m: [*m[:-1], {"kernel": (3, 3)}], "no linear layer"),
        (lambda m: [{"kernel": (7, 5, 3, 8)}, *m[1:]], "a 7x5 kernel"),
    ],
)
def test_an_order_that_does_not_fit(tmp_path, edit, reason):
    path = unknown_names(TINY, tmp_path / "weights.pth", edit)
    message = refused(path, reason)
    assert "--mapping=FILE" in message


def test_safetensors_have_no_order(tmp_path):
    file = open_tensors(unknown_names(TINY, tmp_path / "weights.pth"))
    path = tmp_path / "weights.safetensors"
    save_file({n: t.read().copy() for n, t in file.tensors.items()}, path)
    refused(path, "safetensors files do not keep their order")


MAPPING = r"""
first_block = 0
first_layer = 0
norm_epsilon = 1e-3
[rules]
'stem\.c' = 'conv0'
'stem\.n' = 'norm0'
'b(?P<block>\d)\.(?P<layer>\d)\.(?P<kind>norm|conv)(?P<n>[12])' = \
'denseblock{block}/denselayer{layer}/{kind}{n}'
't(?P<block>\d)\.(?P<kind>norm|conv)' = 'transition{block}/{kind}'
'out\.n' = 'norm5'
'out\.l' = 'classifier'
""".replace("\\\n", "")


def test_a_mapping(tmp_path, variables, state_dict):
    def rename(name):
        for old, new in [
            (r"features.conv0", "stem.c"),
            (r"features.norm0", "stem.n"),
            (r"features.norm5", "out.n"),
            (r"classifier", "out.l"),
        ]:
            name = name.replace(old, new)
        name = re.sub(
            r"features.denseblock(\d).denselayer(\d)",
            lambda m: f"b{int(m[1]) - 1}.{int(m[2]) - 1}",
            name,
        )
        return re.sub(
            r"features.transition(\d)", lambda m: f"t{int(m[1]) - 1}", name
        )

    path = tmp_path / "weights.safetensors"
    save_file({rename(k): v for k, v in state_dict.items()}, path)
    refused(path, "follow no known layout")
    mapping = tmp_path / "mapping.toml"
    mapping.write_text(MAPPING)
    model, loaded, remarks, *_ = load_weights(
        path, reading=Reading(mapping=mapping)
    )
    assert model == TINY.clone(norm_epsilon=1e-3)
    assert_same(loaded, variables)
    assert f"The names are mapped by {mapping}." in remarks


def test_a_mapping_leaves_tensors_out(tmp_path, variables, state_dict):
    path = tmp_path / "weights.safetensors"
    state_dict["thresholds"] = np.ones(3, np.float32)
    save_file(state_dict, path)
    assert "--mapping=FILE" in refused(path, "unused .1.:\n  thresholds")
    mapping = tmp_path / "mapping.toml"
    mapping.write_text(
        r"""[rules]
'' = ''
'features\.(?P<a>\w+)' = '{a}'
'features\.(?P<a>\w+)\.(?P<b>\w+)' = '{a}/{b}'
'features\.(?P<a>\w+)\.(?P<b>\w+)\.(?P<c>\w+)' = '{a}/{b}/{c}'
'classifier' = 'classifier'
"""
    )
    _, loaded, _, changes, _ = load_weights(
        path, reading=Reading(mapping=mapping)
    )
    assert_same(loaded, variables)
    assert "thresholds is left out." in changes


def test_a_head_of_several_layers_is_replaced(tmp_path, state_dict):
    kernel = state_dict.pop("classifier.weight")
    bias = state_dict.pop("classifier.bias")
    for layer in (0, 3):
        state_dict[f"classifier.{layer}.weight"] = kernel
        state_dict[f"classifier.{layer}.bias"] = bias
    path = tmp_path / "deep_head.safetensors"
    save_file(state_dict, path)
    refused(path, r"not one linear layer \(classifier.0")
    model, _, _, changes, _ = load_weights(path, num_classes=3)
    assert model.num_classes == 3
    assert changes[0] == "Left out: classifier.0, classifier.3."
    assert "The classifier is new" in changes[1]


@pytest.mark.parametrize(
    "text",
    [
        "conv0",
        "[rules]\n'(' = 'conv0'",
        "colour = 1\n[rules]",
        "rules = 3",
        "first_layer = 'x'\n[rules]",
        "[rules]\n'a' = 'denseblock{block}'",
    ],
)
def test_no_mapping(tmp_path, text):
    mapping = tmp_path / "mapping.toml"
    mapping.write_text(text)
    with pytest.raises(ValueError, match="is no mapping of names"):
        load_weights(GOLDEN / "monai.pth", reading=Reading(mapping))


# The way out.


# Files have no place for an epsilon that is not PyTorch's.
_OTHER_EPSILON = {"keras.h5", "keras.weights.h5", "old_module.pth"}


@pytest.mark.parametrize("name", sorted(LOGITS.keys() - _OTHER_EPSILON))
def test_out_and_in_again(tmp_path, name):
    model, loaded = load_pretrained(GOLDEN / name)
    path = tmp_path / "weights.safetensors"
    save_torch(loaded, path)
    again, loaded_again = load_pretrained(path)
    assert again == model
    assert_same(loaded_again, loaded)


def test_torchvisions_names_and_values(tmp_path):
    """What torchvision saved is what we save, but for the counters."""
    _, loaded = load_pretrained(GOLDEN / "torchvision.pth")
    path = tmp_path / "weights.safetensors"
    save_torch(loaded, path)
    ours = load_file(path)
    theirs = {
        name: tensor.read()
        for name, tensor in open_tensors(
            GOLDEN / "torchvision.pth"
        ).tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def test_other_variables_are_not_written(tmp_path, variables):
    with pytest.raises(ValueError, match=r"\['params'\]: expected"):
        save_torch({"params": variables["params"]}, tmp_path / "x")
    dense = {"params": {"Dense_0": {"kernel": jnp.ones((2, 2))}}}
    with pytest.raises(ValueError, match="conv0/kernel"):
        save_torch({**dense, "batch_stats": {}}, tmp_path / "x")
    extra = {**variables["params"], **dense["params"]}
    with pytest.raises(ValueError, match="not exactly those of a DenseNet"):
        save_torch({**variables, "params": extra}, tmp_path / "x")


# Memory, and weights trained by others.


@pytest.mark.slow
@pytest.mark.parametrize("container", ["pth", "safetensors"])
def test_a_deep_net_loads_in_little_memory(tmp_path, container):
    variables = random_variables(create_model("densenet201"))
    file = tmp_path / f"densenet201.{container}"
    if container == "pth":
        write(file, to_torch(variables))
    else:
        save_torch(variables, file)
    command = [sys.executable, "-m", "benchmarks.load", str(file)]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    assert float(output.split()[-1]) < 3  # times the file


@pytest.mark.slow
def test_a_checkpoint_trained_by_others():
    """Its own PyTorch code made the logits, and gets 90.22%."""
    weights = os.environ.get("DENSENET_JAX_TEST_WEIGHTS")
    data_dir = os.environ.get("TFDS_DATA_DIR")
    if not weights or not data_dir:
        pytest.skip(
            "Set DENSENET_JAX_TEST_WEIGHTS to the folder with "
            "densenet_bc_cifar10_thirdparty.pth and TFDS_DATA_DIR to that "
            "with cifar10."
        )
    import tensorflow_datasets as tfds

    name = Path(weights) / "densenet_bc_cifar10_thirdparty"
    theirs = np.load(f"{name}_logits.npz")
    model, variables = load_pretrained(f"{name}.pth")
    apply = jax.jit(model.apply)
    source = tfds.data_source("cifar10", split="test", data_dir=data_dir)
    mean = np.array([0.4914, 0.4822, 0.4465])
    std = np.array([0.2023, 0.1994, 0.2010])
    logits = []
    for start in range(0, 10_000, 500):
        images = source.__getitems__(range(start, start + 500))
        images = np.stack([example["image"] for example in images])
        images = ((images / 255 - mean) / std).astype(np.float32)
        logits.append(np.asarray(apply(variables, images)))
    logits = np.concatenate(logits)
    np.testing.assert_allclose(logits, theirs["logits"], atol=1e-3, rtol=0)
    assert (logits.argmax(1) == theirs["labels"]).sum() == 9022
