import numpy as np
import pytest
from PIL import Image

from densenet_jax.data import rand_augment
from tests import make_golden_images


def _image(channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (37, 50, channels), np.uint8)


def _assert_same(image, expected):
    """`expected` is of each 'NAME/LEVEL'."""
    names = {name.split("/")[0] for name in expected}
    assert names == set(rand_augment.OPERATIONS)
    for key, theirs in expected.items():
        name, level = key.split("/")
        got = rand_augment.OPERATIONS[name](
            Image.fromarray(image), int(level) / 30
        )
        # Matrices in other orders of rounding pick other neighbours rarely.
        assert np.mean(np.asarray(got) != theirs) < 0.01, key


def test_operations_are_those_of_the_golden_file():
    """Made by torchvision; see make_golden_images.py."""
    golden = np.load(make_golden_images.PATH)
    prefix = "randaugment/"
    expected = {
        name.removeprefix(prefix): golden[name]
        for name in golden
        if name.startswith(prefix)
    }
    assert len(expected) == 2 * len(rand_augment.SIGNED) + len(
        rand_augment.UNSIGNED
    )
    _assert_same(golden["image"], expected)


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_operations_are_torchvisions(magnitude):
    pytest.importorskip("torchvision", reason="needs torchvision")
    image = _image()
    _assert_same(image, make_golden_images.operations(image, magnitude))


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_change_images_and_keep_their_shape(channels):
    image, rng = _image(channels), np.random.default_rng(0)
    got = [rand_augment.rand_augment(image, rng, 2, 9) for _ in range(50)]
    assert {x.shape for x in got} == {image.shape}
    assert {x.dtype for x in got} == {np.dtype(np.uint8)}
    assert len({x.tobytes() for x in got}) > 30
    again = rand_augment.rand_augment(image, np.random.default_rng(0), 2, 9)
    np.testing.assert_array_equal(again, got[0])
