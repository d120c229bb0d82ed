"""What has to be known of a net, beside its weights, to use it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# What the logits are: of one label an image (softmax), or of any number of
# labels (a sigmoid each).
TASKS = ("classification", "multilabel")

# Of the preprocessing, what evaluation reads.
PREPROCESSING = ("mean", "std", "image_size", "resize_size")


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file or a run says of its net; None is what it does not say.

    Attributes:
      preprocessing: of evaluation, the keys PREPROCESSING of
        `data.preprocessing.Preprocessing`, in its units.
      class_names: of each logit, in order.
      task: one of TASKS.
    """

    preprocessing: Mapping[str, Any] | None = None
    class_names: Sequence[str] | None = None
    task: str | None = None

    def or_else(self, other: "Description") -> "Description":
        """The same, and what `other` says where this says nothing."""
        said = {k: v for k, v in vars(self).items() if v is not None}
        return dataclasses.replace(other, **said)


def of_config(config: Mapping[str, Any]) -> Description:
    """What the config of a run or of a checkpoint says, as JSON values."""
    found = config.get("preprocessing")
    names = config.get("class_names")
    return Description(
        preprocessing=found and {key: found.get(key) for key in PREPROCESSING},
        class_names=names and tuple(names),
        task=config.get("task"),
    )
