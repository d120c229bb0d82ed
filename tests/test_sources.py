import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import digits
from densenet_jax.data.examples import NotPreparedError
from densenet_jax.data.images import BadRecordError
from densenet_jax.data.sources import open_source
from densenet_jax.training import experiment, loop
from tests.tiny_tfds import write_tiny_tfds


def test_digits_split_without_overlap():
    train, test = (open_source("digits", s) for s in ("train", "test"))
    assert (len(train.examples), len(test.examples)) == (1437, 360)
    assert train.image_shape == test.image_shape == (8, 8, 1)
    assert train.num_classes == 10
    seen = {e["image"].tobytes() for e in train.examples}
    assert not seen & {e["image"].tobytes() for e in test.examples}
    example = test.examples[0]
    assert example["image"].dtype == np.uint8
    assert example["label"] == 0


def test_reads_tfds_by_index(tmp_path):
    images, labels = write_tiny_tfds(tmp_path)
    source = open_source("cifar10", "train", str(tmp_path))
    assert (source.num_classes, source.image_shape) == (10, (32, 32, 3))
    assert len(source.examples) == len(images)
    for i in (2, 0):
        example = source.examples[i]
        np.testing.assert_array_equal(example["image"].decode(), images[i])
        assert example["label"] == labels[i]


def test_unknown_name_is_told_its_neighbours():
    with pytest.raises(ValueError, match=r"no data set 'cifra10'.*cifar10"):
        open_source("cifra10", "train")


def test_unprepared_data_set_is_told_the_command(tmp_path):
    with pytest.raises(ValueError, match="tfds build cifar10 --file_format=ar"):
        open_source("cifar10", "train", str(tmp_path))


def test_format_without_index_is_told_the_command(tmp_path):
    write_tiny_tfds(tmp_path)
    _set_format(tmp_path, {"fileFormat": "tfrecord"})
    with pytest.raises(ValueError, match=r"tfrecord, .*convert_format"):
        open_source("cifar10", "train", str(tmp_path))


def test_converted_copy_is_read(tmp_path):
    images, _ = write_tiny_tfds(tmp_path)
    _set_format(
        tmp_path,
        {
            "fileFormat": "tfrecord",
            "alternativeFileFormats": ["array_record"],
        },
    )
    source = open_source("cifar10", "train", str(tmp_path))
    image = source.examples[1]["image"]
    np.testing.assert_array_equal(image.decode(), images[1])


def _set_format(data_dir, formats):
    path = data_dir / "cifar10" / "3.0.2" / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | formats))


@pytest.mark.parametrize(
    ("split", "count"), [("train+test", 10), ("train[1:3]", 2), ("all", 10)]
)
def test_splits_in_tfds_notation(split, count, tmp_path):
    write_tiny_tfds(tmp_path)
    source = open_source("cifar10", split, str(tmp_path))
    assert len(source.examples) == count


def test_empty_split(tmp_path):
    write_tiny_tfds(tmp_path)
    with pytest.raises(ValueError, match="or no examples in it"):
        open_source("cifar10", "train[0:0]", str(tmp_path))


def test_version_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"cifar10:9\.9\.9"):
        open_source("cifar10:9.9.9", "train", str(tmp_path))


def test_what_is_known_of_data_that_is_not_prepared(tmp_path):
    with pytest.raises(NotPreparedError, match="tfds build cifar100") as raised:
        open_source("cifar100", "train", str(tmp_path))
    assert raised.value.source.num_classes == 100
    assert raised.value.source.image_shape == (32, 32, 3)


@pytest.mark.skipif(
    "TFDS_DATA_DIR" not in os.environ,
    reason="needs CIFAR-10 in TFDS_DATA_DIR",
)
def test_real_cifar10():
    source = open_source("cifar10", "test")
    assert len(source.examples) == 10_000
    example = source.examples[0]
    assert example["image"].decode().shape == (32, 32, 3)
    # Known of this data set: each class has a thousand test images.
    labels = [source.examples[i]["label"] for i in range(0, 10_000, 10)]
    assert 70 < min(np.bincount(labels)) <= max(np.bincount(labels)) < 130


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_unknown_split(name, tmp_path):
    write_tiny_tfds(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'trian'.*train"):
        open_source(name, "trian", str(tmp_path))


# Folders of image files


def _folder(root, classes=("cat", "dog"), splits=("train", "val")):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (9, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def _open_folder(root, split="train", **options):
    return open_source("folder", split, str(root), **options)


def test_folder(tmp_path):
    source = _open_folder(_folder(tmp_path))
    assert (source.num_classes, source.class_names) == (2, ("cat", "dog"))
    assert source.image_shape == (None, None, 3)
    examples = [source.examples[i] for i in range(len(source.examples))]
    assert [e["label"] for e in examples] == [0, 0, 1, 1]
    file = tmp_path / "train" / "dog" / "0.png"
    with Image.open(file) as expected:
        np.testing.assert_array_equal(examples[2]["image"].decode(), expected)


def test_folder_that_is_not_as_expected(tmp_path):
    with pytest.raises(ValueError, match=r"needs dataset\.data_dir"):
        open_source("folder", "train")
    with pytest.raises(ValueError, match="has no directory 'test', but: train"):
        _open_folder(_folder(tmp_path), "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image files"):
        _open_folder(tmp_path, "empty")


def test_class_without_images(tmp_path):
    root = _folder(tmp_path)
    for file in (root / "train" / "cat").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"cat holds no image.*on_error='skip"):
        _open_folder(root)
    source = _open_folder(root, on_error="skip")
    assert source.remarks == (f"{root / 'train' / 'cat'} holds no image file.",)
    # The labels stay those of the other split.
    assert [source.examples[i]["label"] for i in range(2)] == [1, 1]
    assert _open_folder(root, "val").class_names == source.class_names


def _labels(source):
    return [example["label"] for example in source.examples]


def test_classes_are_those_of_the_splits_in_use(tmp_path):
    """Not of a nested copy, a run's directory or what macOS packs."""
    root = _folder(tmp_path)
    _folder(root / "copy")
    _folder(root / "__MACOSX", classes=("cat", "shade"))
    _folder(root, classes=("__MACOSX", ".ipynb_checkpoints"))
    _folder(root, classes=("cat", "bird"), splits=("extra",))
    (root / "runs" / "a" / "checkpoints").mkdir(parents=True)
    for split in "train", "val":
        source = _open_folder(root, split, splits=("train", "val"))
        assert source.class_names == ("cat", "dog")
        assert _labels(source) == [0, 0, 1, 1]
    # One split alone has its own.
    assert _open_folder(root, "extra").class_names == ("bird", "cat")


def test_a_class_that_one_split_lacks(tmp_path):
    root = _folder(tmp_path)
    _folder(root, classes=("cow",), splits=("train",))
    _folder(root, classes=("ant",), splits=("val",))
    splits = ("train", "val")
    missing = {
        "train": f"{root}/train has no folder 'ant', a class of {root}/val.",
        "val": f"{root}/val has no folder 'cow', a class of {root}/train.",
    }
    labels = {"train": [1, 1, 2, 2, 3, 3], "val": [0, 0, 1, 1, 3, 3]}
    for split in splits:
        with pytest.raises(ValueError, match=f"^{re.escape(missing[split])}"):
            _open_folder(root, split, splits=splits)
        source = _open_folder(root, split, splits=splits, on_error="skip")
        assert source.remarks == (missing[split],)
        assert source.class_names == ("ant", "cat", "cow", "dog")
        assert _labels(source) == labels[split]
        assert _open_folder(root, split).num_classes == 3
    # A split that is not there is missed when it is opened itself.
    assert _open_folder(root, splits=("train", "test")).num_classes == 3


def test_an_error_names_the_first_of_many(tmp_path):
    root = _folder(tmp_path)
    _folder(root, [f"{i:03}" for i in range(99)], splits=("val",))
    with pytest.raises(ValueError, match=r"'004', a .* 94 more") as raised:
        _open_folder(root, splits=("train", "val"))
    assert "'005'" not in str(raised.value)


def test_a_config_opens_its_splits_with_the_same_classes(tmp_path):
    config = digits.get_config()
    root = _folder(tmp_path)
    changes = {"name": "folder", "data_dir": str(root), "test_split": "val"}
    config.dataset.update(changes)
    train, test = experiment.open_sources(config)
    assert train.class_names == test.class_names == ("cat", "dog")
    _folder(root, classes=("cow",), splits=("train",))
    with pytest.raises(ValueError, match="val has no folder 'cow'"):
        experiment.open_sources(config)
    config.dataset.on_error = "skip"
    _, test = experiment.open_sources(config)
    assert _labels(test) == [0, 0, 2, 2]


def _link(source, target):
    source.symlink_to(target)


def test_training_says_what_is_wrong_with_either_split(
    tmp_path, monkeypatch, capsys
):
    _folder(tmp_path)
    _folder(tmp_path, classes=("cow",), splits=("train",))
    _folder(tmp_path, classes=("ant",), splits=("val",))
    config = digits.get_config()
    config.batch_size = 8
    config.preprocessing.image_size = 8
    config.dataset.update(
        name="folder",
        data_dir=str(tmp_path),
        test_split="val",
        on_error="skip",
    )

    def stop(_):
        raise InterruptedError

    monkeypatch.setattr(loop.directory, "prepare", stop)
    with pytest.raises(InterruptedError):
        loop.train_and_evaluate(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "train has no folder 'ant'" in said
    assert "val has no folder 'cow'" in said


def test_links_are_followed_as_by_torchvision(tmp_path):
    root = _folder(tmp_path / "data")
    _folder(tmp_path / "pool", classes=("more",), splits=("a", "b"))
    _link(root / "train" / "cat" / "a", tmp_path / "pool" / "a")
    _link(root / "train" / "cow", tmp_path / "pool" / "b" / "more")
    _link(root / "train" / "dog" / "9.png", "0.png")
    paths = [e["image"].name for e in _open_folder(root).examples]
    relative = [os.path.relpath(path, root / "train") for path in paths]
    assert relative == [
        "cat/0.png",
        "cat/1.png",
        "cat/a/more/0.png",
        "cat/a/more/1.png",
        "cow/0.png",
        "cow/1.png",
        "dog/0.png",
        "dog/1.png",
        "dog/9.png",
    ]
    datasets = pytest.importorskip(
        "torchvision.datasets", reason="needs torchvision"
    )
    expected = datasets.ImageFolder(root / "train")
    assert sorted(paths) == sorted(path for path, _ in expected.samples)
    assert _open_folder(root).class_names == tuple(expected.classes)


def test_links_upwards_are_left_alone(tmp_path):
    root = _folder(tmp_path)
    cat = root / "train" / "cat"
    # In a loop of two each would double what was found before.
    (cat / "x").mkdir()
    (cat / "y").mkdir()
    for link, target in [
        ("x/up", cat),
        ("x/beside", cat / "y"),
        ("y/beside", cat / "x"),
        ("split", root / "train"),
        ("root", root),
    ]:
        _link(cat / link, target)
    assert _labels(_open_folder(root)) == [0, 0, 1, 1]


def test_links_that_lead_nowhere(tmp_path):
    root = _folder(tmp_path)
    _link(root / "train" / "cow", "/nowhere/cow")
    _link(root / "train" / "cat" / "more", "/nowhere/cat")
    _link(root / "train" / "cat" / "itself", "itself")
    with pytest.raises(ValueError, match="cow is a broken link, to /nowhere/c"):
        _open_folder(root)
    source = _open_folder(root, on_error="skip")
    assert [re.search(r"(\w+) is a b", r)[1] for r in source.remarks] == [
        "cow",
        "itself",
        "more",
    ]
    assert _labels(source) == [0, 0, 1, 1]


def test_files_that_are_no_images_are_named_when_read(tmp_path):
    root = _folder(tmp_path)
    os.mkfifo(root / "train" / "cat" / "2.PNG")
    _link(root / "train" / "cat" / "3.png", "gone.png")
    examples = _open_folder(root).examples
    assert len(examples) == 6
    with pytest.raises(BadRecordError, match=r"cat/2\.PNG is a pipe"):
        examples[2]
    with pytest.raises(
        BadRecordError, match=r"3\.png, a link to gone\.png: No"
    ):
        examples[3]


def test_hidden_folders_and_those_of_macos_are_skipped(tmp_path):
    root = _folder(tmp_path)
    for name in ".ipynb_checkpoints", "__MACOSX":
        shutil.copytree(root / "train" / "dog", root / "train" / "cat" / name)
    assert _labels(_open_folder(root)) == [0, 0, 1, 1]


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _folder(tmp_path / "pets")
    source = open_source("folder", "train", "~/pets")
    assert len(source.examples) == 4
    images, _ = write_tiny_tfds(tmp_path / "tfds")
    source = open_source("cifar10", "train", "~/tfds")
    assert len(source.examples) == len(images)
    with pytest.raises(ValueError, match=f"^{tmp_path}/dogs is no directory"):
        open_source("folder", "train", "~/dogs")


# Bad records of TFDS


def _shard(root):
    name = "cifar10-train.array_record-00000-of-00001"
    return root / "cifar10" / "3.0.2" / name


def test_empty_shard(tmp_path):
    write_tiny_tfds(tmp_path)
    _shard(tmp_path).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"00000-of-00001 is an empty file.*sk"
    ):
        open_source("cifar10", "train", str(tmp_path))
    source = open_source("cifar10", "train", str(tmp_path), on_error="skip")
    assert "its 5 records are lost" in source.remarks[0]
    with pytest.raises(BadRecordError, match=r"record 3 of .*00000-of-00001"):
        source.examples[3]


def test_cut_off_shard(tmp_path):
    write_tiny_tfds(tmp_path)
    shard = _shard(tmp_path)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BadRecordError, match=r"record 4 of .*00000-of-00001"):
        open_source("cifar10", "train", str(tmp_path)).examples[4]


def test_label_out_of_range(tmp_path):
    write_tiny_tfds(tmp_path)
    path = tmp_path / "cifar10" / "3.0.2" / "features.json"
    features = json.loads(path.read_text())
    label = features["featuresDict"]["features"]["label"]
    label["classLabel"]["numClasses"] = "1"
    path.write_text(json.dumps(features))
    examples = open_source("cifar10", "train", str(tmp_path)).examples
    with pytest.raises(BadRecordError, match=r"record \d of .* has the label"):
        list(map(examples.__getitem__, range(len(examples))))
