"""Compiling a recipe's training step for devices that need not be here."""

import dataclasses
import importlib.util
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from densenet_jax.data.examples import NotPreparedError, Source
from densenet_jax.planning import chips
from densenet_jax.planning.compiled import read_program
from densenet_jax.planning.plans import Compilation, Target
from densenet_jax.training import experiment

# The number of steps in a run makes no difference to a step's cost.
_STAND_IN_EXAMPLES = 1_000_000


def find_target(topology: str | None) -> Target:
    """The devices of a topology; without one, those of this machine."""
    if topology is None:
        devices = jax.local_devices()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Target("cpu", devices, memory // len(devices), None)
    chip = chips.find_chip(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "A plan for a TPU takes its compiler, libtpu, though no TPU: "
            '`pip install "jax[tpu]"`.'
        )
    # libtpu is not to look for a TPU, nor to wait for one that is in use.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Hosts have 2x2 chips by default, and one chip does not fill them.
    options = {"chip_config_name": chip.mode}
    if chips.num_chips(topology) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    described = topologies.get_topology_desc(topology, "tpu", **options)
    return Target(topology, described.devices, chip.memory, chip)


def open_sources(config: ConfigDict) -> tuple[tuple[Source, Source], str]:
    """The data or what stands in for it, and a remark if it does."""
    try:
        return experiment.open_sources(config), ""
    except NotPreparedError as error:
        source = error.source
    remark = (
        f"The data set {config.dataset.name!r} is not on this machine: planned "
        f"with the {source.num_classes:,} classes that TFDS knows of."
    )
    source = dataclasses.replace(source, examples=range(_STAND_IN_EXAMPLES))
    return (source, source), remark


def compile_step(
    train_step: Callable[..., Any],
    built: experiment.Experiment,
    target: Target,
) -> Compilation:
    """Compiles a step for the target, traced with an experiment's shapes."""
    began = time.perf_counter()
    program = problem = None
    platform = target.devices[0].platform
    traced = train_step.trace(built.abstract_state, built.batch)
    try:
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
        program = read_program(compiled)
    except jax.errors.JaxRuntimeError as error:
        what, _, problem = str(error).splitlines()[0].partition(": ")
        if what != "RESOURCE_EXHAUSTED":
            raise
    return Compilation(program, problem, time.perf_counter() - began)


def state_bytes(built: experiment.Experiment) -> dict[str, int]:
    """Bytes on each device, without the padding of its layouts."""
    state = built.abstract_state
    parts = {
        "parameters": state.params,
        "batch statistics": state.batch_stats,
        "optimizer": state.opt_state,
        "moving averages": state.ema,
        "batch": built.batch,
    }
    return {
        name: sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(part)
        )
        for name, part in parts.items()
        if part is not None
    }
