"""The mesh of devices, and what is sharded over it: data parallelism."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices, or else all devices of all hosts, on one axis, 'data'."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=devices,
    )


def over_data(mesh: Mesh) -> NamedSharding:
    """The first axis of an array (the batch) split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, accumulate: int, devices: int) -> None:
    """Raises ValueError unless `devices` can share each part of a batch."""
    shares = devices * accumulate
    if batch_size % shares:
        lower = batch_size // shares * shares
        near = f"{lower} or {lower + shares}" if lower else f"{shares}"
        raise ValueError(
            f"batch_size {batch_size} cannot be divided by {accumulate} "
            f"(accumulate) x {devices} devices: use {near}."
        )
