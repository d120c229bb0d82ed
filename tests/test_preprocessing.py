import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from densenet_jax.data import batch_transforms, rand_augment, transforms
from densenet_jax.data.images import ImageFile
from densenet_jax.data.preprocessing import Preprocessing
from tests import make_golden_images

PLAIN = {"mean": (0.0,), "std": (1.0,)}


def _image(height, width, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def _augment(images, seed=0, **options):
    labels = jnp.arange(len(images))
    augment = jax.jit(Preprocessing(**{**PLAIN, **options}).augment)
    return augment(jax.random.key(seed), {"image": images, "label": labels})


def test_sizes_and_bytes():
    preprocessing = Preprocessing(
        **PLAIN,
        image_size=24,
        resize_size=28,
        random_resized_crop=True,
        flip=True,
        rand_augment=(2, 9),
    )
    image, rng = _image(40, 60), np.random.default_rng(0)
    for got in preprocessing.train(image, rng), preprocessing.evaluate(image):
        assert got.shape == (24, 24, 3)
        assert got.dtype == np.uint8


@pytest.mark.parametrize(
    ("options", "transform"),
    [
        (
            {"random_resized_crop": True},
            lambda image, rng: transforms.random_resized_crop(image, rng, 24),
        ),
        ({"flip": True}, transforms.random_flip),
        (
            {"rand_augment": (2, 9)},
            lambda image, rng: rand_augment.rand_augment(image, rng, 2, 9),
        ),
    ],
    ids=["random_resized_crop", "flip", "rand_augment"],
)
def test_each_augmentation_of_an_image_is_applied(options, transform):
    image = _image(24, 24)
    preprocessing = Preprocessing(**PLAIN, image_size=24, **options)
    changed = 0
    for seed in range(8):
        got = preprocessing.train(image, np.random.default_rng(seed))
        expected = transform(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(got, expected)
        changed += not np.array_equal(got, image)
    assert changed >= 2


def test_augmentations_of_an_image_follow_one_another():
    """Crop, then flip, then RandAugment, with the draws of one generator."""
    preprocessing = Preprocessing(
        **PLAIN,
        image_size=24,
        random_resized_crop=True,
        flip=True,
        rand_augment=(2, 9),
    )
    for seed in range(4):
        rng = np.random.default_rng(seed)
        expected = transforms.random_resized_crop(_image(40, 60), rng, 24)
        expected = transforms.random_flip(expected, rng)
        expected = rand_augment.rand_augment(expected, rng, 2, 9)
        got = preprocessing.train(_image(40, 60), np.random.default_rng(seed))
        np.testing.assert_array_equal(got, expected)


def test_evaluation_is_torchvisions():
    """Resize (Pillow's, as torchvision's) to 28, 28 * 60 // 40 = 42; crop."""
    image = _image(40, 60)
    got = Preprocessing(**PLAIN, image_size=24, resize_size=28).evaluate(image)
    resized = Image.fromarray(image).resize((42, 28), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(got, np.asarray(resized)[2:26, 9:33])


def _assert_torchvisions(data, by_pillow, by_tensors):
    got = Preprocessing(
        **PLAIN,
        image_size=make_golden_images.SIZE,
        resize_size=make_golden_images.SHORTER,
    ).evaluate(ImageFile(data, 3, "some.jpg"))
    np.testing.assert_array_equal(got, by_pillow)
    # Tensors are rounded once, Pillow's after each of two directions.
    difference = got.astype(int) - by_tensors
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("name", make_golden_images.SHAPES)
def test_images_of_the_golden_file(name):
    """Made by torchvision; see make_golden_images.py."""
    golden = np.load(make_golden_images.PATH)
    _assert_torchvisions(
        golden[f"jpeg/{name}"].tobytes(),
        golden[f"pillow/{name}"],
        golden[f"tensor/{name}"],
    )


@pytest.mark.parametrize("shape", [(375, 500), (512, 97), (41, 40), (20, 31)])
def test_jpegs_are_evaluated_as_by_torchvision(shape):
    pytest.importorskip("torchvision", reason="needs torchvision")
    data = make_golden_images.jpeg(*shape)
    _assert_torchvisions(data, *make_golden_images.crops(data))


def test_ten_crop():
    image = _image(30, 40)
    crops = Preprocessing(
        **PLAIN, image_size=20, resize_size=30, ten_crop=True
    ).evaluate(image)
    assert crops.shape == (10, 20, 20, 3)
    expected = [
        image[top : top + 20, left : left + 20]
        for top, left in ((0, 0), (0, 20), (10, 0), (10, 20), (5, 10))
    ]
    np.testing.assert_array_equal(crops[:5], expected)
    np.testing.assert_array_equal(crops[5:], crops[:5, :, ::-1])


def test_a_thin_file_is_not_resized_whole():
    """20,000x1 would become 5,120,000x256, which is 5 GB."""
    row = np.arange(20_000) * 255 // 19_999
    row[9_990:10_010] = 100  # of which the crop sees one pixel
    data = io.BytesIO()
    Image.fromarray(row[None].astype(np.uint8)).save(data, "PNG")
    file = ImageFile(data.getvalue(), 3, "thin.png")
    preprocessing = Preprocessing(**PLAIN, image_size=224, resize_size=256)
    rng = np.random.default_rng(0)
    for got in preprocessing.evaluate(file), preprocessing.train(file, rng):
        np.testing.assert_array_equal(got, np.full((224, 224, 3), 100))
    ten = dataclasses.replace(preprocessing, ten_crop=True).evaluate(file)
    assert ten.shape == (10, 224, 224, 3)
    assert [crop.max() for crop in ten[:5]] == [0, 255, 0, 255, 100]


@pytest.mark.parametrize("shift", [0, 2])
def test_cifars_zeros_are_padded_after_normalising(shift):
    images = np.full((64, 4, 4, 1), 120, np.uint8)
    got = _augment(images, mean=(100.0,), std=(10.0,), shift=shift)["image"]
    assert got.dtype == jnp.float32
    assert set(np.unique(got)) == ({0.0, 2.0} if shift else {2.0})


def test_order_of_the_authors_on_imagenet():
    """Jitter and lighting see pixels, the network what is normalised."""
    images = np.stack([_image(6, 6)] * 4)
    options = {"color_jitter": 0.4, "lighting": 0.1}
    plain = np.asarray(_augment(images, **options)["image"])
    mean, std = np.float32([120, 110, 100]), np.float32([60, 50, 40])
    got = _augment(images, **options, mean=tuple(mean), std=tuple(std))["image"]
    np.testing.assert_allclose(got, (plain - mean) / std, atol=1e-5)
    # Neither alone is both: jitter comes first, then lighting.
    keys = jax.random.split(jax.random.key(0), 6)
    expected = batch_transforms.color_jitter(keys[0], jnp.float32(images), 0.4)
    assert np.abs(expected - jnp.float32(images)).max() > 5
    with_light = batch_transforms.lighting(keys[1], expected, 0.1)
    assert np.abs(with_light - expected).max() > 1
    np.testing.assert_allclose(plain, with_light, atol=1e-3)


def test_one_switched_on_leaves_the_draws_of_others():
    images = np.stack([_image(8, 8)] * 4)
    jitter = _augment(images, color_jitter=0.4)["image"]
    assert not np.allclose(jitter, images, atol=5)
    both = _augment(images, color_jitter=0.4, random_erasing=1.0)["image"]
    kept = both != 0
    assert 0.5 < kept.mean() < 1
    np.testing.assert_array_equal(both[kept], jitter[kept])


def test_mixup_and_cutmix_take_turns():
    """Cut images hold pixels of single images alone; 0 and 200 here."""
    images = np.zeros((2, 16, 16, 1), np.uint8)
    images[1] = 200
    batch = {"image": images, "label": jnp.arange(2)}
    augment = jax.jit(Preprocessing(**PLAIN, mixup=1.0, cutmix=1.0).augment)
    mixed = [augment(jax.random.key(seed), batch) for seed in range(40)]
    blended = sum(not np.isin(m["image"], (0, 200)).all() for m in mixed)
    assert 10 < blended < 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": (0.0,)}, "std is .* must be positive"),
        ({"shift": -1}, "shift is -1"),
        ({"image_size": 0}, "image_size is 0"),
        (
            {"random_resized_crop": True},
            "random_resized_crop needs an image_si",
        ),
        ({"ten_crop": True}, "ten_crop needs an image_size"),
        ({"image_size": 24, "resize_size": 20}, "20 is smaller than .* 24"),
        ({"rand_augment": (0, 9)}, r"rand_augment is \(0, 9\)"),
        ({"rand_augment": (2, 31)}, r"magnitude in 0 \.\.\. 30"),
        ({"color_jitter": 1.5}, r"color_jitter is 1.5: must be in \[0, 1\]"),
        ({"random_erasing": -0.1}, "random_erasing is -0.1"),
        ({"lighting": -0.1}, "lighting is -0.1"),
        ({"mixup": -1.0}, "mixup is -1.0"),
        ({"cutmix": -1.0}, "cutmix is -1.0"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{**PLAIN, **options})
