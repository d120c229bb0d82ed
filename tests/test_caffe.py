"""Reading .caffemodel files: what is in them, and damage.

The files are written by Google's protobuf (caffe_files.py); the logits are
torchvision's own, of make_golden_weights.py.
"""

import jax
import numpy as np
import pytest

from densenet_jax.models.densenet import DenseNet
from densenet_jax.weights.caffe import is_caffe
from densenet_jax.weights.containers import open_tensors
from densenet_jax.weights.export import to_torch
from densenet_jax.weights.load import load_weights
from tests.mutations import try_mutations
from tests.random_variables import random_variables

pytest.importorskip("google.protobuf", reason="writes the files")

from tests import caffe_files
from tests.caffe_files import NetParameter, add_blob, write
from tests.tiny_nets import CIFAR, GOLDEN, TINY, assert_refused, assert_same


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.caffemodel"


@pytest.fixture
def net():
    """The net of TINY's random variables."""
    return caffe_files.net(to_torch(random_variables(TINY)), (2, 1))


def layer_named(net, name):
    return next(layer for layer in net.layer if layer.name == name)


# The nets.


@pytest.mark.parametrize("blob", [{}, {"shape": False}, {"double": True}])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("model", [TINY, CIFAR])
def test_loads_the_known_nets(path, model, linear, blob):
    variables = random_variables(model)
    state = to_torch(variables)
    # A power of two divides exactly.
    net = caffe_files.net(
        state, model.block_layers, linear=linear, factor=4, **blob
    )

    loaded = load_weights(write(path, net))

    assert_same(loaded.variables, variables)
    assert loaded.model == model
    text = " ".join(loaded.changes)
    assert ("blue, green, red" in text) == (model is TINY)
    assert ("shicai/DenseNet-Caffe" in text) == (model is TINY)
    preprocessing = loaded.description.preprocessing
    if model is TINY:
        assert preprocessing["mean"] == (123.68, 116.78, 103.94)
        assert preprocessing["std"] == (1 / 0.017,) * 3
    else:
        assert preprocessing is None


def test_logits_are_torchvisions(path):
    state = {
        name: tensor.read()
        for name, tensor in open_tensors(
            GOLDEN / "torchvision.pth"
        ).tensors.items()
    }
    golden = np.load(GOLDEN / "logits.npz")
    write(path, caffe_files.net(state, (2, 1), factor=999.98))

    loaded = load_weights(path)

    logits = jax.jit(loaded.model.apply)(loaded.variables, golden["images"])
    expected = golden["torchvision.pth"]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


def test_statistics_are_divided_by_their_weight(path):
    variables = random_variables(TINY)
    net = caffe_files.net(to_torch(variables), (2, 1), factor=7.3)

    loaded = load_weights(write(path, net)).variables

    # As Caffe does, in float32: the stored sums times the inverse.
    jax.tree.map(
        lambda ours, x: np.testing.assert_array_equal(
            ours, x * np.float32(7.3) * (1 / np.float32(7.3))
        ),
        loaded["batch_stats"],
        variables["batch_stats"],
    )


def test_splits_and_sources_and_losses(path, net):
    """A snapshot of training: Caffe adds a Split where two layers read."""
    layers = [*net.layer]
    del net.layer[:]
    source = net.layer.add(name="data", type="ImageData", top=["data", "label"])
    source.transform_param.scale = 0.5
    source.transform_param.mean_value.extend([1, 2, 3])
    source.transform_param.crop_size = 192
    features = None
    for layer in layers:
        if features and layer.type == "Concat":
            layer.bottom[0] = f"{features}_split_1"
        elif features and layer.bottom[0] == features:
            layer.bottom[0] = f"{features}_split_0"
        net.layer.append(layer)
        if layer.type in ("Concat", "Pooling"):
            features = layer.top[0]
            net.layer.add(
                name=f"{features}_split",
                type="Split",
                bottom=[features],
                top=[f"{features}_split_0", f"{features}_split_1"],
            )
    net.layer.add(
        name="loss",
        type="SigmoidCrossEntropyLoss",
        bottom=["fc6", "label"],
        top=["loss"],
    )

    loaded = load_weights(write(path, net))

    assert_same(loaded.variables, random_variables(TINY))
    assert loaded.description.task == "multilabel"
    assert loaded.description.preprocessing == {
        "mean": (3, 2, 1),
        "std": (2, 2, 2),
        "image_size": 192,
        "resize_size": None,
    }


def test_concatenations_of_everything(path):
    """Each concatenates the input and all outputs of its block, one by one."""
    model = DenseNet(
        block_layers=(3, 2), growth_rate=4, bottleneck_width=2, num_classes=3
    )
    net = caffe_files.net(to_torch(random_variables(model)), (3, 2))
    made_of = {}
    for layer in net.layer:
        if layer.type == "Concat":
            features, new = layer.bottom
            layer.bottom[:] = [*made_of.get(features, [features]), new]
            made_of[layer.top[0]] = [*layer.bottom]
    assert len(layer_named(net, "concat_2_3").bottom) == 4

    loaded = load_weights(write(path, net))

    assert_same(loaded.variables, random_variables(model))
    bottoms = layer_named(net, "concat_2_3").bottom
    bottoms[1], bottoms[2] = bottoms[2], bottoms[1]
    assert_refused(write(path, net), "oldest features first")


def test_an_image_of_means_is_not_there(path, net):
    source = net.layer.add(name="data", type="Data", top=["data"])
    source.transform_param.mean_file = "mean.binaryproto"
    loaded = load_weights(write(path, net))
    assert loaded.description.preprocessing is None
    assert "'mean.binaryproto', which is not in the file" in loaded.changes[-1]


def test_a_file_without_what_the_layers_do(path, net):
    kept = [layer for layer in net.layer if layer.blobs]
    bare = NetParameter()
    for layer in kept:
        bare.layer.add(name=layer.name, type=layer.type, blobs=layer.blobs)

    loaded = load_weights(write(path, bare))

    assert_same(loaded.variables, random_variables(TINY))
    text = " ".join(loaded.changes)
    assert "no pools, ReLUs and concatenations" in text
    assert "does not say what its layers read" in text


@pytest.mark.parametrize("value", [None, False, True])
def test_rounding_of_the_first_pool(path, net, value):
    # ceil_mode false, or round_mode FLOOR, which is 1: both are written alike.
    (pool,) = (x for x in net.layer if x.name == "pool1")
    pool.pooling_param.ClearField("ceil_mode")
    if value is not None:
        pool.pooling_param.ceil_mode = value
    changes = " ".join(load_weights(write(path, net)).changes)
    assert ("pool1 rounds its output's size up" in changes) == (value is None)


def test_other_epsilon(path, net):
    for layer in net.layer:
        if layer.type == "BatchNorm":
            layer.batch_norm_param.eps = 1e-3
    assert load_weights(write(path, net)).model.norm_epsilon == 1e-3


def _set(layer, **parameters):
    def edit(net):
        for path, value in parameters.items():
            target, _, field = path.partition("__")
            found = getattr(layer_named(net, layer), target)
            if field and isinstance(value, list):
                del getattr(found, field)[:]
                getattr(found, field).extend(value)
            elif field:
                setattr(found, field, value)
            else:
                setattr(layer_named(net, layer), target, value)

    return edit


def _bottoms(layer, *names):
    def edit(net):
        layer_named(net, layer).bottom[:] = names

    return edit


def _drop(layer):
    def edit(net):
        net.layer.remove(layer_named(net, layer))

    return edit


def _bias(net):
    add_blob(layer_named(net, "conv2_1/x1"), np.ones(8))


def _third_blob(value):
    def edit(net):
        layer_named(net, "conv1/bn").blobs[2].data[:] = value

    return edit


def _in_place(net):
    """The first norm of a block overwrites what is concatenated after it."""
    for layer in net.layer:
        for names in (layer.bottom, layer.top):
            for i, name in enumerate(names):
                if name == "conv2_1/x1/bn":
                    names[i] = "pool1"


def _first_version(net):
    del net.layer[:]
    net.layers.add(name="conv1")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (_set("conv1", convolution_param__group=2), "grouped or dilated"),
        (_set("conv1", convolution_param__dilation=[2]), "grouped or dilated"),
        (_set("conv1", convolution_param__stride=[1]), "stride 1.*conv0"),
        (
            _set("conv1", convolution_param__stride=[2, 1]),
            r"stride is \[1, 2\]",
        ),
        (_set("conv1", convolution_param__pad_h=2), "pad is"),
        (_set("pool1", pooling_param__pad=0), "padding 0.*pool0"),
        (_set("pool1", pooling_param__pool=2), "pools in a way"),
        (_set("pool1", pooling_param__global_pooling=True), "whole map"),
        (_set("pool2", pooling_param__pool=0), "has here a average_pool"),
        (_set("relu1", relu_param__negative_slope=0.1), "negative_slope"),
        (_set("concat_2_1", concat_param__axis=2), "concatenate channels"),
        (_set("conv1/bn", batch_norm_param__eps=1e-3), "one epsilon"),
        (_set("relu1", type="PReLU"), "'PReLU', which a DenseNet does not"),
        (_set("conv1", name="a\nb"), r"name 'a\\nb'"),
        (_set("conv1", name="fc6"), "have one name"),
        (
            _bottoms("concat_2_1", "conv2_1/x2", "pool1"),
            "oldest features first",
        ),
        (_bottoms("conv2_2/x1/bn", "conv2_1/x2"), "reads conv2_1/x2"),
        (_bottoms("concat_2_2", "pool1", "conv2_2/x2"), "reads pool1"),
        (_bottoms("conv2_1/x1"), "reads or makes nothing"),
        (_in_place, "has overwritten"),
        (_drop("relu1"), "has here a relu"),
        (_drop("conv2_1/x1/scale"), "without a Scale"),
        (_drop("conv2_1/x1/bn"), "no norm is before it|reads"),
        (_bias, "adds a bias"),
        (_third_blob([0]), "third blob"),
        (_third_blob([1, 1]), r"blob of shape \[1\] with 2 values"),
        (_first_version, "Caffe's first version"),
    ],
)
def test_what_is_no_densenet_here(path, net, edit, match):
    edit(net)
    assert_refused(write(path, net), match)


# Damage.


def test_how_a_file_begins(net):
    content = net.SerializeToString()
    assert is_caffe(content[:16], "model.caffemodel")
    assert not is_caffe(content[:16], "model.bin")
    net.ClearField("name")
    net.ClearField("input")
    net.ClearField("input_dim")
    assert is_caffe(net.SerializeToString()[:16], "model.bin")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\xa2\x06\x7f", "field 100 ends beyond its message"),
        (b"\xa2\x06" + b"\xff" * 9 + b"\x01", "ends beyond"),
        (b"\xa2\x06" + b"\xff" * 12, "a number without an end"),
        (b"\xa2\x06\x02\x0a\x05", "field 1 ends beyond"),
        (b"\xa2\x06\x01\x0b", "a number without an end|unknown kind 3"),
        (b"\xa2\x06\x02\x0b\x00", "unknown kind 3"),
        (b"\xa2\x06\x02\x02\x00", "field 0 ends"),
        (b"\xa2\x06\x02\x08\x01", "field 1 has no length"),
        (b"\xa2\x06\x00", "The layer '' is a ''"),
        (b"\x1a\x01a", "holds no layers"),
    ],
)
def test_damage(path, content, match):
    path.write_bytes(content)
    assert_refused(path, match)


def _with_blob(**fields):
    net = NetParameter()
    layer = net.layer.add(name="conv1", type="Convolution")
    dims = fields.pop("dims", None)
    blob = layer.blobs.add(**fields)
    if dims is not None:
        blob.shape.dim.extend(dims)
    return net


@pytest.mark.parametrize(
    "fields",
    [
        {"dims": [2, 2], "data": [1, 2, 3]},
        {"dims": [2**40, 2**40], "data": [1]},
        {"dims": [-1, -1], "data": [1]},
        {"dims": [1] * 9, "data": [1]},
        {"num": 2, "data": [1]},
        {"dims": [1]},
        {"dims": [0, 2**62], "data": []},
    ],
)
def test_blobs_that_contradict_themselves(path, fields):
    assert_refused(
        write(path, _with_blob(**fields)), "damaged: a blob of shape"
    )


def test_too_many_layers(path):
    path.write_bytes(b"\xa2\x06\x00" * 10_001)
    assert_refused(path, "10,001 layers")


def test_too_many_fields(path, net, monkeypatch):
    monkeypatch.setattr("densenet_jax.weights.protobuf._MOST_FIELDS", 50)
    assert_refused(write(path, net), "more than 50 fields")


def test_a_truncated_file(path, net):
    content = write(path, net).read_bytes()
    for end in np.linspace(1, len(content) - 1, 50, dtype=int):
        path.write_bytes(content[:end])
        # It may end between two layers.
        assert_refused(path, "truncated or damaged|The file ends")


@pytest.mark.parametrize(
    "count", [100, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_mutated_files(path, net, count):
    content = write(path, net).read_bytes()
    counts = try_mutations(path, content, count)
    assert min(counts.values()) > count / 20, counts
