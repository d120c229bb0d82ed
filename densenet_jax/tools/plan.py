"""Compiles a recipe's training step for a TPU, on a machine that has none.

python -m densenet_jax.tools.plan --config=configs/densenet121.py \\
    --topology=v5e:2x4 --config.model.dtype=bfloat16
python -m densenet_jax.tools.plan --config=configs/digits.py --platform=cpu

Prints what a device holds, and for each remat policy the memory, the work and
the least time it takes; then where the cycles go, as the compiler estimates
them. Keys of the config are set as for train.py. Nothing runs and no data is
read. A big network takes the compiler minutes for each policy. The last line
is all of it as one JSON object.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from densenet_jax.choices import check_choice
from densenet_jax.data.sources import NotPreparedError, Source
from densenet_jax.models.densenet import REMAT_POLICIES
from densenet_jax.planning import chips, plans
from densenet_jax.planning.compiled import read_program
from densenet_jax.planning.plans import Target, Trial
from densenet_jax.tools import command
from densenet_jax.training import experiment, sharding

# The number of steps in a run makes no difference to a step's cost.
_STAND_IN_EXAMPLES = 1_000_000
_NUM_LAYERS_SHOWN = 12


def plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Compiles the step for each policy, and prints the plan."""
    # What devices this machine has are left to others.
    jax.config.update("jax_platforms", "cpu")
    policies = arguments.policies.split(",")
    for policy in policies:
        check_choice("remat policy", policy, REMAT_POLICIES)
    config = command.read_config(arguments.config, overrides)
    if arguments.batch_size is not None:
        config.batch_size = arguments.batch_size
    target = find_target(arguments.topology)
    if target.chip is not None and config.model.implementation is None:
        config.model.implementation = (
            "xla"  # 'auto' is what suits this machine.
        )
    sources, remark = open_sources(config)
    build = functools.partial(
        experiment.build,
        mesh=sharding.make_mesh(target.devices),
        sources=sources,
    )
    planned = build(config)
    state_bytes = _state_bytes(planned)
    print(_heading(config, planned, target, remark))
    print(f"\n{plans.state_table(state_bytes)}\n", flush=True)

    @functools.cache
    def attempt(policy, batch_size):
        changed = config.copy_and_resolve_references()
        changed.model.remat = policy
        changed.batch_size = batch_size
        _say(f"remat={policy}, batch {batch_size:,}: compiling ...")
        built = build(changed)
        trial = compile_step(built.train_step, built, target)
        _say(f"  {_outcome(trial)} ({trial.seconds:,.0f} s)")
        return trial

    trials = {policy: attempt(policy, config.batch_size) for policy in policies}
    print(plans.policy_table(trials, target))
    own = planned.model.remat
    print(_notes(trials, own if own in trials else policies[0], config))
    largest = {}
    if arguments.search:
        for policy in policies:
            largest[policy] = plans.largest_that_fits(
                lambda size, p=policy: attempt(p, size).fits(target),
                start=config.batch_size,
                unit=len(target.devices) * config.accumulate,
                limit=len(planned.train_source.examples),
            )
        print(f"\n{plans.largest_table(largest, target)}")
    result = {
        "config": arguments.config,
        "overrides": overrides,
        "target": plans.target_json(target),
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "image_shape": planned.batch["image"].shape[1:],
        "num_classes": planned.model.num_classes,
        "dtype": config.model.dtype,
        "remat": own,
        "remark": remark,
        "state_bytes": state_bytes,
        "policies": {
            policy: plans.trial_json(trial, target)
            for policy, trial in trials.items()
        },
        "largest_batch": largest,
        "versions": _versions(("jax", "jaxlib", "flax", "libtpu")),
    }
    print(f"\n{json.dumps(result)}")


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
) -> Trial:
    """Compiles a step for the target, traced with an experiment's shapes."""
    began = time.perf_counter()
    program = problem = None
    platform = target.devices[0].platform
    traced = train_step.trace(built.state, built.batch)
    try:
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
        program = read_program(compiled)
    except jax.errors.JaxRuntimeError as error:
        what, _, problem = str(error).splitlines()[0].partition(": ")
        if what != "RESOURCE_EXHAUSTED":
            raise
    return Trial(program, problem, time.perf_counter() - began)


def _outcome(trial: Trial) -> str:
    """The figures that a plan which is cut short leaves behind."""
    if trial.program is None:
        return "does not fit"
    figures = [
        f"{trial.program.temp_bytes / 1e9:.2f} GB temp",
        f"{trial.program.bytes_accessed / 1e9:.2f} GB moved",
    ]
    if trial.program.cycles is not None:
        figures.append(f"{trial.program.cycles / 1e6:.2f} Mcycles")
    return ", ".join(figures)


def _state_bytes(built: experiment.Experiment) -> dict[str, int]:
    """Bytes on each device, without the padding of its layouts."""
    state = built.state
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


def _heading(
    config: ConfigDict,
    planned: experiment.Experiment,
    target: Target,
    remark: str,
) -> str:
    shape = "x".join(map(str, planned.batch["image"].shape[1:]))
    count = len(target.devices)
    lines = [
        f"{config.model.name}, {config.model.dtype}, batch "
        f"{config.batch_size:,} of {shape} images on {target.name}: "
        f"{config.batch_size // count:,} on each of {count:,} "
        f"device{'s' if count > 1 else ''}.",
    ]
    chip = target.chip
    if chip is None:
        lines.append(f"A device's memory: {target.memory / 2**30:,.1f} GiB.")
    else:
        lines.append(
            f"A chip: {chip.peak / 1e12:,.0f} TFLOP/s in bfloat16, "
            f"{chip.bandwidth / 1e9:,.0f} GB/s, {chip.memory >> 30} GiB "
            f"({chip.source})."
        )
    if remark:
        lines.append(remark)
    return "\n".join(map(_fill, lines))


def _notes(trials: Mapping[str, Trial], shown: str, config: ConfigDict) -> str:
    """What the table of policies has no column for."""
    notes = [
        f"remat={policy} does not fit: {trial.problem}"
        for policy, trial in trials.items()
        if trial.program is None
    ]
    program = trials[shown].program
    if program is None:
        return "\n".join(map(_fill, notes))
    if config.accumulate > 1:
        notes.append(
            "The body of a loop counts once in FLOPs, bytes and cycles: it "
            f"runs for each of the {config.accumulate} parts of a batch."
        )
    if program.collective_bytes:
        sizes = ", ".join(
            f"{kind} {size / 1e6:,.2f} MB"
            for kind, size in program.collective_bytes.items()
        )
        notes.append(f"Collectives of a device, remat={shown}: {sizes}.")
    if program.cycles is not None:
        unknown = ", ".join(
            f"{count} {kind}"
            for kind, count in program.without_estimate.items()
        )
        notes.append(f"Operations without an estimate of cycles: {unknown}.")
    lines = list(map(_fill, notes))
    if program.cycles is not None:
        title = f"cycles, remat={shown}"
        table = plans.cycles_table(program, title, _NUM_LAYERS_SHOWN)
        lines += ["", table]
    return "\n".join(lines)


def _fill(line: str) -> str:
    return textwrap.fill(line, 80, break_long_words=False)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    return {
        name: importlib.metadata.version(name)
        if importlib.util.find_spec(name)
        else None
        for name in packages
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("plan", __doc__)
    command.add_config(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--topology",
        help=f"of TPU chips ({', '.join(chips.CHIPS)}), such as v5e:2x4",
    )
    where.add_argument(
        "--platform", choices=["cpu"], help="the devices of this machine"
    )
    parser.add_argument(
        "--batch_size", type=int, help="over all devices (the config's)"
    )
    parser.add_argument(
        "--policies",
        default=",".join(REMAT_POLICIES),
        help="remat policies to compare (%(default)s)",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="find the largest batch that fits, for each policy",
    )
    overrides, words = command.split_overrides(argv)
    return command.run(
        parser, functools.partial(plan, overrides=overrides), words
    )


if __name__ == "__main__":
    sys.exit(main())
