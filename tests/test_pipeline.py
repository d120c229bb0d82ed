import itertools

import jax
import numpy as np
import pytest

from densenet_jax.data import pipeline
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


def test_preprocessing_pads_after_normalising():
    preprocessing = pipeline.Preprocessing(mean=(100.0,), std=(10.0,), shift=2)
    image = np.full((4, 4, 1), 120, np.uint8)
    values = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values |= set(np.unique(preprocessing.train(image, rng)))
    assert values == {0.0, 2.0}


def test_preprocessing_sizes():
    preprocessing = pipeline.Preprocessing(
        mean=(0.0,),
        std=(1.0,),
        image_size=24,
        resize_size=28,
        random_resized_crop=True,
        flip=True,
    )
    image = np.zeros((40, 60, 3), np.uint8)
    rng = np.random.default_rng(0)
    assert preprocessing.train(image, rng).shape == (24, 24, 3)
    assert preprocessing.evaluate(image).shape == (24, 24, 3)


def test_to_devices_splits_the_batch():
    batch = _take(1, batch_size=8)[0]
    split = sharding.over_data(sharding.make_mesh())
    placed = pipeline.to_devices(batch, split)
    assert len(placed["image"].addressable_shards) == jax.device_count() == 8
    assert placed["image"].addressable_shards[0].data.shape == (1, 2, 2, 1)
    np.testing.assert_array_equal(placed["image"], batch["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": (0.0,)}, "std is .* must be positive"),
        ({"shift": -1}, "shift is -1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"random_resized_crop": True}, "need an image_size"),
        ({"image_size": 24, "resize_size": 20}, "20 is smaller than .* 24"),
    ],
)
def test_preprocessing_that_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.Preprocessing(**{"mean": (0.0,), "std": (1.0,), **options})
