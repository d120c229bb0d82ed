"""Memory of a compiled training step against depth.

python benchmarks/memory.py --policies=none,convs --depths=40,100,190

DenseNet-BC with k=12 on 32x32 images, as the paper's section 4.3 draws its
parameters: ours under each remat policy, and a plain linen port (`plain.py`).
Memory is what XLA allots to the step beside its arguments and results; nothing
is run. A straight line through the logarithms gives the exponent: 1 is memory
in proportion to depth, 2 to its square. Writes a plot; the last line is one
JSON object.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # To run as a file.

from benchmarks import arguments, programs, report
from benchmarks.plain import plain_port
from densenet_jax import compiler_options, create_model
from densenet_jax.files import replacing
from densenet_jax.models.densenet import REMAT_POLICIES
from densenet_jax.tools import command

_IMAGE_SIZE = 32


def benchmark(flags: argparse.Namespace) -> None:
    """Compiles, draws, and prints the table and the JSON object."""
    contenders = ["plain", *(f"ours_{policy}" for policy in flags.policies)]
    temp_bytes = {name: [] for name in contenders}
    # The deepest last: they take longest and may run out of memory.
    runs = list(itertools.product(flags.depths, contenders))
    for depth, name in (bar := tqdm(runs)):
        bar.set_description(f"compiling depth {depth}, {name}")
        model = _model(name, depth)
        temp_bytes[name].append(step_memory(model, flags.batch_size))
        bar.write(f"depth {depth}, {name}: {temp_bytes[name][-1]:,} bytes")

    exponents = {
        name: exponent(flags.depths, values)
        for name, values in temp_bytes.items()
    }
    plot(flags.depths, temp_bytes, exponents, flags.batch_size, flags.plot)
    environment = report.environment()
    print(
        f"\nDenseNet-BC, k=12, batch {flags.batch_size}, images of 32x32x3, "
        "float32: temporary memory (MB) of the training step by depth; "
        f"{report.describe(environment)}\n"
    )
    print(
        report.markdown_table(
            ["", *map(str, flags.depths), "exponent"],
            [
                [
                    name,
                    *(f"{value / 1e6:,.0f}" for value in temp_bytes[name]),
                    f"{exponents[name]:.2f}",
                ]
                for name in contenders
            ],
        )
    )
    print(f"\nWrote {flags.plot}")
    results = {
        name: {"temp_bytes": temp_bytes[name], "exponent": exponents[name]}
        for name in contenders
    }
    settings = vars(flags) | {"plot": str(flags.plot)}
    print(json.dumps({**settings, "results": results, **environment}))


def step_memory(model: nn.Module, batch_size: int) -> int:
    """Bytes that XLA allots to a training step for 32x32 images.

    Beside its arguments and results: mostly what the backward pass needs.
    """
    shape = (batch_size, _IMAGE_SIZE, _IMAGE_SIZE, 3)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    state = jax.eval_shape(
        functools.partial(programs.train_state, model, _IMAGE_SIZE)
    )
    options = compiler_options()
    if jax.default_backend() == "cpu":
        # Optimising machine code takes most of the time and moves no buffer: at
        # depth 40 the memory is the same to the byte.
        options["xla_backend_optimization_level"] = 0
    return programs.train_program(model, state, batch, **options).temp_bytes


def exponent(depths: Sequence[int], values: Sequence[float]) -> float:
    """The p of the power law c depth^p nearest to values, by least squares.

    Of the logarithms, so that the shallow nets count as much as the deep ones.
    """
    slope, _ = np.polyfit(np.log(depths), np.log(values), 1)
    return float(slope)


def plot(
    depths: Sequence[int],
    temp_bytes: Mapping[str, Sequence[int]],
    exponents: Mapping[str, float],
    batch_size: int,
    path: Path,
) -> None:
    """Draws memory over depth, both logarithmic, to a PNG.

    Args:
      depths: numbers of layers.
      temp_bytes: for each name, the memory at each depth.
      exponents: for each name, from `exponent`.
      batch_size: for the title.
      path: to write.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for (name, values), marker in zip(
        temp_bytes.items(), itertools.cycle("os^vDX")
    ):
        axes.plot(
            depths,
            [value / 1e6 for value in values],
            marker=marker,
            label=f"{name.replace('_', ', ')}: depth^{exponents[name]:.2f}",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="depth (layers)",
        ylabel="temporary memory (MB)",
        title=f"A training step of DenseNet-BC, k=12, batch {batch_size}",
    )
    axes.set_xticks(depths, labels=map(str, depths))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _model(name: str, depth: int) -> nn.Module:
    model = create_model(
        "densenet_bc_100_12", block_layers=((depth - 4) // 6,) * 3
    )
    if name == "plain":
        return plain_port(model)
    return model.copy(remat=name.removeprefix("ours_"))


def _depths(text: str) -> tuple[int, ...]:
    depths = arguments.numbers(text)
    wrong = [depth for depth in depths if depth < 10 or (depth - 4) % 6]
    if wrong:
        raise argparse.ArgumentTypeError(
            f"no DenseNet-BC with three equal blocks has {wrong[0]} layers: "
            f"6 n + 4 does, as {max(10, wrong[0] - (wrong[0] - 4) % 6)}"
        )
    if len(set(depths)) < 2:
        raise argparse.ArgumentTypeError("an exponent takes two depths or more")
    return tuple(sorted(set(depths)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 after an error."""
    parser = arguments.parser(__doc__)
    parser.add_argument(
        "--depths", type=_depths, default=(40, 100, 190, 250, 400)
    )
    parser.add_argument(
        "--policies", type=arguments.policies, default=tuple(REMAT_POLICIES)
    )
    parser.add_argument(
        "--batch_size", type=arguments.positive, default=64, help="default: 64"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path("memory.png"),
        metavar="FILE",
        help="the PNG to write (memory.png)",
    )
    return command.run(parser, benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
