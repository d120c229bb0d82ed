"""Source and transforms -> batches, in an order fixed by (seed, index).

The training stream is one endless sequence: every epoch is a new permutation
of the source, and element i of the stream, its augmentation included, depends
on the seed and i alone. A batch is a slice of the stream, so a position is the
number of batches taken: it can be saved and restored with any number of
workers or hosts.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from absl import flags

from densenet_jax.data import transforms
from densenet_jax.data.sources import Examples

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens to an image between the source and the network.

    Attributes:
      mean, std: of each channel, in units of 0 ... 255.
      image_size: height and width of the input; None takes images as stored.
      resize_size: for evaluation, the shorter side before the central crop of
        image_size; read only where image_size is given.
      flip: mirror half of the training images.
      shift: pad training images with so many zeros, after normalising, and
        crop at random (4 on CIFAR).
      random_resized_crop: crop training images as Inception does.

    Raises:
      ValueError: on construction, for attributes that do not go together.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None = None
    resize_size: int | None = None
    flip: bool = False
    shift: int = 0
    random_resized_crop: bool = False

    def __post_init__(self):
        size, resize = self.image_size, self.resize_size
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std is {self.std}: must be positive.")
        if self.shift < 0:
            raise ValueError(f"shift is {self.shift}: must be 0 or more.")
        if size is not None and size < 1:
            raise ValueError(f"image_size is {size}: must be positive.")
        if size is None and (self.random_resized_crop or resize is not None):
            raise ValueError(
                "random_resized_crop and resize_size need an image_size."
            )
        if resize is not None and resize < size:
            raise ValueError(
                f"resize_size {resize} is smaller than image_size {size}, "
                "which is cropped from it."
            )

    def train(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [height, width, channels] -> float32, augmented."""
        if self.random_resized_crop:
            image = transforms.random_resized_crop(image, rng, self.image_size)
        else:
            image = self._resize(image)
        image = transforms.normalize(image, self.mean, self.std)
        if self.flip:
            image = transforms.random_flip(image, rng)
        if self.shift:
            image = transforms.random_shift(image, rng, self.shift)
        return image

    def evaluate(self, image: np.ndarray) -> np.ndarray:
        """uint8 [height, width, channels] -> float32."""
        return transforms.normalize(self._resize(image), self.mean, self.std)

    def _resize(self, image):
        if self.image_size is None:
            return image
        return transforms.resize_and_center_crop(
            image, self.resize_size or self.image_size, self.image_size
        )


def train_batches(
    examples: Examples,
    transform: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's share of each batch, from batch `position` on, for ever.

    Args:
      examples: the training split.
      transform: augments and normalises one image.
      batch_size: over all processes.
      seed: of order and augmentation.
      position: how many batches were taken before.
      num_workers: processes that load; 0 loads in threads of this process.
      process_index, process_count: this host's place among the hosts.

    Returns:
      An iterator of {'image': [batch_size / process_count, height, width,
      channels], 'label': int32 [batch_size / process_count]}.
    """

    def augment(example, rng):
        return {
            "image": transform(example["image"], rng),
            "label": np.int32(example["label"]),
        }

    stream = (
        grain.MapDataset.source(examples)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(augment)
    )
    # Shares are cut after random_map: randomness follows the place in the
    # stream, whichever host or worker computes it.
    shares = stream.batch(batch_size // process_count)
    return _iterate(
        shares[process_index::process_count][position:], num_workers
    )


def eval_batches(
    examples: Examples,
    transform: Callable[[np.ndarray], np.ndarray],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every example once, in order; the last batch padded, with mask False.

    Args and shapes: as `train_batches`, and 'mask': bool [batch].
    """
    padded = _Padded(examples, transform, multiple=batch_size)
    shares = grain.MapDataset.source(padded).batch(batch_size // process_count)
    return _iterate(shares[process_index::process_count], num_workers=0)


def to_devices(batch: Batch, sharding: jax.sharding.Sharding):
    """Each process's share of a batch -> one globally sharded batch."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


class _Padded:
    """Transformed examples, then masked copies of the first to a multiple."""

    def __init__(self, examples, transform, multiple):
        self._examples = examples
        self._transform = transform
        self._length = -(-len(examples) // multiple) * multiple

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        real = index < len(self._examples)
        example = self._examples[index if real else 0]
        return {
            "image": self._transform(example["image"]),
            "label": np.int32(example["label"]),
            "mask": np.bool_(real),
        }


def _iterate(batches: grain.MapDataset, num_workers: int) -> Iterator[Batch]:
    # Grain reads its own absl flags, which only absl.app parses by itself.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
    # Each thread makes a batch; more would fill the memory with them.
    threads = min(8, os.cpu_count() or 1)
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=2 * threads
    )
    dataset = batches.to_iter_dataset(options)
    if num_workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers)
        )
    return iter(dataset)
