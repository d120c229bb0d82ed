"""A data set's name -> its examples by index."""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from densenet_jax.choices import check_choice, did_you_mean
from densenet_jax.data.images import BadRecordError, ImageFile

# Those that torchvision's ImageFolder reads.
_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff"),
    ".webp",
)
SKIP_HINT = "Set dataset.on_error='skip' to skip and count what is bad."


class Examples(Protocol):
    """Random access to {'image', 'label'}.

    Images are files, not decoded yet, or uint8 [height, width, channels].
    Raises BadRecordError for an example that cannot be read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    Attributes:
      examples: the split.
      num_classes: labels are 0 ... num_classes - 1.
      image_shape: (height, width, channels); None where images differ.
      class_names: of each label; None where they have none.
      remarks: what is wrong with the data and was let pass.
    """

    examples: Examples
    num_classes: int
    image_shape: tuple[int | None, ...]
    class_names: tuple[str, ...] | None = None
    remarks: tuple[str, ...] = ()


class NotPreparedError(ValueError):
    """TFDS knows the data set, and it is not on this machine.

    Attributes:
      source: all but the examples.
    """

    def __init__(self, message: str, source: Source):
        super().__init__(message)
        self.source = source


def open_source(
    name: str,
    split: str,
    data_dir: str | None = None,
    on_error: str = "raise",
) -> Source:
    """Opens one split of a data set.

    Args:
      name: 'digits' (scikit-learn's 1,797 handwritten digits), 'folder' (image
        files data_dir/split/class/*) or a TFDS data set, 'name',
        'name/config' or 'name/config:version'.
      split: 'train' or 'test' for the digits, a folder of data_dir, or in
        TFDS's notation.
      data_dir: of the image folders, or where TFDS prepared the data set; None
        is TFDS's own choice, the environment's TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      on_error: 'raise', or 'skip' to open what has empty parts.

    Raises:
      NotPreparedError: a data set that TFDS has yet to prepare.
      ValueError: no such data set or split, stored in a format that cannot be
        read by index, or with empty files or classes.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    if name == "digits":
        return _digits(split)
    if name == "folder":
        return _folder(split, data_dir, on_error)
    return _tfds(name, split, data_dir, on_error)


def _digits(split: str) -> Source:
    from sklearn.datasets import load_digits

    if split not in ("train", "test"):
        raise ValueError(f"digits has no split {split!r}: use train or test.")
    images, labels = load_digits(return_X_y=True)
    # Ink counts 0 ... 16 become 0 ... 255. Every fifth digit is held out.
    images = np.round(images * (255 / 16)).astype(np.uint8)
    held_out = np.arange(len(labels)) % 5 == 0
    chosen = np.flatnonzero(held_out == (split == "test"))
    examples = [
        {"image": images[i].reshape(8, 8, 1), "label": int(labels[i])}
        for i in chosen
    ]
    return Source(examples, num_classes=10, image_shape=(8, 8, 1))


def _folder(split: str, data_dir: str | None, on_error: str) -> Source:
    if data_dir is None:
        raise ValueError(
            "The data set 'folder' needs dataset.data_dir, a directory with "
            "images as SPLIT/CLASS/NAME.jpg."
        )
    root = Path(data_dir)
    splits = _directories(root)
    if split not in splits:
        raise ValueError(
            f"{root} has no directory {split!r}, but: "
            f"{', '.join(splits) or 'none at all'}."
        )
    # Of all splits, so that a label means one class in each.
    classes = sorted({c for s in splits for c in _directories(root / s)})
    paths, labels, remarks = [], [], []
    for label, name in enumerate(classes):
        found = _image_files(root / split / name)
        paths += found
        labels += [label] * len(found)
        if not found:
            remarks.append(f"{root / split / name} holds no image file.")
    if not paths:
        raise ValueError(
            f"{root / split} holds no image files: expected CLASS/NAME.jpg."
        )
    if remarks and on_error == "raise":
        raise ValueError(f"{' '.join(remarks)} {SKIP_HINT}")
    return Source(
        _Files(paths, labels),
        len(classes),
        (None, None, 3),
        tuple(classes),
        tuple(remarks),
    )


def _directories(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    names = (entry.name for entry in os.scandir(path) if entry.is_dir())
    return sorted(name for name in names if not name.startswith("."))


def _image_files(path: Path) -> list[str]:
    """All files in it and below with an image's suffix, in order."""
    return sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
    )


class _Files:
    """Image files and their labels."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]):
        self._paths = paths
        self._labels = labels

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        path = self._paths[index]
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BadRecordError(f"{path}: {error.strerror}.") from error
        return {
            "image": ImageFile(data, channels=3, name=path),
            "label": self._labels[index],
        }


def _tfds(name: str, split: str, data_dir: str | None, on_error: str) -> Source:
    import tensorflow_datasets as tfds

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
    if remarks and on_error == "raise":
        raise ValueError(f"{' '.join(remarks)} {SKIP_HINT}")
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
