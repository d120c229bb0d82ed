"""Writes a small data set as TFDS does, without TensorFlow."""

import io
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

_FEATURE = "tensorflow_datasets.core.features"


def write_tiny_tfds(data_dir: Path, examples: int = 5):
    """Makes cifar10/3.0.2 of random images; returns images and labels.

    Images [examples, 32, 32, 3] uint8, labels [examples]: the same for
    'train' and 'test'.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, examples)
    folder = data_dir / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    records = [_serialize(*pair) for pair in zip(images, labels)]
    splits = []
    for split in ("train", "test"):
        path = folder / f"cifar10-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        splits.append(
            {
                "name": split,
                "filepathTemplate": (
                    "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
                ),
                "shardLengths": [str(examples)],
                "numBytes": str(sum(map(len, records))),
            }
        )
    info = {
        "name": "cifar10",
        "version": "3.0.2",
        "fileFormat": "array_record",
        "splits": splits,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    features = {
        "pythonClassName": f"{_FEATURE}.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "image": {
                    "pythonClassName": f"{_FEATURE}.image_feature.Image",
                    "image": {
                        "shape": {"dimensions": ["32", "32", "3"]},
                        "dtype": "uint8",
                        "encodingFormat": "png",
                    },
                },
                "label": {
                    "pythonClassName": (
                        f"{_FEATURE}.class_label_feature.ClassLabel"
                    ),
                    "classLabel": {"numClasses": "10"},
                },
            }
        },
    }
    (folder / "features.json").write_text(json.dumps(features))
    return images, labels


def _serialize(image, label):
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(png.getvalue())
    feature["label"].int64_list.value.append(int(label))
    return example.SerializeToString()
