"""Source and transforms -> batches, in an order fixed by (seed, index).

The training stream is one endless sequence: every epoch is a new permutation
of the source, and element i of the stream, its augmentation included, depends
on the seed and i alone. A batch is a slice of the stream, so a position is the
number of batches taken: it can be saved and restored with any number of
workers or hosts.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from densenet_jax.data.examples import SKIP_HINT, Examples
from densenet_jax.data.images import BadRecordError

Batch = dict[str, np.ndarray]

# Consecutive unreadable records before giving up.
_TRIES = 100


class Batches(Iterator[Batch]):
    """Batches; says on stderr, once, of each bad record that was skipped.

    Attributes:
      bad_records: how many were skipped on this host, each time counted.
    """

    def __init__(self, batches: Any):
        self._batches = batches
        self._said = set()
        self.bad_records = 0

    def __next__(self) -> Batch:
        batch = next(self._batches)
        lines = "\n".join(batch.pop("bad_records")).split("\n")
        for line in filter(None, lines):
            self.bad_records += 1
            if line not in self._said:
                self._said.add(line)
                tqdm.write(f"Skipped: {line}", file=sys.stderr)
        return batch

    def close(self) -> None:
        self._batches.close()


def train_batches(
    examples: Examples,
    transform: Callable[[Any, np.random.Generator], np.ndarray],
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    on_error: str = "raise",
) -> Batches:
    """This process's share of each batch, from batch `position` on, for ever.

    Args:
      examples: the training split.
      transform: decodes and augments one image.
      batch_size: over all processes.
      seed: of order and augmentation.
      position: how many batches were taken before.
      num_workers: processes that load; 0 loads in threads of this process.
      process_index, process_count: this host's place among the hosts.
      on_error: 'raise', or 'skip' to put another example, drawn at random, in
        the place of one that cannot be read.

    Returns:
      An iterator of {'image': [batch_size / process_count, height, width,
      channels], 'label': int32 [batch_size / process_count]}.

    Raises:
      BadRecordError: from the iterator, naming the record.
    """

    def load(index, rng):
        image, label, bad_records = _read(
            examples, index, rng, lambda x: transform(x, rng), on_error
        )
        return {"image": image, "label": label, "bad_records": bad_records}

    stream = (
        grain.MapDataset.range(len(examples))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(load)
    )
    # Shares are cut after random_map: randomness follows the place in the
    # stream, whichever host or worker computes it.
    shares = stream.batch(batch_size // process_count)
    return _iterate(
        shares[process_index::process_count][position:], num_workers
    )


def eval_batches(
    examples: Examples,
    transform: Callable[[Any], np.ndarray],
    *,
    batch_size: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    on_error: str = "raise",
) -> Batches:
    """Every example once, in order; the last batch padded, with mask False.

    Args, shapes and raises: as `train_batches`, and 'mask': bool [batch]. With
    on_error 'skip' the mask is False for what cannot be read, too.
    """

    count = len(examples)

    def load(index):
        # Copies of the first examples fill up the last batch.
        image, label, bad_records = _read(
            examples,
            index % count,
            np.random.default_rng(index),
            transform,
            on_error,
        )
        return {
            "image": image,
            "label": label,
            "mask": np.bool_(index < count and not bad_records),
            "bad_records": bad_records if index < count else np.str_(),
        }

    padded = grain.MapDataset.range(-(-count // batch_size) * batch_size)
    shares = padded.map(load).batch(batch_size // process_count)
    return _iterate(shares[process_index::process_count], num_workers)


def to_devices(batch: Batch, sharding: jax.sharding.Sharding):
    """Each process's share of a batch -> one globally sharded batch."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def _read(examples, index, rng, transform, on_error):
    """An example's image, label, and a line for each bad one met before it."""
    bad_records = []
    for _ in range(_TRIES):
        try:
            example = examples[index]
            image = transform(example["image"])
        except BadRecordError as error:
            if on_error == "raise":
                raise BadRecordError(f"{error} {SKIP_HINT}") from error
            bad_records.append(" ".join(str(error).splitlines()))
            index = int(rng.integers(len(examples)))
        else:
            label = np.int32(example["label"])
            return image, label, np.str_("\n".join(bad_records))
    raise BadRecordError(
        f"{_TRIES} consecutive records cannot be read. The last: "
        f"{bad_records[-1]}"
    )


def _iterate(batches: grain.MapDataset, num_workers: int) -> Batches:
    # Grain reads its own absl flags, which only absl.app parses by itself.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
    # Each thread makes a batch; more would fill the memory with them.
    threads = min(8, usable_cores())
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=2 * threads
    )
    dataset = batches.to_iter_dataset(options)
    if num_workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers)
        )
    return Batches(iter(dataset))


def usable_cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
