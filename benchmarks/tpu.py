"""What a TPU's compiler says of a training step: ours, and a plain port's.

python benchmarks/tpu.py --config=configs/densenet121.py \\
    --config.model.dtype=bfloat16 --topology=v5e:1x1 --batch_size=128

Compiles a recipe's training step, as `densenet_jax.tools.plan` does, under
each remat policy, and once with a plain linen port (`plain.py`) in the model's
place. No TPU is needed, and nothing runs. Each takes minutes; figures are told
as they come. The last line is one JSON object.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))  # To run as a file.

from benchmarks import arguments, report
from benchmarks.plain import plain_port
from densenet_jax import recipes
from densenet_jax.models.densenet import REMAT_POLICIES
from densenet_jax.planning import compiling, plans
from densenet_jax.planning.plans import Compilation
from densenet_jax.tools import command
from densenet_jax.training import experiment, sharding


def benchmark(flags: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Compiles, and prints the table and the JSON object."""
    jax.config.update("jax_platforms", "cpu")
    target = compiling.find_target(flags.topology)
    config = recipes.read_config(flags.config, overrides)
    if flags.batch_size is not None:
        config.batch_size = flags.batch_size
    if config.model.implementation is None:
        config.model.implementation = (
            "xla"  # 'auto' is what suits this machine.
        )
    sources, remark = compiling.open_sources(config)
    if remark:
        print(remark)
    mesh = sharding.make_mesh(target.devices)
    compiled = {}
    for name in ("plain", *flags.policies):
        print(f"compiling {name} ...", file=sys.stderr, flush=True)
        changed = config.copy_and_resolve_references()
        changed.model.remat = "none" if name == "plain" else name
        built = experiment.build(changed, mesh=mesh, sources=sources)
        step = built.train_step
        if name == "plain":
            step = plain_step(built, sharding.replicated(mesh))
        compiled[name] = compiling.compile_step(step, built, target)
        print(table({name: compiled[name]}), file=sys.stderr, flush=True)
    environment = report.environment()
    print(
        f"\n{config.model.name}, {config.model.dtype}, batch "
        f"{config.batch_size:,} on {target.name}, for each chip; "
        f"{report.describe(environment)}\n\n{table(compiled)}\n"
    )
    results = {
        name: plans.compilation_json(compilation, target)
        for name, compilation in compiled.items()
    }
    settings = vars(flags) | {"overrides": overrides}
    print(json.dumps({**settings, "results": results, **environment}))


def plain_step(
    built: experiment.Experiment, replicated: jax.sharding.Sharding
) -> Callable[..., Any]:
    """The experiment's training step with the plain port as its model."""
    if built.model.dropout_rate:
        raise ValueError(
            f"The plain port has no dropout, and the recipe's dropout_rate is "
            f"{built.model.dropout_rate}: add --config.model.dropout_rate=0.0."
        )
    step = built.train_step.__wrapped__
    return jax.jit(
        functools.partial(step, model=plain_port(built.model)),
        donate_argnums=0,
        out_shardings=replicated,
    )


def table(compiled: Mapping[str, Compilation]) -> str:
    """One line each; what does not fit has no figures."""
    figures = {
        "Mcycles": lambda p: f"{p.cycles / 1e6:.1f}",
        "temp GB": lambda p: f"{p.temp_bytes / 1e9:.2f}",
        "GFLOP": lambda p: f"{p.flops / 1e9:,.0f}",
        "GB moved": lambda p: f"{p.bytes_accessed / 1e9:.1f}",
    }
    rows = [
        [
            name,
            *(
                figure(compilation.program) if compilation.program else "-"
                for figure in figures.values()
            ),
            f"{compilation.seconds:.0f}",
        ]
        for name, compilation in compiled.items()
    ]
    return report.markdown_table(["", *figures, "compile s"], rows)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 after an error."""
    parser = arguments.parser(__doc__)
    command.add_config(parser)
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument(
        "--batch_size",
        type=arguments.positive,
        help="over all chips (the config's)",
    )
    parser.add_argument(
        "--policies",
        type=arguments.policies,
        default=tuple(REMAT_POLICIES),
        help=f"of {', '.join(REMAT_POLICIES)}; default: all",
    )
    overrides, words = recipes.split_overrides(argv)
    return command.run(
        parser, functools.partial(benchmark, overrides=overrides), words
    )


if __name__ == "__main__":
    sys.exit(main())
