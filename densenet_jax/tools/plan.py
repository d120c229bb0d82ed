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
import functools
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence

import jax
from ml_collections import ConfigDict

from densenet_jax import recipes
from densenet_jax.choices import check_choice
from densenet_jax.models.densenet import REMAT_POLICIES
from densenet_jax.planning import chips, compiling, plans, text
from densenet_jax.planning.plans import Compilation, Target
from densenet_jax.tools import command
from densenet_jax.training import experiment, sharding


def plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Compiles the step for each policy, and prints the plan."""
    # What devices this machine has are left to others.
    jax.config.update("jax_platforms", "cpu")
    policies = arguments.policies.split(",")
    for policy in policies:
        check_choice("remat policy", policy, REMAT_POLICIES)
    config = recipes.read_config(arguments.config, overrides)
    if arguments.batch_size is not None:
        config.batch_size = arguments.batch_size
    target = compiling.find_target(arguments.topology)
    if target.chip is not None and config.model.implementation is None:
        # 'auto' is what suits this machine.
        config.model.implementation = "xla"
    sources, remark = compiling.open_sources(config)
    build = functools.partial(
        experiment.build,
        mesh=sharding.make_mesh(target.devices),
        sources=sources,
    )
    planned = build(config)
    print(text.heading(config, planned, target, remark))
    state_bytes = compiling.state_bytes(planned)
    print(f"\n{plans.state_table(state_bytes)}\n", flush=True)

    @functools.cache
    def attempt(policy, batch_size):
        return _attempt(config, build, target, policy, batch_size)

    found = {policy: attempt(policy, config.batch_size) for policy in policies}
    print(plans.policy_table(found, target))
    own = planned.model.remat
    print(text.notes(found, own if own in found else policies[0], config))
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
            policy: plans.compilation_json(compilation, target)
            for policy, compilation in found.items()
        },
        "largest_batch": largest,
        "versions": _versions(("jax", "jaxlib", "flax", "libtpu")),
    }
    print(f"\n{json.dumps(result)}")


def _attempt(
    config: ConfigDict,
    build: Callable[[ConfigDict], experiment.Experiment],
    target: Target,
    policy: str,
    batch_size: int,
) -> Compilation:
    changed = config.copy_and_resolve_references()
    changed.model.remat = policy
    changed.batch_size = batch_size
    _say(f"remat={policy}, batch {batch_size:,}: compiling ...")
    built = build(changed)
    compilation = compiling.compile_step(built.train_step, built, target)
    _say(f"  {text.outcome(compilation)} ({compilation.seconds:,.0f} s)")
    return compilation


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
    overrides, words = recipes.split_overrides(argv)
    return command.run(
        parser, functools.partial(plan, overrides=overrides), words
    )


if __name__ == "__main__":
    sys.exit(main())
