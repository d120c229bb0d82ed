"""Against NumPy written from the papers, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.data import batch_transforms
from densenet_jax.training import sharding

KEY = jax.random.key(0)


def _images(count=16, size=12, channels=3):
    rng = np.random.default_rng(0)
    return rng.uniform(1, 255, (count, size, size, channels)).astype(np.float32)


def _batch(count=16):
    return {
        "image": jnp.asarray(_images(count)),
        "label": jnp.arange(count, dtype=jnp.int32),
    }


@pytest.mark.parametrize("order", ["bcs", "csb", "sbc"])
def test_color_jitter_in_any_order(order):
    """Blends as in fb.resnet.torch, transforms.lua, factors as drawn."""
    images = _images(4)
    got = batch_transforms.color_jitter(KEY, jnp.asarray(images), 0.4)
    factors = np.asarray(
        jax.random.uniform(KEY, (3, 4, 1, 1, 1), minval=0.6, maxval=1.4)
    )
    for image, jittered, *each in zip(images, got, *factors):
        factor = dict(zip("bcs", (float(f.squeeze()) for f in each)))
        image = image.astype(np.float64)
        for name in order:
            grey = image @ [0.299, 0.587, 0.114]
            other = {"b": 0, "c": grey.mean(), "s": grey[..., None]}[name]
            image = factor[name] * image + (1 - factor[name]) * other
        np.testing.assert_allclose(jittered, image, atol=1e-3)


def test_lighting_follows_the_principal_components():
    images = jnp.full((4000, 1, 1, 3), 100.0)
    noise = batch_transforms.lighting(KEY, images, 0.1)[:, 0, 0] - 100
    vectors = np.array(
        [
            [-0.5675, 0.7192, 0.4009],
            [-0.5808, -0.0045, -0.8140],
            [-0.5836, -0.6948, 0.4203],
        ]
    )
    # Eigenvectors are the columns; the deviations along them 0.1 * eigenvalue.
    along = np.asarray(noise) @ vectors / 255
    expected = 0.1 * np.array([0.2175, 0.0188, 0.0045])
    np.testing.assert_allclose(along.std(axis=0), expected, rtol=0.05)
    assert np.abs(along.mean(axis=0) / expected).max() < 0.06


def test_normalize():
    image = np.array([[[[0, 128, 255]]]], np.uint8)
    got = batch_transforms.normalize(image, (100, 128, 55), (50, 1, 100))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.float32([[[[-2, 0, 2]]]]))


def test_shift_gives_every_window_of_the_padded_image():
    image = _images(1, size=4)[0]
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {
        padded[i : i + 4, j : j + 4].tobytes()
        for i in range(3)
        for j in range(3)
    }
    got = batch_transforms.random_shift(KEY, jnp.stack([image] * 200), 1)
    assert {np.asarray(x).tobytes() for x in got} == windows


def test_erasing_cuts_rectangles_of_the_stated_areas_and_ratios():
    images = _images(400, size=64, channels=1)
    got = np.asarray(batch_transforms.random_erasing(KEY, images, 0.5))
    areas, ratios = [], []
    for image, erased in zip(images[..., 0], got[..., 0]):
        rows, columns = np.nonzero(erased != image)
        if not len(rows):
            continue
        box = np.s_[
            rows.min() : rows.max() + 1, columns.min() : columns.max() + 1
        ]
        assert not erased[box].any()
        height, width = erased[box].shape
        assert len(rows) == height * width
        areas.append(height * width / 64**2)
        ratios.append(height / width)
    assert 160 < len(areas) < 240
    assert 0.018 < min(areas) < 0.05
    assert 0.28 < max(areas) < 0.34
    assert 0.28 < min(ratios) < 0.45
    assert 2.2 < max(ratios) < 3.5


def test_mixup():
    batch = _batch()
    got = batch_transforms.mixup(KEY, batch, 0.4)
    share = float(jax.random.beta(KEY, 0.4, 0.4))
    own = np.asarray(batch["image"])
    before = np.roll(own, 1, axis=0)
    np.testing.assert_allclose(
        got["image"], share * own + (1 - share) * before, rtol=1e-5
    )
    labels = np.arange(16), np.roll(np.arange(16), 1)
    first, second = labels if share >= 0.5 else labels[::-1]
    np.testing.assert_array_equal(got["label"], first)
    np.testing.assert_array_equal(got["other_label"], second)
    np.testing.assert_allclose(got["lam"], max(share, 1 - share), rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix(seed):
    batch = _batch()
    got = batch_transforms.cutmix(jax.random.key(seed), batch, 1.0)
    own = np.asarray(batch["image"])
    before = np.roll(own, 1, axis=0)
    pasted = np.asarray(got["image"] == before).all(axis=(0, 3))
    rows, columns = np.nonzero(pasted)
    box = np.zeros((12, 12), bool)
    if len(rows):
        box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1
    np.testing.assert_array_equal(pasted, box)
    expected = np.where(box[..., None], before, own)
    np.testing.assert_array_equal(got["image"], expected)
    share = 1 - box.mean()
    labels = np.arange(16), np.roll(np.arange(16), 1)
    np.testing.assert_array_equal(got["label"], labels[int(share < 0.5)])
    np.testing.assert_allclose(got["lam"], max(share, 1 - share), rtol=1e-6)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_over_eight_devices_is_the_same(name):
    mix = jax.jit(lambda b: getattr(batch_transforms, name)(KEY, b, 1.0))
    batch = _batch()
    split = jax.device_put(batch, sharding.over_data(sharding.make_mesh()))
    jax.tree.map(np.testing.assert_array_equal, mix(split), mix(batch))
