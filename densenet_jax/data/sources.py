"""A data set's name -> its examples by index."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from densenet_jax.choices import did_you_mean


class Examples(Protocol):
    """Random access to {'image': uint8 [height, width, channels], 'label'}."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    Attributes:
      examples: the split.
      num_classes: labels are 0 ... num_classes - 1.
      image_shape: (height, width, channels); None where images differ.
    """

    examples: Examples
    num_classes: int
    image_shape: tuple[int | None, ...]


class NotPreparedError(ValueError):
    """TFDS knows the data set, and it is not on this machine.

    Attributes:
      source: all but the examples.
    """

    def __init__(self, message: str, source: Source):
        super().__init__(message)
        self.source = source


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens one split of a data set.

    Args:
      name: 'digits' (scikit-learn's 1,797 handwritten digits) or a TFDS data
        set, 'name', 'name/config' or 'name/config:version'.
      split: 'train' or 'test' for the digits, else in TFDS's notation.
      data_dir: where TFDS prepared it; None is TFDS's own choice, the
        environment's TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      NotPreparedError: a data set that TFDS has yet to prepare.
      ValueError: no such data set or split, or stored in a format that cannot
        be read by index.
    """
    if name == "digits":
        return _digits(split)
    return _tfds(name, split, data_dir)


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


def _tfds(name: str, split: str, data_dir: str | None) -> Source:
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
            Source((), *_classes_and_shape(name, builder.info.features)),
        )
    # Unlike the data set's own builder this one knows of converted copies.
    builder = tfds.builder_from_directory(builder.data_dir)
    _require_random_access(builder)
    try:
        count = builder.info.splits[split].num_examples
    except (KeyError, ValueError):
        count = 0
    if not count:
        raise ValueError(
            f"Data set {name!r} has no split {split!r}, or no examples in it: "
            f"it has {', '.join(builder.info.splits)}."
        )
    return Source(
        builder.as_data_source(split=split),
        *_classes_and_shape(name, builder.info.features),
    )


def _classes_and_shape(
    name: str, features: Mapping[str, Any]
) -> tuple[int, tuple[int | None, ...]]:
    try:
        return features["label"].num_classes, features["image"].shape
    except (KeyError, AttributeError):
        raise ValueError(
            f"Data set {name!r} has the features {', '.join(features)}: "
            "classification needs an 'image' and a class 'label'."
        ) from None


def _prepare_command(name: str, data_dir: str | None) -> str:
    place = f" --data_dir={data_dir}" if data_dir else ""
    return (
        "Prepare it once with `pip install tensorflow && tfds build "
        f"{name} --file_format=array_record{place}`, or point TFDS_DATA_DIR or "
        "config.dataset.data_dir to it."
    )


def _require_random_access(builder: Any) -> None:
    import tensorflow_datasets as tfds

    readable = tfds.core.file_adapters.FileFormat.with_random_access()
    if builder.info.available_file_formats() & readable:
        return
    raise ValueError(
        f"Data set {builder.info.full_name} in {builder.data_dir} is stored as "
        f"{builder.info.file_format.value}, which cannot be read by index. "
        "Add an array_record copy beside it once with `pip install tensorflow "
        "&& python -m tensorflow_datasets.scripts.convert_format "
        f"--dataset_version_dir={builder.data_dir} "
        "--out_file_format=array_record`."
    )
