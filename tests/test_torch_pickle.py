"""Reading torch's files: what is in them, and what must not be run."""

import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from densenet_jax.weights import torch_files
from densenet_jax.weights.containers import open_tensors
from tests import torch_writer as writer
from tests.torch_writer import Items, Raw, call, write, write_legacy


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def refused(path, match):
    with pytest.raises(ValueError, match=match) as error:
        open_tensors(path)
    return str(error.value)


def test_reads_what_was_written(path):
    tree = {
        "epoch": 300,
        "lr": 0.1,
        "flags": [True, False, None],
        "state_dict": {
            "a": np.arange(6, dtype=np.float32).reshape(2, 3),
            "b": np.array(2.0),
            "c": np.arange(4).astype(np.float16),
            "d": np.arange(4).astype(ml_dtypes.bfloat16),
            "e": np.arange(3),
        },
    }
    read, remarks = torch_files.load_zip(write(path, tree))
    assert remarks == []
    assert read.keys() == tree.keys()
    assert read["epoch"] == 300
    assert read["lr"] == 0.1
    assert read["flags"] == [True, False, None]
    for name, value in tree["state_dict"].items():
        tensor = read["state_dict"][name]
        assert tensor.dtype == value.dtype
        np.testing.assert_array_equal(tensor.read(), value)


def test_values_are_views_of_the_mapped_file(path):
    tree, _ = torch_files.load_zip(write(path, {"a": np.ones(3)}))
    value = tree["a"].read()
    while not isinstance(value, np.memmap):
        value = value.base
    assert value.filename == path


def test_views_share_a_storage(path):
    storage, storages = np.arange(12, dtype=np.float32), []
    tree = {"a": writer.tensor(storage, 2, (2, 3), (1, 4), storages)}

    def add_storage(entries):
        entries["data/0"] = storage.tobytes()

    read, _ = torch_files.load_zip(write(path, tree, edit=add_storage))
    np.testing.assert_array_equal(read["a"].read(), [[2, 6, 10], [3, 7, 11]])


EVIL = {
    "posix.system": call("posix", "system", "touch ran"),
    "os.system": call("os", "system", "touch ran"),
    "builtins.eval": call(
        "builtins", "eval", "__import__('pathlib').Path('ran').touch()"
    ),
    "__builtin__.exec": call("__builtin__", "exec", "import os"),
    "builtins.getattr": call(
        "builtins", "getattr", call("os", "system"), "__call__"
    ),
    "torch.load": call("torch", "load", "other.pth"),
    "torchvision.models.densenet.DenseNet": call(
        "torchvision.models.densenet", "DenseNet"
    ),
    "numpy._core.multiarray.scalar": call(
        "numpy._core.multiarray", "scalar", 1
    ),
    # A tensor of a tensor of a call.
    "os.popen": call(
        "torch._utils",
        "_rebuild_parameter",
        call("torch._utils", "_rebuild_parameter", call("os", "popen", "id")),
    ),
    # The name is put together on the stack.
    "nt.system": Raw(
        b"X\x02\x00\x00\x00ntX\x06\x00\x00\x00system\x93"
        b"X\x02\x00\x00\x00id\x85R"
    ),
}


@pytest.mark.parametrize("name", EVIL)
def test_runs_no_code_and_names_it(path, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(path, {"m.weight": np.ones(2), "evil": EVIL[name]})
    file = open_tensors(path)
    assert list(file.tensors) == ["m.weight"]
    assert f"No tensors, left out: evil ({name})." in file.remarks
    assert f"Objects in the file were not built: {name}." in file.remarks
    assert not (tmp_path / "ran").exists()


def test_what_is_called_may_be_called_again(path, tmp_path, monkeypatch):
    """getattr(__import__('os'), 'system')('...'), in pickle's terms."""
    monkeypatch.chdir(tmp_path)
    system = call("builtins", "getattr", call("builtins", "__import__", "os"))
    write(path, {"m.weight": np.ones(2), "evil": Raw(system + b")R")})
    assert "builtins.getattr" in open_tensors(path).remarks[-1]


def test_the_evil_files_are_evil(tmp_path, monkeypatch):
    """Python's own unpickler does run them."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + EVIL["builtins.eval"] + b".")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("instructions", "match"),
    [
        # Protocol 0, its way of calling, extension registry.
        (b"(S'ls'\nios\nsystem\n", "instruction STRING"),
        (b"(ios\nsystem\n", "instruction INST"),
        (b"\x82\x01", "instruction EXT1"),
        # A call of what is no function.
        (b"N)R", "not a function"),
        # Keys whose hashes would take for ever.
        (b"})\x85\x85Ns", "tuple of tuples as a key"),
        # What holds no items.
        (b"NNNs", "damaged"),
        (b"N(Ne", "damaged"),
        # A memo place or a mark that is not there.
        (b"h\x07", "damaged"),
        (b"t", "damaged"),
        # A string that claims to be longer than the file.
        (b"X\xff\xff\xff\x7fa", "expected 2147483647 bytes"),
    ],
)
def test_refuses_other_instructions(path, instructions, match):
    refused(write(path, {"a": Raw(instructions)}), match)


def test_a_key_twice(path):
    write(path, Items([("a", np.ones(2)), ("a", np.zeros(2))]))
    refused(path, "'a' is in the file twice")


def test_an_entry_twice(path):
    write(path, {"a": np.ones(2)})
    with (
        zipfile.ZipFile(path, "a") as file,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        file.writestr("archive/data/0", bytes(16))
    refused(path, "two entries of one name")


def test_a_truncated_zip(path):
    content = write(path, {"a": np.ones(100)}).read_bytes()
    for size in (len(content) - 1, len(content) // 2, 40):
        path.write_bytes(content[:size])
        refused(path, "truncated or damaged")


def test_a_zip_bomb(path):
    tree = {"a": np.zeros(1_000_000)}
    write(path, tree, compress=["data/0"])
    assert path.stat().st_size < 20_000
    refused(path, r"data/0' is compressed \(\d+ bytes that claim to be 8000000")
    write(path, tree, compress=["data.pkl"])
    refused(path, "data.pkl' is compressed")


def test_an_encrypted_entry(path):
    content = bytearray(write(path, {"a": np.ones(2)}).read_bytes())
    with zipfile.ZipFile(path) as file:
        start = file.start_dir
    # The flags of each entry of the zip file's directory: bit 0, encrypted.
    while (start := content.find(b"PK\x01\x02", start)) >= 0:
        if b"data/0" in content[start : start + 46 + 16]:
            content[start + 8] |= 1
        start += 4
    path.write_bytes(content)
    refused(path, "Entry 'archive/data/0' is encrypted")


def test_a_bomb_of_strides(path):
    storage, storages = np.ones(1, np.float32), []
    big = writer.tensor(storage, 0, (2**30, 2**20), (0, 0), storages)

    def add_storage(entries):
        entries["data/0"] = storage.tobytes()

    write(path, {"a": big}, edit=add_storage)
    refused(path, "does not fit into its storage of 1 values")


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "match"),
    [
        (0, (5,), (1,), "does not fit"),
        (2, (3,), (1,), "does not fit"),
        (0, (2, 2), (4, 1), "does not fit"),
        (-1, (2,), (1,), "negative"),
        (0, (2,), (-1,), "negative"),
        (0, (2, 2), (1,), "shorter|longer"),
    ],
)
def test_a_tensor_outside_its_storage(path, offset, shape, strides, match):
    storage = np.ones(4, np.float32)
    tree = {"a": writer.tensor(storage, offset, shape, strides, [])}

    def add_storage(entries):
        entries["data/0"] = storage.tobytes()

    refused(write(path, tree, edit=add_storage), match)


def test_a_tensor_as_storage(path):
    """Its values do not lie next to each other, so bounds would be wrong."""
    inner = writer.tensor(np.ones(4, np.float32), 0, (2,), (3,), [])
    outer = call("torch._utils", "_rebuild_tensor_v2", inner, 0, (2,), (1,))

    def add_storage(entries):
        entries["data/0"] = np.ones(4, np.float32).tobytes()

    refused(write(path, {"a": outer}, edit=add_storage), "made of a storage")


def test_a_storage_of_another_size(path):
    def shorten(entries):
        entries["data/0"] = entries["data/0"][:-4]

    write(path, {"a": np.ones(4, np.float32)}, edit=shorten)
    refused(path, "has 12 bytes, but 4 values of float32 were declared")


def test_a_storage_that_is_missing(path):
    write(path, {"a": np.ones(4)}, edit=lambda entries: entries.pop("data/0"))
    refused(path, "no entry 'archive/data/0'")


def test_big_endian(path):
    def swap(entries):
        entries["byteorder"] = b"big"

    refused(write(path, {"a": np.ones(4)}, edit=swap), "byte order is b'big'")


def test_torchscript(path):
    def add_constants(entries):
        entries["constants.pkl"] = b""

    write(path, {"a": np.ones(4)}, edit=add_constants)
    refused(path, r"torch.jit.load\(OLD\)")


def test_another_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "{}")
    refused(path, "not written by torch.save")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid ", "LFS pointer"),
        (b"\n <!DOCTYPE html>", "web page"),
        (b"<?xml version='1.0'?><Error/>", "XML"),
        (b"\x1f\x8b" + bytes(40), r"compressed \(gzip\)"),
        (b"\x28\xb5\x2f\xfd" + bytes(40), r"compressed \(zstd\)"),
        (bytes(257) + b"ustar" + bytes(300), "tar archive"),
        (pickle.dumps({"a": 1}), "pickle, and none of torch.save"),
        (b"\x89PNG\r\n" + bytes(100), "neither a file of torch.save, nor"),
    ],
)
def test_other_files(path, content, said):
    path.write_bytes(content)
    refused(path, said)


def test_a_pipe(path):
    os.mkfifo(path)
    refused(path, "a pipe or a device")


def test_a_home_directory(path, monkeypatch):
    write(path, {"a.weight": np.ones(2)})
    monkeypatch.setenv("HOME", str(path.parent))
    assert list(open_tensors("~/weights.pth").tensors) == ["a.weight"]


def test_no_state_dict(path):
    refused(write(path, [1, 2]), "holds a list")
    refused(write(path, {}), "the dict is empty")
    refused(write(path, {"epoch": 3, "lr": 0.1}), r"epoch \(int\)")


def test_a_bit_flipped(path):
    write(path, {"a.weight": np.ones(100)})
    content = bytearray(path.read_bytes())
    content[content.index(np.ones(100).tobytes()) + 6] ^= 1
    path.write_bytes(content)
    (tensor,) = open_tensors(path).tensors.values()
    with pytest.raises(ValueError, match="data/0' is damaged: its checksum"):
        tensor.read()


def test_checksums_that_are_switched_off(path):
    """As torch.serialization.set_crc32_options(False) leaves them."""
    write(path, {"a.weight": np.ones(100)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        start = file.start_dir
    while (start := content.find(b"PK\x01\x02", start)) >= 0:
        content[start + 16 : start + 20] = bytes(4)
        start += 4
    path.write_bytes(content)
    file = open_tensors(path)
    assert "The file has no checksums." in file.remarks
    assert (file.tensors["a.weight"].read() == 1).all()


def test_numbers_beyond_any_size(path):
    """Python's integers have no bound: products of such are slow."""
    huge = writer.Raw(b"\x8a\xff" + b"\x7f" * 255)
    storage = np.ones(4, np.float32)
    tree = {"a": writer.tensor(storage, 0, (huge,), (1,), [])}

    def add_storage(entries):
        entries["data/0"] = storage.tobytes()

    refused(
        write(path, tree, edit=add_storage),
        "too large for the size of a tensor",
    )
    tree = {"a": writer.tensor(storage, 0, (1,) * 9, (1,) * 9, [])}
    refused(write(path, tree, edit=add_storage), "has 9 axes")


# The format from before PyTorch 1.6; files that PyTorch wrote in it are read
# in test_load.py.


def test_the_old_format(path):
    tree = {"m.weight": np.arange(6.0).reshape(2, 3), "epoch": 3}
    write_legacy(path, tree)
    read, _ = torch_files.load_legacy(path)
    assert read["epoch"] == 3
    np.testing.assert_array_equal(read["m.weight"].read(), tree["m.weight"])


def test_a_view_in_the_old_format(path):
    """Its offset counts from that of the view."""
    storage = np.arange(12, dtype=np.float32)
    view = ("0_view", 4, 6)
    tree = {"a": writer.tensor(storage, 1, (2, 2), (2, 1), [], view)}
    write_legacy(path, tree, storages=[storage])
    read, _ = torch_files.load_legacy(path)
    np.testing.assert_array_equal(read["a"].read(), [[5, 6], [7, 8]])
    for view in (("v", 4, 4), ("v", 8, 6), ("v", -1, 6)):
        tree = {"a": writer.tensor(storage, 1, (2, 2), (2, 1), [], view)}
        write_legacy(path, tree, storages=[storage])
        refused(path, "outside its storage|does not fit")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keys": ["0"]}, "storages are not those"),
        ({"keys": ["0", "0"]}, "storages are not those"),
        ({"keys": ["0", "1", "2"]}, "storages are not those"),
        ({"keys": [0, 1]}, "storages are not those"),
        ({"counts": {"1": 5}}, "has 5 values, but 4 were declared"),
        ({"counts": {"1": -4}}, "has -4 values, but 4 were declared"),
        ({"more": b"\0"}, "1 bytes follow its last storage"),
    ],
)
def test_an_old_file_that_contradicts_itself(path, wrong, said):
    tree = {"a.weight": np.ones(3), "b.weight": np.ones(4)}
    write_legacy(path, tree)
    assert len(open_tensors(path).tensors) == 2
    write_legacy(path, tree, **wrong)
    refused(path, said)


def test_a_truncated_old_file(path):
    write_legacy(path, {"a.weight": np.ones(3)})
    content = path.read_bytes()
    for size in range(len(torch_files.LEGACY_MAGIC) + 1, len(content)):
        path.write_bytes(content[:size])
        refused(path, "truncated|damaged")


def test_code_in_an_old_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {"m.weight": np.ones(2), "evil": EVIL["builtins.eval"]}
    write_legacy(path, tree)
    assert "evil (builtins.eval)" in " ".join(open_tensors(path).remarks)
    assert not (tmp_path / "ran").exists()
