"""Data sets that TFDS has prepared as array_record, read without TensorFlow."""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Mapping
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from densenet_jax.choices import did_you_mean
from densenet_jax.data.examples import (
    NotPreparedError,
    Source,
    check_remarks,
)
from densenet_jax.data.images import BadRecordError, ImageFile
from densenet_jax.files import as_path


def open_tfds(
    name: str, split: str, data_dir: str | None, on_error: str
) -> Source:
    import tensorflow_datasets as tfds

    if data_dir is not None:
        data_dir = str(as_path(data_dir))
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except AssertionError as error:  # a version that there is not
        raise ValueError(f"Data set {name!r}: {error}") from None
    except ImportError as error:
        raise ValueError(
            f"Data set {name!r} is not prepared in "
            f"{data_dir or tfds.core.constants.DATA_DIR}, and to make it takes "
            f"a package ({error}). {_prepare_command(name, data_dir)}"
        ) from None
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise ValueError(
            f"TFDS knows no data set {name!r}, and there is none of that name "
            f"in {data_dir or tfds.core.constants.DATA_DIR}."
            f"{did_you_mean(name, known)}"
        ) from None
    if not builder.is_prepared():
        raise NotPreparedError(
            f"Data set {name!r} is not prepared in {builder.data_dir}. "
            f"{_prepare_command(name, data_dir)}",
            _without_examples(name, builder.info.features),
        )
    # Unlike the data set's own builder this one knows of converted copies.
    builder = tfds.builder_from_directory(builder.data_dir)
    _use_array_record(builder)
    try:
        shards = builder.info.splits[split].file_instructions
    except (KeyError, ValueError):
        shards = []
    if not shards:
        raise ValueError(
            f"Data set {name!r} has no split {split!r}, or no examples in it: "
            f"it has {', '.join(builder.info.splits)}."
        )
    remarks = [
        f"{shard.filename} is {problem}: its {shard.take:,} records are lost."
        for shard in shards
        if (problem := _unreadable(shard.filename))
    ]
    check_remarks(remarks, on_error)
    features = builder.info.features
    source = _without_examples(name, features)
    return dataclasses.replace(
        source,
        examples=_Records(
            shards, features, source.num_classes, source.image_shape[-1]
        ),
        remarks=tuple(remarks),
    )


def _without_examples(name: str, features: Mapping[str, Any]) -> Source:
    try:
        label = features["label"]
        return Source(
            (), label.num_classes, features["image"].shape, tuple(label.names)
        )
    except (KeyError, AttributeError):
        raise ValueError(
            f"Data set {name!r} has the features {', '.join(features)}: "
            "classification needs an 'image' and a class 'label'."
        ) from None


def _unreadable(file: str) -> str | None:
    """What is wrong with a local file that must not be empty."""
    if "://" in str(file):  # A look at each would be a request.
        return None
    try:
        return None if os.path.getsize(file) else "an empty file"
    except OSError as error:
        return f"not to be read ({error.strerror})"


class _Records:
    """The records of a TFDS data set, images not decoded."""

    def __init__(self, shards, features, num_classes, channels):
        import tensorflow_datasets as tfds

        self._records = ArrayRecordDataSource(shards)
        self._shards = shards
        self._starts = [0, *itertools.accumulate(s.take for s in shards)]
        self._features = features
        self._decoders = {"image": tfds.decode.SkipDecoding()}
        self._num_classes = num_classes
        self._channels = channels

    def __len__(self):
        return self._starts[-1]

    def __getitem__(self, index):
        name = self._name(index)
        try:
            example = self._features.deserialize_example_np(
                self._records[index], decoders=self._decoders
            )
        # The library's errors for what it cannot read have no common class.
        except Exception as error:
            raise BadRecordError(f"{name}: {error}") from error
        label = int(example["label"])
        if not 0 <= label < self._num_classes:
            raise BadRecordError(
                f"{name} has the label {label}: must lie in 0 ... "
                f"{self._num_classes - 1}."
            )
        return {
            "image": ImageFile(example["image"], self._channels, name),
            "label": label,
        }

    def _name(self, index):
        shard = bisect.bisect_right(self._starts, index) - 1
        record = index - self._starts[shard] + self._shards[shard].skip
        return f"record {record} of {self._shards[shard].filename}"


def _prepare_command(name: str, data_dir: str | None) -> str:
    place = f" --data_dir={data_dir}" if data_dir else ""
    return (
        "Prepare it once with `pip install tensorflow && tfds build "
        f"{name} --file_format=array_record{place}`, or point TFDS_DATA_DIR or "
        "config.dataset.data_dir to it."
    )


def _use_array_record(builder: Any) -> None:
    import tensorflow_datasets as tfds

    array_record = tfds.core.file_adapters.FileFormat.ARRAY_RECORD
    if array_record in builder.info.available_file_formats():
        builder.info.set_file_format(
            array_record, override=True, override_if_initialized=True
        )
        return
    raise ValueError(
        f"Data set {builder.info.full_name} in {builder.data_dir} is stored as "
        f"{builder.info.file_format.value}, which cannot be read by index. "
        "Add an array_record copy beside it once with `pip install tensorflow "
        "apache-beam && python -m tensorflow_datasets.scripts.convert_format "
        f"--dataset_version_dir={builder.data_dir} "
        "--out_file_format=array_record`."
    )
