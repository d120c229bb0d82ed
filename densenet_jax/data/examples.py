"""What a data set is: examples by index, and what is known of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

# Of the remarks that an error says, the most.
_SAID = 5

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


def check_remarks(remarks: Sequence[str], on_error: str) -> None:
    """Raises ValueError of the first few, unless on_error is 'skip'."""
    if not remarks or on_error == "skip":
        return
    more = len(remarks) - _SAID
    others = [f"There are {more:,} more of this kind."] if more > 0 else []
    raise ValueError(" ".join([*remarks[:_SAID], *others, SKIP_HINT]))
