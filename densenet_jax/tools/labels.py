"""Which class of a net each class of a data set is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from densenet_jax.data.examples import Examples, Source
from densenet_jax.runs.description import Description
from densenet_jax.tools.images import imagenet_synsets

_HINT = (
    "--class_indices=FILE gives the net's class, from 0, for each class of the "
    "data set, one a line."
)


class Relabelled:
    """Examples whose labels are those of a net; see `Examples`."""

    def __init__(self, examples: Examples, indices: Sequence[int]):
        """Takes the class indices[i] of the net for the label i."""
        self._examples = examples
        self._indices = indices

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        example = self._examples[index]
        return {**example, "label": self._indices[example["label"]]}


def class_indices(
    option: str | None,
    source: Source,
    description: Description,
    num_classes: int,
) -> list[int]:
    """The class of the net for each label of a source; prints what it did.

    The option says it, or the names of the classes do. Where the net or the
    data set has none, both must have as many classes.

    Args:
      option: of --class_indices: '3,1,2' or a file.
      source: the data set.
      description: of the net.
      num_classes: of the net. 1,000 without names are taken for ImageNet's.

    Raises:
      ValueError: the classes cannot be lined up.
      OSError: the option's file cannot be read.
    """
    if option is not None:
        return _given(option, source.num_classes, num_classes)
    same = list(range(source.num_classes))
    known = description.class_names
    if known is None and num_classes == 1000:
        known = list(imagenet_synsets())
    if known is not None and source.class_names is not None:
        found = _places(known, source.class_names)
        if None not in found:
            if found != same:
                print(
                    f"The {len(found):,} classes of the data set were found "
                    f"by name among the net's {num_classes:,}."
                )
            return found
        if description.class_names is not None:
            missing = [
                name
                for name, place in zip(source.class_names, found)
                if place is None
            ]
            raise ValueError(
                f"{len(missing):,} of the data set's {len(found):,} classes "
                f"are none of the net's: {_some(missing)}. The net's "
                f"{num_classes:,} are {_some(known)}. {_HINT}"
            )
    names = source.class_names
    if num_classes < source.num_classes or (
        known is not None and num_classes > source.num_classes
    ):
        raise ValueError(
            f"The net tells {num_classes:,} classes apart and the data set has "
            f"{source.num_classes:,}"
            + (f" ({_some(names)}), not the net's names" if names else "")
            + f". {_HINT}"
        )
    if description.class_names is None and (
        names is not None or num_classes > source.num_classes
    ):
        print(
            f"The file does not name its {num_classes:,} classes. Assumed the "
            f"order of the data set's {source.num_classes:,}"
            + (f" ({_some(names)})" if names else "")
            + "; --class_indices changes it."
        )
    return same


def _given(option: str, count: int, num_classes: int) -> list[int]:
    words = option.replace(",", " ").split()
    if not all(word.isdigit() for word in words):
        words = Path(option).expanduser().read_text().split()
    if len(words) != count or not all(
        word.isdigit() and int(word) < num_classes for word in words
    ):
        raise ValueError(
            f"--class_indices={option}: expected {count:,} numbers, one for "
            f"each class of the data set, in 0 ... {num_classes - 1:,}; found "
            f"{_some(words)}."
        )
    return [int(word) for word in words]


def _places(known: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Where each name is among the known ones; None where it is not.

    As it is, or else without case, or as ImageNet's folders read.
    """
    readable = imagenet_synsets()
    found = [None] * len(names)
    for spell in (str, _plain, lambda name: _plain(readable.get(name, name))):
        places = {spell(name): i for i, name in enumerate(known)}
        found = [
            places.get(spell(name)) if place is None else place
            for name, place in zip(names, found)
        ]
    return found


def _plain(name: str) -> str:
    return name.replace("_", " ").lower()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:5]))
    return shown + (", ..." if len(names) > 5 else "")
