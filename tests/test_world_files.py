"""Files as the world makes them: what lies around a net's tensors.

The golden files, and their logits, are PyTorch's: make_golden_weights.py.
"""

import io
import re
import zipfile

import h5py
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from densenet_jax import load_pretrained
from densenet_jax.weights.containers import open_tensors
from densenet_jax.weights.export import to_torch
from densenet_jax.weights.load import Reading, load_weights
from tests import torch_writer as writer
from tests.random_variables import random_variables
from tests.tiny_nets import GOLDEN, TINY, assert_same


@pytest.fixture(scope="module")
def variables():
    return random_variables(TINY)


@pytest.fixture
def state_dict(variables):
    """TINY's tensors in torchvision's names."""
    return to_torch(variables)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def refused(path, match, **arguments):
    with pytest.raises(ValueError, match=match) as error:
        load_pretrained(path, **arguments)
    return str(error.value)


def prefixed(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


# Beside the weights.


def test_what_lies_beside_the_weights_is_named():
    loaded = load_weights(GOLDEN / "training.pth")
    (unbuilt,) = [r for r in loaded.remarks if "were not built" in r]
    for name in (
        "argparse.Namespace",
        "collections.Counter",
        "numpy._core.multiarray.scalar",
        "datetime.date",
        "_codecs.encode",
    ):
        assert name in unbuilt
    assert "The weights are under the key 'model'." in loaded.remarks
    assert any("under model_ema too" in r for r in loaded.remarks)


def test_the_average_can_be_chosen():
    _, variables = load_pretrained(GOLDEN / "training.pth", prefix="model_ema")
    assert not any(x.any() for x in jax.tree.leaves(variables))


def test_class_names_of_a_file():
    description = load_weights(GOLDEN / "training.pth").description
    assert description.class_names == ("ant", "bee", "cat")
    # They are those of the classifier that was replaced.
    new = load_weights(GOLDEN / "training.pth", num_classes=4)
    assert new.description.class_names is None


def test_any_key_with_one_dict_of_tensors(path, variables, state_dict):
    writer.write(path, {"epoch": 3, "G": {"weights_of_it": state_dict}})
    loaded = load_weights(path)
    assert_same(loaded.variables, variables)
    assert "The weights are under the key 'G.weights_of_it'." in loaded.remarks


def test_two_keys_with_nets(path, variables, state_dict):
    zeros = {name: 0 * value for name, value in state_dict.items()}
    writer.write(path, {"a": zeros, "b": state_dict})
    refused(path, "several nets, under the keys a, b: prefix=KEY")
    assert_same(load_pretrained(path, prefix="b")[1], variables)


def test_no_tensors_among_the_tensors(path, variables, state_dict):
    writer.write(path, {**state_dict, "epoch": 3, "note": "best"})
    loaded = load_weights(path)
    assert_same(loaded.variables, variables)
    assert "No tensors, left out: epoch (int), note (str)." in loaded.remarks


def test_a_placeholder_where_a_tensor_must_be(path, state_dict):
    state_dict["features.conv0.weight"] = writer.call(
        "torch._utils", "_rebuild_qtensor", 1
    )
    writer.write(path, state_dict)
    refused(path, r"conv0.*missing")


# Whole modules.


@pytest.mark.parametrize("name", ["module.pth", "old_module.pth"])
def test_a_whole_module(name):
    loaded = load_weights(GOLDEN / name)
    assert (
        "The file holds a whole module, torchvision.models.densenet.DenseNet: "
        "its tensors were read, its code was not."
    ) in loaded.remarks


def test_a_modules_own_epsilon():
    assert load_pretrained(GOLDEN / "module.pth")[0].norm_epsilon == 1e-5
    assert load_pretrained(GOLDEN / "old_module.pth")[0].norm_epsilon == 0.1


def module(kind, **state):
    return writer.Object(kind, {"_modules": {}} | state)


@pytest.mark.parametrize(
    ("kind", "state", "expected"),
    [
        ("SiLU", {}, "silu"),
        ("GELU", {"approximate": "none"}, "gelu"),
        ("Sigmoid", {}, "relu"),  # after the classifier
        ("GELU", {"approximate": "tanh"}, None),
        ("LeakyReLU", {"negative_slope": 0.2}, None),
        ("PReLU", {}, None),
    ],
)
def test_a_modules_own_activation(path, state_dict, kind, state, expected):
    children = {"act": module(f"torch.nn.modules.activation.{kind}", **state)}
    tensors = {}
    for name, value in state_dict.items():
        *parents, leaf = name.split(".")
        place = tensors
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value

    def build(tree, extra):
        inner = {k: build(v, {}) for k, v in tree.items() if type(v) is dict}
        own = {k: v for k, v in tree.items() if type(v) is not dict}
        state = {"_modules": inner | extra, "_parameters": own}
        return module("mine.Net", **state)

    writer.write(path, build(tensors, children))
    if expected is None:
        refused(path, f"an activation {kind}")
    else:
        assert load_pretrained(path)[0].activation == expected


def test_a_module_that_holds_itself(path):
    """The memo gives the module as its own child."""
    program = b"cmine\nNet\n)\x81q\x01}X\x08\x00\x00\x00_modules"
    program += b"}X\x01\x00\x00\x00ah\x01ssb"
    writer.write(path, writer.Raw(program))
    refused(path, "holds itself")


# One net of several.


def test_a_net_inside_of_a_larger_one(tmp_path, variables, state_dict):
    path = tmp_path / "segmentation.safetensors"
    body = {k: v for k, v in state_dict.items() if "classifier" not in k}
    tensors = prefixed("encoder.", body)
    tensors["decoder.block.conv.weight"] = np.ones((2, 3, 3, 3), np.float32)
    save_file(tensors, path)
    refused(path, r"no classifier|unused")
    loaded = load_weights(path, num_classes=3)
    assert "Left out: decoder.block.conv." in loaded.changes
    assert_same(loaded.variables["batch_stats"], variables["batch_stats"])


def test_two_encoders(tmp_path, variables, state_dict):
    path = tmp_path / "moco.safetensors"
    zeros = {name: 0 * value for name, value in state_dict.items()}
    save_file(
        prefixed("encoder_k.", zeros) | prefixed("encoder_q.", state_dict),
        path,
    )
    refused(path, "several nets, whose names begin with 'encoder_k.'")
    _, loaded = load_pretrained(path, prefix="encoder_q")
    assert_same(loaded, variables)


def test_a_net_and_its_average(tmp_path, variables, state_dict):
    path = tmp_path / "both.safetensors"
    zeros = {name: 0 * value for name, value in state_dict.items()}
    save_file(
        prefixed("ema_model.module.", zeros) | prefixed("model.", state_dict),
        path,
    )
    loaded = load_weights(path)
    assert_same(loaded.variables, variables)
    assert "Of several nets 'model.' was taken." in loaded.remarks


@pytest.mark.parametrize(
    "stray",
    [
        "criterion.pos_weight",
        "loss_fn.weight",
        "val_auroc.thresholds",
        "train_acc.tp",
        "op_threshs",
        "n_averaged",
    ],
)
def test_buffers_of_losses_and_metrics(tmp_path, variables, state_dict, stray):
    path = tmp_path / "stray.safetensors"
    save_file({**state_dict, stray: np.ones(3, np.float32)}, path)
    loaded = load_weights(path)
    assert_same(loaded.variables, variables)
    assert f"Left out, as no part of the net: {stray}." in loaded.remarks


def test_buffers_beside_unknown_names(path):
    file = open_tensors(GOLDEN / "unknown_names.pth")
    tensors = {name: tensor.read() for name, tensor in file.tensors.items()}
    writer.write(path, {**tensors, "loss_fn.weight": np.ones(3)})
    loaded = load_weights(path)
    assert "recognised by their order" in loaded.changes[0]
    assert "Left out, as no part of the net: loss_fn.weight." in loaded.remarks


@pytest.mark.parametrize(
    "name",
    [
        "attention.weight",
        "features.denseblock1.denselayer1.relu1.weight",
        "features.denseblock1.denselayer1.se.fc1.weight",
        "features.norm5.slope",
        "features.lossy.weight",
    ],
)
def test_what_may_be_part_of_the_net_is_not_left_out(
    tmp_path, state_dict, name
):
    path = tmp_path / "more.safetensors"
    save_file({**state_dict, name: np.ones(3, np.float32)}, path)
    message = refused(path, r"unused \(1\)")
    assert name in message
    assert "--ignore=REGEX" in message


def test_what_lies_in_a_net_with_a_prefix_is_not_left_out(
    tmp_path, variables, state_dict
):
    path = tmp_path / "net.safetensors"
    tensors = prefixed("model.", state_dict)
    tensors["other.attention.weight"] = np.ones(3, np.float32)
    save_file(tensors, path)
    loaded = load_weights(path)
    assert_same(loaded.variables, variables)
    assert "Left out: other.attention." in loaded.changes
    tensors["model.attention.weight"] = np.ones(3, np.float32)
    save_file(tensors, path)
    assert "model.attention.weight" in refused(path, r"unused \(1\)")


def test_ignore(tmp_path, variables, state_dict):
    path = tmp_path / "more.safetensors"
    save_file({**state_dict, "a.weight": np.ones(3, np.float32)}, path)
    loaded = load_weights(path, reading=Reading(ignore=r"a\..*"))
    assert_same(loaded.variables, variables)
    assert "Ignored: a.weight." in loaded.remarks
    refused(path, "No tensor has a name like", ignore="b.*")
    refused(path, "is no pattern", ignore="(")


def test_a_mapping_extends_the_known_names(tmp_path, variables, state_dict):
    path = tmp_path / "renamed.safetensors"
    save_file(
        {
            name.replace("features.conv0", "stem"): value
            for name, value in state_dict.items()
        },
        path,
    )
    refused(path, "conv0/kernel")
    mapping = tmp_path / "mapping.toml"
    mapping.write_text("[rules]\n'stem' = 'conv0'\n")
    assert_same(load_pretrained(path, mapping=mapping)[1], variables)


def test_a_mapping_corrects_known_names(tmp_path):
    """The order of concatenation, of names that do not tell it."""
    mapping = tmp_path / "mapping.toml"
    mapping.write_text(
        "newest_first = false\nattributes = {norm_epsilon = 1e-3}\n[rules]\n"
    )
    path = GOLDEN / "newest_first.pth"
    newest = load_weights(path)
    oldest = load_weights(path, reading=Reading(mapping))
    assert oldest.model == newest.model.clone(norm_epsilon=1e-3)
    assert any("newest features first" in s for s in newest.changes)
    assert not any("newest features first" in s for s in oldest.changes)
    name = "denseblock1", "denselayer2", "norm1", "scale"
    one, other = newest.variables["params"], oldest.variables["params"]
    for key in name:
        one, other = one[key], other[key]
    assert sorted(one) == sorted(other)
    assert (one != other).any()


def test_a_prefix_that_no_name_has(tmp_path, state_dict):
    path = tmp_path / "net.safetensors"
    save_file(prefixed("model.", state_dict), path)
    refused(
        path, "begins with prefix='encoder.', but with model", prefix="encoder"
    )


# Names without a word for the net, and heads.


@pytest.mark.parametrize("container", ["pth", "safetensors"])
def test_the_features_alone(tmp_path, variables, state_dict, container):
    path = tmp_path / f"features.{container}"
    body = {
        name.removeprefix("features."): value
        for name, value in state_dict.items()
        if name.startswith("features.")
    }
    save = save_file if container == "safetensors" else swapped(writer.write)
    save(body, path)
    refused(path, "no classifier: .*num_classes=N. makes a new")
    _, loaded = load_pretrained(path, num_classes=5)
    assert_same(loaded["batch_stats"], variables["batch_stats"])


def swapped(write):
    return lambda tensors, path: write(path, tensors)


def test_a_head_of_any_name(tmp_path, variables, state_dict):
    path = tmp_path / "head.safetensors"
    renamed = {
        k.replace("classifier", "out_proj"): v for k, v in state_dict.items()
    }
    save_file(renamed, path)
    assert_same(load_pretrained(path)[1], variables)


def test_a_head_of_two_layers(tmp_path, state_dict):
    """Each has one place that it could take; neither is the classifier."""
    path = tmp_path / "head.safetensors"
    kernel = state_dict.pop("classifier.weight")
    del state_dict["classifier.bias"]
    state_dict["classifier.fc1.weight"] = kernel
    state_dict["classifier.fc1.bias"] = np.zeros(3, np.float32)
    state_dict["classifier.fc2.weight"] = np.ones((2, 3), np.float32)
    state_dict["classifier.fc2.bias"] = np.zeros(2, np.float32)
    save_file(state_dict, path)
    message = refused(path, "not one linear layer")
    assert re.search(r"classifier.fc1.weight \[3, \d+\]", message)
    assert "classifier.fc2.weight [2, 3]" in message
    loaded = load_weights(path, num_classes=2)
    assert "Left out: classifier.fc1, classifier.fc2." in loaded.changes


def test_fastais_head(tmp_path, variables, state_dict):
    """Its first layer reads the average and the maximum of each channel."""
    path = tmp_path / "fastai.safetensors"
    body = {
        f"0.0.{name.removeprefix('features.')}": value
        for name, value in state_dict.items()
        if name.startswith("features.")
    }
    channels = variables["params"]["norm5"]["bias"].size
    head = {
        "1.2.weight": np.ones(2 * channels, np.float32),
        "1.2.bias": np.ones(2 * channels, np.float32),
        "1.2.running_mean": np.ones(2 * channels, np.float32),
        "1.2.running_var": np.ones(2 * channels, np.float32),
        "1.4.weight": np.ones((5, 2 * channels), np.float32),
        "1.8.weight": np.ones((3, 5), np.float32),
    }
    save_file(body | head, path)
    refused(path, "no classifier|not one linear layer|unused")
    loaded = load_weights(path, num_classes=3)
    assert "Left out: 1.2, 1.4, 1.8." in loaded.changes


def test_a_head_that_fits_is_kept(tmp_path, variables, state_dict):
    """What is left over may lie between the features and the classifier."""
    path = tmp_path / "attention.safetensors"
    save_file({**state_dict, "attention.weight": np.ones((4, 4))}, path)
    refused(path, "attention.weight", num_classes=3)
    loaded = load_weights(path, num_classes=4)
    assert "Left out: attention." in loaded.changes


# Labels.


def test_torchxrayvisions_labels(tmp_path, state_dict):
    path = tmp_path / "xrv.safetensors"
    save_file({**state_dict, "op_threshs": np.full(3, np.nan)}, path)
    loaded = load_weights(path)
    assert loaded.description.task == "multilabel"
    # (2 x / 255 - 1) 1024, its own normalisation.
    preprocessing = loaded.description.preprocessing
    x = np.array([0.0, 100.0, 255.0])
    (mean,), (std,) = preprocessing["mean"], preprocessing["std"]
    np.testing.assert_allclose((x - mean) / std, (2 * x / 255 - 1) * 1024)
    assert any("op_threshs" in line for line in loaded.changes)


@pytest.mark.parametrize(
    ("prefix", "classes", "task"),
    [
        ("module.densenet121.", 14, "multilabel"),
        ("module.densenet121.", 3, None),
        ("module.", 14, None),
    ],
)
def test_chexnets_labels(tmp_path, state_dict, prefix, classes, task):
    path = tmp_path / "chexnet.safetensors"
    inputs = state_dict["classifier.weight"].shape[1]
    state_dict["classifier.weight"] = np.ones((classes, inputs), np.float32)
    state_dict["classifier.bias"] = np.ones(classes, np.float32)
    save_file(prefixed(prefix, state_dict), path)
    loaded = load_weights(path)
    assert loaded.description.task == task
    assert any("CheXNet" in s for s in loaded.changes) == (task is not None)


# Values.


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("features.norm5.running_var", np.nan, "NaN or infinite"),
        ("features.norm5.running_var", -1.0, "negative variances"),
        ("features.conv0.weight", np.inf, "NaN or infinite"),
        ("classifier.bias", -np.inf, "NaN or infinite"),
    ],
)
def test_values_that_no_net_computes_with(
    tmp_path, state_dict, name, value, said
):
    path = tmp_path / "bad.safetensors"
    state_dict[name] = state_dict[name].copy()
    state_dict[name].flat[-1] = value
    save_file(state_dict, path)
    refused(path, f"{name} has 1 {said}")


def test_a_bad_value_in_a_head_that_is_replaced(tmp_path, state_dict):
    path = tmp_path / "bad.safetensors"
    state_dict["classifier.bias"] = np.full(3, np.nan, np.float32)
    save_file(state_dict, path)
    load_pretrained(path, num_classes=4)


# Keras.


def test_a_keras_archive(tmp_path):
    path = tmp_path / "net.keras"
    weights = (GOLDEN / "keras.weights.h5").read_bytes()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("metadata.json", "{}")
        file.writestr("config.json", "{}")
        file.writestr("model.weights.h5", weights)
    model, variables = load_pretrained(path)
    expected = load_pretrained(GOLDEN / "keras.weights.h5")
    assert model == expected[0]
    assert_same(variables, expected[1])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(path, "truncated or damaged")


def test_a_compressed_keras_archive(tmp_path):
    path = tmp_path / "net.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.weights.h5", bytes(10_000))
    refused(path, "compressed")


def test_keras_layers_without_names(tmp_path):
    path = tmp_path / "net.weights.h5"
    content = io.BytesIO((GOLDEN / "keras.weights.h5").read_bytes())
    with h5py.File(content, "r+") as file:
        named = []
        file.visititems(lambda _, item: named.append(item))
        for item in named:
            item.attrs.pop("name", None)
    path.write_bytes(content.getvalue())
    loaded = load_weights(path)
    model, variables = load_pretrained(GOLDEN / "keras.weights.h5")
    assert loaded.model == model
    assert_same(loaded.variables, variables)
    assert "recognised by their order" in loaded.changes[0]


@pytest.mark.parametrize(("axes", "said"), [(1, "signals"), (3, "volumes")])
def test_nets_for_other_than_images(tmp_path, state_dict, axes, said):
    path = tmp_path / "net.safetensors"
    kernels = {n: x for n, x in state_dict.items() if x.ndim == 4}
    for name, kernel in kernels.items():
        size = kernel.shape[2:3] * axes
        state_dict[name] = np.ones((*kernel.shape[:2], *size), np.float32)
    save_file(state_dict, path)
    refused(path, f"The net reads {said}")


# What no tensor tells.


@pytest.mark.parametrize(
    ("pool", "overrides", "expected", "said"),
    [
        (True, {}, None, False),
        (False, {}, False, True),
        (False, {"stem_pool": True}, None, False),
    ],
)
def test_a_stem_whose_pool_no_module_names(
    path, state_dict, pool, overrides, expected, said
):
    """As of a net that pools in its code: it may, or may not."""
    modules = ["", "features", "features.conv0", *["features.pool0"] * pool]
    writer.write(path, writer.StateDict(state_dict, modules))
    loaded = load_weights(path, reading=Reading(overrides=overrides))
    assert loaded.model.stem_pool is expected
    assert any("needs stem_pool=True" in s for s in loaded.changes) == said


def test_overrides(tmp_path, variables, state_dict):
    path = tmp_path / "silu.safetensors"
    save_file(state_dict, path)
    model, loaded = load_pretrained(path, overrides={"activation": "silu"})
    assert model == TINY.clone(activation="silu")
    assert_same(loaded, variables)
    refused(path, "has no attribute colour", overrides={"colour": 1})
    refused(path, "activation", overrides={"activation": "red"})
