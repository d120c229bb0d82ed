"""What the names of a file tell of its labels."""

import re
from collections.abc import Iterable

from densenet_jax.runs.description import Description
from densenet_jax.weights.pretrained import PRETRAINED

_CHEXNET_LABELS = 14


def recognise_labels(
    names: Iterable[str], num_classes: int
) -> tuple[Description, list[str]]:
    """What is known of the nets whose files have such names.

    Args:
      names: of all tensors of the file.
      num_classes: of the net.

    Returns:
      Their description, and sentences that say so.
    """
    names = list(names)
    if any(name.rpartition(".")[2] == "op_threshs" for name in names):
        known = PRETRAINED["torchxrayvision/densenet121-res224-all"].description
        return (
            Description(preprocessing=known.preprocessing, task=known.task),
            [
                "The file has torchxrayvision's op_threshs: its preprocessing "
                "and many labels an image (a sigmoid each) are assumed."
            ],
        )
    chexnet = any(re.search(r"(?:^|\.)densenet121\.", name) for name in names)
    if chexnet and num_classes == _CHEXNET_LABELS:
        return Description(task="multilabel"), [
            "The names are CheXNet's, with its 14 labels: many labels an image "
            "(a sigmoid each) are assumed."
        ]
    return Description(), []
