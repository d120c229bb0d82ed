import numpy as np
import pytest
from PIL import Image

from densenet_jax.data import rand_augment


def _image(channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (37, 50, channels), np.uint8)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", rand_augment.OPERATIONS)
def test_operations_are_torchvisions(name, sign):
    pytest.importorskip("torchvision", reason="needs torchvision")
    from torchvision.transforms import InterpolationMode, RandAugment
    from torchvision.transforms.autoaugment import _apply_op

    if sign < 0 and name in rand_augment.UNSIGNED:
        pytest.skip("has no direction")
    image = Image.fromarray(_image())
    space = RandAugment()._augmentation_space(31, (37, 50))
    assert space.keys() == rand_augment.OPERATIONS.keys()
    assert space[name][1] == (name in rand_augment.SIGNED)
    for magnitude in (0, 9, 30):
        values = space[name][0]
        value = sign * float(values[magnitude] if values.ndim else values)
        expected = _apply_op(
            image, name, value, InterpolationMode.NEAREST, None
        )
        got = rand_augment.OPERATIONS[name](image, sign * magnitude / 30)
        difference = np.asarray(got).astype(int) - np.asarray(expected)
        # Matrices in other orders of rounding pick other neighbours rarely.
        assert np.mean(difference != 0) < 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_change_images_and_keep_their_shape(channels):
    image, rng = _image(channels), np.random.default_rng(0)
    got = [rand_augment.rand_augment(image, rng, 2, 9) for _ in range(50)]
    assert {x.shape for x in got} == {image.shape}
    assert {x.dtype for x in got} == {np.dtype(np.uint8)}
    assert len({x.tobytes() for x in got}) > 30
    again = rand_augment.rand_augment(image, np.random.default_rng(0), 2, 9)
    np.testing.assert_array_equal(again, got[0])
