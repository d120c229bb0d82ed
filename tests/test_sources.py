import json
import os

import numpy as np
import pytest

from densenet_jax.data.sources import open_source
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
