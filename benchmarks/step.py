"""Images per second of this project and its peers, measured in one run.

python benchmarks/step.py --mode=train --policies=none,convs
python benchmarks/step.py --mode=infer --model=densenet169 --batch_size=1

Ours (and folded, to infer), a plain linen port (`plain.py`), and torchvision
run eagerly in both memory formats, where it is installed and has the net. Ours
are compiled with `densenet_jax.compiler_options`, and so is the plain port a
second time, where there are any. They take turns, one step each a round;
medians over the rounds. All begin with the same variables, and must give the
same loss or logits. Training is forward, backward and SGD with momentum, in
float32 on random images. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # To run as a file.

from benchmarks import arguments, contenders, report
from benchmarks.contenders import Contender
from densenet_jax import create_model
from densenet_jax.models.densenet import REMAT_POLICIES
from densenet_jax.tools import command

# How far the outputs of two contenders in float32 may lie apart, as a share of
# the largest.
_TOLERANCE = 1e-3


def benchmark(flags: argparse.Namespace) -> None:
    """Measures, and prints the table and the JSON object."""
    if flags.policies and flags.mode == "infer":
        raise ValueError("--policies goes with --mode=train: leave it out.")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"Others use this machine (load {load:.1f}): PyTorch's threads "
            "lose more by it than XLA's. Compare them on an idle one."
        )
    changes = {}
    if flags.block_layers:
        changes["block_layers"] = flags.block_layers
    model = create_model(flags.model, **changes)
    image_size = flags.image_size or (32 if model.stem == "cifar" else 224)
    task = contenders.random_task(
        model,
        train=flags.mode == "train",
        batch_size=flags.batch_size,
        image_size=image_size,
    )
    if absent := contenders.torchvision_absent(model):
        print(f"Without torchvision: {absent}.")

    makers = contenders.makers(model, task, flags.policies or ["none"])
    prepared = {}
    for name in (bar := tqdm(makers)):
        bar.set_description(f"preparing {name}")
        prepared[name] = makers[name]()
    # Not measured: the first steps are the slowest. The second loss tells of
    # the gradients.
    outputs, _ = take_turns(prepared, 2)
    differences = compare(outputs)
    _, seconds = take_turns(prepared, flags.rounds)

    results = {
        name: {
            **_rates(seconds, name, flags.batch_size),
            "compile_seconds": contender.compile_seconds,
            "temp_bytes": contender.temp_bytes,
            "difference": differences[name],
        }
        for name, contender in prepared.items()
    }
    environment = report.environment()
    print(
        f"\n{flags.model}, {flags.mode}, batch {flags.batch_size}, images of "
        f"{image_size}x{image_size}x3, float32, {flags.rounds} rounds, load "
        f"{load:.1f}; {report.describe(environment)}\n\n{_table(results)}\n"
    )
    settings = vars(flags) | {"image_size": image_size, "load": load}
    print(json.dumps({**settings, "results": results, **environment}))


def take_turns(
    prepared: Mapping[str, Contender], rounds: int
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[float]]]:
    """Outputs and seconds of each contender's step in each round."""
    outputs = {name: [] for name in prepared}
    seconds = {name: [] for name in prepared}
    with tqdm(total=rounds * len(prepared)) as bar:
        for _ in range(rounds):
            for name, contender in prepared.items():
                bar.set_description(name)
                start = time.perf_counter()
                output = contender.step()
                seconds[name].append(time.perf_counter() - start)
                outputs[name].append(output)
                bar.update()
    return outputs, seconds


def compare(outputs: Mapping[str, Sequence[np.ndarray]]) -> dict[str, float]:
    """How far each lies from the plain port, relative to the largest output.

    Raises:
      ValueError: further than rounding explains.
    """
    expected = np.stack(outputs["plain"])
    largest = np.abs(expected).max()
    differences = {}
    for name, found in outputs.items():
        difference = float(np.abs(np.stack(found) - expected).max() / largest)
        if not difference <= _TOLERANCE:
            raise ValueError(
                f"{name} computes something else than the plain port: its "
                f"output differs by {difference:.1e} of the largest, expected "
                f"at most {_TOLERANCE:.0e}."
            )
        differences[name] = difference
    return differences


def _rates(seconds, name, batch_size) -> dict[str, float | None]:
    rates = {
        other: batch_size / statistics.median(times)
        for other, times in seconds.items()
    }
    theirs = [rates[peer] for peer in contenders.TORCHVISION if peer in rates]
    return {
        "images_per_second": rates[name],
        "best_images_per_second": batch_size / min(seconds[name]),
        "ratio_to_plain": rates[name] / rates["plain"],
        "ratio_to_torchvision": rates[name] / max(theirs) if theirs else None,
    }


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    columns = {
        "images/s": ("images_per_second", ".2f", 1),
        "fastest round": ("best_images_per_second", ".2f", 1),
        "x plain": ("ratio_to_plain", ".2f", 1),
        "x torchvision": ("ratio_to_torchvision", ".2f", 1),
        "compile s": ("compile_seconds", ".1f", 1),
        "temp MB": ("temp_bytes", ",.0f", 1e6),
    }
    rows = [
        [name]
        + [
            "-" if result[key] is None else format(result[key] / unit, spec)
            for key, spec, unit in columns.values()
        ]
        for name, result in results.items()
    ]
    return report.markdown_table(["", *columns], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 after an error."""
    parser = arguments.parser(__doc__)
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--model", default="densenet121")
    parser.add_argument("--batch_size", type=arguments.positive, default=8)
    parser.add_argument(
        "--policies",
        type=arguments.policies,
        help=f"to train, of {', '.join(REMAT_POLICIES)}; default: none",
    )
    parser.add_argument("--rounds", type=arguments.positive, default=10)
    parser.add_argument(
        "--image_size",
        type=arguments.positive,
        help="height and width; default: 224, or 32 for the CIFAR nets",
    )
    parser.add_argument(
        "--block_layers",
        type=arguments.numbers,
        metavar="N,N",
        help="other numbers of layers than the model's",
    )
    return command.run(parser, benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
