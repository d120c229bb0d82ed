"""Reading .t7 files of Lua Torch: what is in them, and what must not be run.

The files are written by torch7_files.py from the format's definition; the
logits are torchvision's own, of make_golden_weights.py.
"""

import struct

import jax
import numpy as np
import pytest

from densenet_jax.weights.containers import open_tensors
from densenet_jax.weights.export import to_torch
from densenet_jax.weights.load import load_weights
from densenet_jax.weights.torch7_objects import Module, is_torch7, load
from tests import torch7_files
from tests.mutations import try_mutations
from tests.random_variables import random_variables
from tests.tiny_nets import CIFAR, GOLDEN, TINY, assert_refused, assert_same
from tests.torch7_files import Function, Object, View, write


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.t7"


@pytest.fixture
def net():
    """The net of TINY's random variables."""
    return torch7_files.net(to_torch(random_variables(TINY)), (2, 1))


# The serialisation.


def test_reads_what_was_written(path):
    value = {
        "nothing": None,
        "yes": True,
        "no": False,
        "half": 0.5,
        "list": ["a", {"deep": 3}, -7],
        2: "number",
        "f": Function(b"\x1bLJ bytecode", {"up": 1}),
        "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
        "longs": np.array([2**40]),
    }

    read = load(write(path, value))

    assert read["list"] == {1: "a", 2: {"deep": 3}, 3: -7}
    assert read["f"] is None
    for name in ("nothing", "yes", "no", "half", 2):
        assert read[name] == value[name]
        assert type(read[name]) is type(value[name])
    for name in ("floats", "longs"):
        assert read[name].dtype == value[name].dtype
        np.testing.assert_array_equal(read[name], value[name])


def test_reads_bytes_written_by_hand(path):
    # {x = 1.5}, as File:writeObject says.
    content = struct.pack("<iii", 3, 1, 1)
    content += struct.pack("<ii", 2, 1) + b"x" + struct.pack("<id", 1, 1.5)
    path.write_bytes(content)
    assert is_torch7(content)
    assert load(path) == {"x": 1.5}


def test_values_are_views_of_the_mapped_file(path):
    value = load(write(path, {"a": np.ones(3)}))["a"]
    while not isinstance(value, np.memmap):
        value = value.base
    assert value.filename == path


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Float", "f4"), ("Cuda", "f4"), ("CudaDouble", "f8"), ("CudaHalf", "f2")],
)
def test_views_share_a_storage(path, kind, dtype):
    storage = np.arange(12, dtype=dtype)
    tensors = [
        View(storage, 2, (2, 3), (1, 4), kind),
        View(storage, 11, (1,), (99,), kind),
    ]
    first, last = load(write(path, tensors)).values()
    np.testing.assert_array_equal(first, [[2, 6, 10], [3, 7, 11]])
    np.testing.assert_array_equal(last, [11])
    assert path.stat().st_size < 2 * storage.nbytes + 400


def test_what_is_there_twice_is_one(path):
    table = {"x": 1}
    table["itself"] = table
    read = load(write(path, [table, table, Object("nn.X", table)]))
    assert read[1] is read[2]
    assert read[1]["itself"] is read[1]
    assert read[3] == Module("nn.X", read[1])


# The nets.


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("package", ["nn", "cudnn"])
@pytest.mark.parametrize("model", [TINY, CIFAR])
def test_loads_the_authors_nets(path, model, custom, package):
    variables = random_variables(model)
    net = torch7_files.net(
        to_torch(variables), model.block_layers, custom=custom, package=package
    )

    loaded = load_weights(write(path, net))

    assert_same(loaded.variables, variables)
    assert loaded.model == model
    (change,) = loaded.changes
    data = "ImageNet" if model is TINY else "CIFAR-10"
    assert "taken to be that of the authors' code" in change
    assert data in change
    assert loaded.description.preprocessing["mean"][0] == (
        123.675 if model is TINY else 125.3
    )


@pytest.mark.parametrize("custom", [False, True])
def test_logits_are_torchvisions(path, custom):
    state = {
        name: tensor.read()
        for name, tensor in open_tensors(
            GOLDEN / "torchvision.pth"
        ).tensors.items()
    }
    golden = np.load(GOLDEN / "logits.npz")
    write(path, torch7_files.net(state, (2, 1), custom=custom))

    loaded = load_weights(path)

    logits = jax.jit(loaded.model.apply)(loaded.variables, golden["images"])
    expected = golden["torchvision.pth"]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


def _modules(module, kind):
    """All modules of a kind, with the list that holds each and its place."""
    for i, child in enumerate(module.fields.get("modules", ())):
        if child.name.endswith(f".{kind}"):
            yield module.fields["modules"], i, child.fields
        yield from _modules(child, kind)


def test_a_net_from_2015(path, net):
    # One padding, flat kernels, and the inverse of the deviation.
    for siblings, i, fields in [*_modules(net, "SpatialConvolution")]:
        assert fields.pop("padW") == fields["padH"]
        fields["padding"] = fields.pop("padH")
        weight = fields["weight"]
        fields["weight"] = weight.reshape(len(weight), -1)
        fields["bias"] = np.zeros(len(weight), np.float32)
        siblings[i] = Object("nn.SpatialConvolutionMM", fields)
    for _, _, fields in _modules(net, "SpatialBatchNormalization"):
        std = np.sqrt(fields.pop("running_var") + np.float32(1e-5))
        fields["running_std"] = 1 / std

    variables = load_weights(write(path, net)).variables

    expected = random_variables(TINY)
    assert_same(variables["params"], expected["params"])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
        variables["batch_stats"],
        expected["batch_stats"],
    )


def test_tensors_that_share_one_storage(path, net):
    # As after getParameters(), with the gradients elsewhere.
    flat, at = [], 0
    places = []
    for kind in ("SpatialConvolution", "SpatialBatchNormalization", "Linear"):
        for _, _, fields in _modules(net, kind):
            for leaf in {"weight", "bias"} & fields.keys():
                places.append((fields, leaf, at))
                flat.append(fields[leaf].ravel())
                at += fields[leaf].size
    storage = np.concatenate(flat)
    for fields, leaf, at in places:
        array = np.ascontiguousarray(fields[leaf])
        strides = tuple(s // 4 for s in array.strides)
        fields[leaf] = View(storage, at, array.shape, strides, "Cuda")

    loaded = load_weights(write(path, net))

    assert_same(loaded.variables, random_variables(TINY))


def test_a_net_in_a_checkpoint(path, net):
    write(path, {"epoch": 90, "model": net, "opt": {"lr": 0.1}})
    assert "The net is under the key 'model'." in load_weights(path).remarks
    write(path, {"model": net, "best": net})
    assert_refused(path, "no net, or several: .*'model', 'best'")
    assert_refused(write(path, {"epoch": 90}), "no net, or several: .*'epoch'")


def test_a_net_on_several_gpus(path, net):
    copies = {"modules": [net, Object("nn.Sequential", {"modules": []})]}
    loaded = load_weights(write(path, Object("nn.DataParallelTable", copies)))
    assert_same(loaded.variables, random_variables(TINY))


def test_other_epsilon_and_rounding(path, net):
    for _, _, fields in _modules(net, "SpatialBatchNormalization"):
        fields["eps"] = 1e-3
    for _, _, fields in _modules(net, "SpatialMaxPooling"):
        fields["ceil_mode"] = True
    loaded = load_weights(write(path, net))
    assert loaded.model.norm_epsilon == 1e-3
    assert "rounds its output's size up" in loaded.changes[0]


def _set(kind, at=0, **fields):
    def edit(net):
        [*_modules(net, kind)][at][2].update(fields)

    return edit


def _rename(kind, name, at=0):
    def edit(net):
        siblings, i, fields = [*_modules(net, kind)][at]
        siblings[i] = Object(name, fields)

    return edit


def _remove(kind, at=0):
    def edit(net):
        siblings, i, _ = [*_modules(net, kind)][at]
        del siblings[i]

    return edit


def _newest_first(net):
    _, _, fields = next(_modules(net, "Concat"))
    fields["modules"].reverse()


def _use_twice(net):
    siblings, i, _ = next(_modules(net, "SpatialConvolution"))
    siblings[i + 1] = siblings[i]


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (_set("SpatialConvolution", groups=2), "grouped"),
        (_set("SpatialConvolution", bias=np.ones(8)), "adds a bias"),
        (_set("SpatialConvolution", dW=1, dH=1), "stride 1.*conv0.*stride 2"),
        (_set("SpatialConvolution", dW=1), "no square window"),
        (_set("SpatialConvolution", kW=3.5), "kW.*not a whole number"),
        (_set("SpatialConvolution", weight=None), "has no weight"),
        (_set("SpatialMaxPooling", padW=0, padH=0), "padding 0.*pool0"),
        (_set("Dropout", v2=False), "scales in evaluation"),
        (_set("Concat", dimension=3), "on axis 3"),
        (_set("SpatialBatchNormalization", eps=1e-3), "one epsilon"),
        (_set("SpatialBatchNormalization", eps="x"), "eps is 'x'"),
        (_set("SpatialBatchNormalization", eps=float("nan")), "eps is nan"),
        (_newest_first, "concatenates 'nn.Sequential', 'nn.Identity'"),
        (_use_twice, "used twice"),
        (_remove("ReLU", 1), "is a conv; a DenseNet has here a relu"),
        (_remove("SpatialMaxPooling"), "has here a max_pool"),
        (_remove("SpatialAveragePooling"), "has here a average_pool"),
        (_remove("Concat"), "norm1"),
        (_rename("ReLU", "nn.ELU"), "'nn.ELU', which a DenseNet does not"),
        (_rename("ReLU", "mine.ReLU"), "'mine.ReLU', which a DenseNet"),
    ],
)
def test_what_is_no_densenet_here(path, net, edit, match):
    edit(net)
    assert_refused(write(path, net), match)


def test_averages_that_are_sums(path, net):
    for siblings, i, fields in [*_modules(net, "SpatialAveragePooling")]:
        del fields["divide"]
        siblings[i] = Object("nn.SpatialAveragePooling", fields)
    assert_refused(write(path, net), "sums its window")


# Damage.


def _header(*integers):
    return struct.pack(f"<{len(integers)}i", *integers)


def _tensor(axes, *longs, storage=b""):
    return (
        _header(4, 1, 3)
        + b"V 1"
        + _header(17)
        + b"torch.FloatTensor"
        + _header(axes)
        + struct.pack(f"<{len(longs)}q", *longs)
        + storage
    )


_STORAGE = (
    _header(4, 2, 3)
    + b"V 1"
    + _header(18)
    + b"torch.FloatStorage"
    + struct.pack("<q2f", 2, 1, 2)
)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (_header(3, 1), "8 bytes|4 bytes"),
        (_header(3, 1, 2**31 - 1), "items of 8 bytes where 0 are left"),
        (_header(3, 1, -1), "-1 items"),
        (_header(3, 1, 1, 2, -5), "-5 items"),
        (_header(3, 1, 1, 2, 2**30), "items of 1 bytes where 0"),
        (_header(3, 1, 1, 9, 0, 0), "unknown kind 9"),
        (_header(3, 1, 1, 0, 0), "no net, or several"),
        (b"".join(_header(3, i, 1) for i in range(1, 200)), "100 levels"),
        (_tensor(2**30), "axes"),
        (_tensor(-1), "axes"),
        (_tensor(1, 2, 1, 1, storage=_header(0)), "no net, or several"),
        (_tensor(1, 3, 1, 1, storage=_STORAGE), r"shape \[3\] in a storage"),
        (_tensor(1, 2, 1, 2, storage=_STORAGE), "in a storage of 2"),
        (_tensor(1, 2, 1, 0, storage=_STORAGE), "negative"),
        (_tensor(1, 2, -1, 2, storage=_STORAGE), "negative"),
        (_tensor(1, 2**40, 0, 1, storage=_STORAGE), "in a storage of 2"),
        (_tensor(1, 1, 2**62, 1, storage=_STORAGE), "no net, or several"),
        (_tensor(1, 1, 1, 1, storage=_header(3, 2, 0)), "another type"),
        (_tensor(1, 2, 1, 1, storage=_STORAGE[:-1]), "2 items of 4 bytes"),
        (_tensor(1, 2, 1, 1, storage=_header(4, 1)), "no net, or several"),
        (_header(4, 1, 7) + b"tds.Vec", "'tds.Vec' is stored in a way of its"),
        (_header(4, 1, 4) + b"nn.X" + _header(0), "'nn.X' is stored in a way"),
    ],
)
def test_damage_and_bombs(path, content, match):
    path.write_bytes(content)
    assert_refused(path, match)


def test_too_many_values(path, monkeypatch):
    monkeypatch.setattr("densenet_jax.weights.torch7_objects._MOST_VALUES", 9)
    load(write(path, [1, 2, 3]))
    with pytest.raises(ValueError, match="or 9 values"):
        load(write(path, [1, 2, 3, 4, 5]))


def test_two_fields_of_one_name(path):
    text = _header(2, 1) + b"x" + _header(0)
    path.write_bytes(_header(3, 1, 2) + text + text)
    assert_refused(path, "two fields 'x'")


def test_a_truncated_file(path, net):
    content = write(path, net).read_bytes()
    for end in np.linspace(9, len(content) - 1, 50, dtype=int):
        path.write_bytes(content[:end])
        assert_refused(path, "truncated or damaged")


@pytest.mark.parametrize(
    "count", [100, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_mutated_files(path, net, count):
    content = write(path, net).read_bytes()
    counts = try_mutations(path, content, count)
    assert min(counts.values()) > count / 20, counts


def test_text_is_not_read(path):
    path.write_bytes(b"4\n1\n3\nV 1\n13\nnn.Sequential\n")
    assert_refused(path, "begins with")
