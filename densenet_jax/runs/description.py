"""What has to be known of a net, beside its weights, to use it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# What the logits are: of one label an image (softmax), or of any number of
# labels (a sigmoid each).
TASKS = ("classification", "multilabel")

# Of the preprocessing, what evaluation reads.
PREPROCESSING = ("mean", "std", "image_size", "resize_size", "ten_crop")

# What a run's config has beside its settings.
_FACTS = ("class_names", "task", "image_shape")


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file or a run says of its net; None is what it does not say.

    Attributes:
      preprocessing: of evaluation, keys of PREPROCESSING as in
        `data.preprocessing.Preprocessing`, in its units. A key may be absent;
        `image_size` None is image_shape's, or unknown where there is none.
      class_names: of each logit, in order.
      task: one of TASKS.
      image_shape: (height, width, channels) of the images it was trained on,
        after preprocessing.
    """

    preprocessing: Mapping[str, Any] | None = None
    class_names: Sequence[str] | None = None
    task: str | None = None
    image_shape: Sequence[int] | None = None

    @property
    def input_size(self) -> int | None:
        """Height and width of the net's input; None: not said, or no square."""
        size = (self.preprocessing or {}).get("image_size")
        if size is None and self.image_shape is not None:
            height, width = self.image_shape[:2]
            size = height if height == width else None
        return size

    def or_else(self, other: "Description") -> "Description":
        """The same, and what `other` says where this says nothing."""
        said = {k: v for k, v in vars(self).items() if v is not None}
        return dataclasses.replace(other, **said)


def of_config(config: Mapping[str, Any]) -> Description:
    """What the config of a run or of a checkpoint says, as JSON values."""
    found = config.get("preprocessing")
    names, shape = config.get("class_names"), config.get("image_shape")
    # Runs of earlier versions do not say so, and learned nothing else.
    trained = "optimizer" in config
    task = config.get("task", "classification" if trained else None)
    return Description(
        preprocessing=found
        and {key: found[key] for key in PREPROCESSING if key in found},
        class_names=names and tuple(names),
        task=task,
        image_shape=shape and tuple(shape),
    )


def to_config(description: Description) -> dict[str, Any]:
    """The part of a config that `of_config` reads, without what is None."""
    return {
        key: value
        for key, value in dataclasses.asdict(description).items()
        if value is not None
    }


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config without what describes its data: what a user sets."""
    return {key: value for key, value in config.items() if key not in _FACTS}


def name_difference(
    trained: Sequence[str] | None, given: Sequence[str] | None
) -> str | None:
    """The first class that differs; None where none does or is known.

    Args:
      trained: names that the net was trained with.
      given: names of the data.
    """
    if trained is None or given is None or list(trained) == list(given):
        return None
    if len(trained) != len(given):
        counts = f"{len(trained):,} classes then, {len(given):,} now; "
    else:
        counts = ""
    for i, (old, new) in enumerate(zip(trained, given)):
        if old != new:
            return f"{counts}class {i} was {old!r}, is {new!r}"
    return f"{counts}the first {min(len(trained), len(given))} agree"
