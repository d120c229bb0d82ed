"""The mesh of devices, and what is sharded over it: data parallelism."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices of all hosts on one axis, 'data'."""
    return jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)
    )


def over_data(mesh: Mesh) -> NamedSharding:
    """The first axis of an array (the batch) split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, accumulate: int) -> None:
    """Raises ValueError unless the devices can share each part of a batch."""
    shares = jax.device_count() * accumulate
    if batch_size % shares:
        lower = batch_size // shares * shares
        near = f"{lower} or {lower + shares}" if lower else f"{shares}"
        raise ValueError(
            f"batch_size {batch_size} cannot be divided by {accumulate} "
            f"(accumulate) x {jax.device_count()} devices: use {near}."
        )
