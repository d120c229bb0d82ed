import jax
import pytest

from densenet_jax.training.sharding import check_batch_size, make_mesh


def test_a_mesh_is_of_all_devices_unless_they_are_given():
    assert make_mesh().devices.tolist() == jax.devices()
    assert make_mesh(jax.devices()[2:4]).devices.tolist() == jax.devices()[2:4]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (64, 4)])
def test_batches_that_fit(batch_size, accumulate):
    check_batch_size(batch_size, accumulate, devices=8)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "use"),
    [(12, 1, "use 8 or 16"), (4, 1, "use 8"), (24, 2, "use 16 or 32")],
)
def test_batches_that_do_not(batch_size, accumulate, use):
    with pytest.raises(ValueError, match=f"{batch_size}.*8 devices: {use}"):
        check_batch_size(batch_size, accumulate, devices=8)
