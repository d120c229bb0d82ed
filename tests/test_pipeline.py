import contextlib
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from densenet_jax.data import pipeline
from densenet_jax.data.images import BadRecordError
from densenet_jax.data.preprocessing import Preprocessing
from densenet_jax.data.sources import open_source
from densenet_jax.training import sharding

EXAMPLES = [
    {"image": np.full((2, 2, 1), i, np.uint8), "label": i} for i in range(10)
]


def _noisy(image, rng):
    return (image + rng.random()).astype(np.float32)


def _take(count, **options):
    options = {"batch_size": 4, "seed": 0, **options}
    batches = pipeline.train_batches(EXAMPLES, _noisy, **options)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def _assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_every_epoch_is_another_permutation():
    labels = np.concatenate([b["label"] for b in _take(10)]).reshape(4, 10)
    for epoch in labels:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in labels}) == 4


def test_augmentation_differs_from_epoch_to_epoch():
    batches = _take(5)
    noise = [
        float(image[0, 0, 0]) - label
        for batch in batches
        for image, label in zip(batch["image"], batch["label"])
    ]
    assert len(set(noise)) == 20


def test_seed_decides():
    _assert_same(_take(5), _take(5))
    other = _take(5, seed=1)
    assert any(
        (a["label"] != b["label"]).any() for a, b in zip(_take(5), other)
    )


def test_position_restores_the_next_batch():
    _assert_same(_take(4, position=3), _take(7)[3:])


def test_workers_change_nothing():
    _assert_same(_take(4, num_workers=2, position=3), _take(7)[3:])


def test_hosts_share_each_batch():
    whole = _take(6)
    shares = [_take(6, process_index=i, process_count=2) for i in range(2)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in batch}
        for batch, *parts in zip(whole, *shares)
    ]
    _assert_same(joined, whole)


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_has_every_example_once(process_count):
    labels = []
    for index in range(process_count):
        batches = list(
            pipeline.eval_batches(
                EXAMPLES,
                lambda image: image.astype(np.float32),
                batch_size=4,
                process_index=index,
                process_count=process_count,
            )
        )
        assert len(batches) == 3
        for batch in batches:
            assert batch["image"].shape == (4 // process_count, 2, 2, 1)
            labels.extend(batch["label"][batch["mask"]])
    assert sorted(labels) == list(range(10))


def test_to_devices_splits_the_batch():
    batch = _take(1, batch_size=8)[0]
    split = sharding.over_data(sharding.make_mesh())
    placed = pipeline.to_devices(batch, split)
    assert len(placed["image"].addressable_shards) == jax.device_count() == 8
    assert placed["image"].addressable_shards[0].data.shape == (1, 2, 2, 1)
    np.testing.assert_array_equal(placed["image"], batch["image"])


# Image files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve JPEGs of three classes, each different."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), np.uint8)
        path = root / "train" / f"class{i % 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def _augmented(folder, count, **options):
    source = open_source("folder", "train", str(folder))
    preprocessing = Preprocessing(
        mean=(0.0,),
        std=(1.0,),
        image_size=16,
        random_resized_crop=True,
        flip=True,
        rand_augment=(2, 9),
    )
    batches = pipeline.train_batches(
        source.examples,
        preprocessing.train,
        **{"batch_size": 4, "seed": 0, **options},
    )
    # Copies: workers lend their memory.
    taken = [
        {name: np.array(x) for name, x in batch.items()}
        for batch in itertools.islice(batches, count)
    ]
    batches.close()
    return taken


def test_augmented_files_resume_in_mid_epoch_with_workers(folder):
    """Twelve files are three batches an epoch: 5 lies in the second."""
    whole = _augmented(folder, 8, num_workers=2)
    assert whole[0]["image"].dtype == np.uint8
    assert whole[0]["image"].shape == (4, 16, 16, 3)
    _assert_same(_augmented(folder, 3, num_workers=2, position=5), whole[5:])
    _assert_same(_augmented(folder, 8), whole)


def test_another_number_of_hosts_goes_on_where_one_stopped(folder):
    whole = _augmented(folder, 5)
    shares = [
        _augmented(folder, 3, position=2, process_index=i, process_count=2)
        for i in range(2)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in batch}
        for batch, *parts in zip(whole[2:], *shares)
    ]
    _assert_same(joined, whole[2:])


# Bad records


class _Sick:
    """Ten examples, of which some cannot be read."""

    def __init__(self, bad):
        self._bad = bad

    def __len__(self):
        return len(EXAMPLES)

    def __getitem__(self, index):
        if index in self._bad:
            raise BadRecordError(f"record {index} is\nbad.")
        return EXAMPLES[index]


def _take_sick(bad, **options):
    batches = pipeline.train_batches(
        _Sick(bad), _noisy, batch_size=5, seed=0, **options
    )
    with contextlib.closing(batches):
        taken = list(itertools.islice(batches, 4))
    return taken, batches.bad_records


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_record_is_an_error_that_names_it(num_workers):
    with pytest.raises(Exception, match=r"record 7 is\s+bad.*on_error='skip'"):
        _take_sick({7}, num_workers=num_workers)


def test_bad_records_are_replaced_counted_and_named_once(capsys):
    taken, bad_records = _take_sick({3, 7}, on_error="skip")
    # Each of two epochs has both; the replacements may meet them again.
    assert bad_records >= 4
    labels = np.concatenate([batch["label"] for batch in taken])
    assert len(labels) == 20
    assert set(labels) == set(range(10)) - {3, 7}
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [f"Skipped: record {i} is bad." for i in (3, 7)]
    healthy, none = _take_sick(set(), on_error="skip")
    assert none == 0
    for batch, other in zip(taken, healthy):
        readable = ~np.isin(other["label"], [3, 7])
        np.testing.assert_array_equal(
            batch["image"][readable], other["image"][readable]
        )


def test_skipping_is_the_same_with_workers():
    alone, count = _take_sick({3, 7}, on_error="skip")
    workers, with_workers = _take_sick({3, 7}, on_error="skip", num_workers=2)
    _assert_same(workers, alone)
    assert with_workers == count


def test_nothing_readable_is_an_error():
    with pytest.raises(BadRecordError, match="100 consecutive records cannot"):
        _take_sick(set(range(10)), on_error="skip")


def test_evaluation_masks_bad_records(capsys):
    batches = pipeline.eval_batches(
        _Sick({0, 7}), lambda image: image, batch_size=4, on_error="skip"
    )
    labels = [label for b in batches for label in b["label"][b["mask"]]]
    assert labels == [1, 2, 3, 4, 5, 6, 8, 9]
    assert batches.bad_records == 2
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [f"Skipped: record {i} is bad." for i in (0, 7)]
    with pytest.raises(BadRecordError, match="record 0"):
        list(
            pipeline.eval_batches(_Sick({0}), lambda image: image, batch_size=4)
        )
