"""Images per second of this project and its peers, measured in one run.

python benchmarks/step.py --mode=train --policies=none,convs
python benchmarks/step.py --mode=infer --model=densenet169 --batch_size=1

Ours (and folded, to infer), a plain linen port (`plain.py`), and torchvision
run eagerly in both memory formats, where it is installed and has the net. They
take turns, one step each a round; medians over the rounds. All begin with the
same variables, and must give the same loss or logits. Training is forward,
backward and SGD with momentum, in float32 on random images. The last line is
one JSON object.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # To run as a file.

from benchmarks import arguments, programs, report
from benchmarks.plain import plain_port
from densenet_jax import create_model, fold_norms
from densenet_jax.checkpoints.architecture import tensor_shapes
from densenet_jax.models.densenet import REMAT_POLICIES, DenseNet
from densenet_jax.tools import command

# How far the outputs of two contenders in float32 may lie apart, as a share of
# the largest.
_TOLERANCE = 1e-3


class Contender(NamedTuple):
    """One that takes part.

    Attributes:
      step: takes a step to its end, and returns the loss or the logits.
      compile_seconds, temp_bytes: as in `programs.Program`; None if eager.
    """

    step: Callable[[], np.ndarray]
    compile_seconds: float | None = None
    temp_bytes: int | None = None


class Task(NamedTuple):
    """What all contenders do.

    Attributes:
      train: or infer.
      variables: numpy arrays to begin with.
      images: [batch, height, width, 3].
      labels: [batch].
    """

    train: bool
    variables: Mapping[str, Any]
    images: np.ndarray
    labels: np.ndarray


def benchmark(flags: argparse.Namespace) -> None:
    """Measures, and prints the table and the JSON object."""
    if flags.policies and flags.mode == "infer":
        raise ValueError("--policies goes with --mode=train: leave it out.")
    model = _model(flags)
    task = _task(model, flags)
    makers = {
        "plain": functools.partial(_ours, plain_port(model), task),
        **_our_makers(model, task, flags.policies),
    }
    if absent := torchvision_absent(model):
        print(f"Without torchvision: {absent}.")
    else:
        makers |= _torchvision_makers(model, task)
    contenders = {}
    for name in (bar := tqdm(makers)):
        bar.set_description(f"preparing {name}")
        contenders[name] = makers[name]()
    differences = _check(contenders)
    seconds = measure(contenders, flags.rounds)

    results = _results(contenders, seconds, len(task.images))
    for name, difference in differences.items():
        results[name]["difference"] = difference
    environment = report.environment()
    print(
        f"\n{flags.model}, {flags.mode}, batch {flags.batch_size}, images of "
        f"{'x'.join(map(str, task.images.shape[1:]))}, float32, "
        f"{flags.rounds} rounds; {report.describe(environment)}\n"
    )
    print(_table(results))
    print()
    settings = vars(flags) | {"image_size": task.images.shape[1]}
    print(json.dumps({**settings, "results": results, **environment}))


def measure(
    contenders: Mapping[str, Contender], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contender's step in each round, in turns."""
    seconds = {name: [] for name in contenders}
    with tqdm(total=rounds * len(contenders)) as bar:
        for _ in range(rounds):
            for name, contender in contenders.items():
                bar.set_description(name)
                start = time.perf_counter()
                contender.step()
                seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


def torchvision_absent(model: DenseNet) -> str | None:
    """Why torchvision cannot take part; None if it can."""
    for package in ("torch", "torchvision"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if (platform := jax.default_backend()) != "cpu":
        return f"it is measured on CPU only, and this is a {platform}"
    theirs = {
        "stem": "imagenet",
        "stem_norm": True,
        "compression": 0.5,
        "norm_epsilon": 1e-5,
    }
    for name, value in theirs.items():
        if (ours := getattr(model, name)) != value:
            return f"its {name} is {value}, and the model's is {ours}"
    if not model.bottleneck_width:
        return "its layers have bottlenecks, and the model's have none"
    return None


def _model(flags) -> DenseNet:
    changes = {}
    if flags.block_layers:
        changes["block_layers"] = flags.block_layers
    return create_model(flags.model, **changes)


def _task(model, flags) -> Task:
    size = flags.image_size
    if size is None:
        size = 32 if model.stem == "cifar" else 224
    rng = np.random.default_rng(0)
    shape = (flags.batch_size, size, size, 3)
    images = rng.standard_normal(shape, np.float32)
    labels = rng.integers(model.num_classes, size=len(images), dtype=np.int32)
    return Task(flags.mode == "train", _variables(model), images, labels)


def _variables(model: DenseNet) -> dict[str, Any]:
    """He's initial values, drawn without compiling anything."""
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in tensor_shapes(model, 3).items():
        *modules, leaf = path.split("/")
        if leaf == "kernel":
            value = rng.standard_normal(shape, np.float32)
            value *= np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        else:
            value = np.full(shape, leaf in ("scale", "var"), np.float32)
        collection = "batch_stats" if leaf in ("mean", "var") else "params"
        flat[(collection, *modules, leaf)] = value
    return flax.traverse_util.unflatten_dict(flat)


def _our_makers(model, task, policies) -> dict[str, Callable[[], Contender]]:
    if task.train:
        return {
            f"ours_{policy}": functools.partial(
                _ours, model.copy(remat=policy), task
            )
            for policy in policies or ["none"]
        }
    folded, variables = fold_norms(model, task.variables)
    folded_task = task._replace(variables=variables)
    return {
        "ours": functools.partial(_ours, model, task),
        "ours_folded": functools.partial(_ours, folded, folded_task),
    }


def _ours(model: nn.Module, task: Task) -> Contender:
    """This project's model or the plain port, compiled."""
    # Copies: training overwrites them.
    variables = jax.tree.map(jnp.array, task.variables)
    batch = {"image": jnp.array(task.images), "label": jnp.array(task.labels)}
    if task.train:
        image_size = task.images.shape[1]
        state = programs.train_state(model, image_size, variables)
        program = programs.train_program(model, state, batch)

        def step():
            nonlocal state
            state, loss = jax.block_until_ready(program.run(state, batch))
            return np.asarray(loss)
    else:
        program = programs.infer_program(model, variables, batch["image"])

        def step():
            return np.asarray(program.run(variables, batch["image"]))

    return Contender(step, program.compile_seconds, program.temp_bytes)


def _torchvision_makers(model, task) -> dict[str, Callable[[], Contender]]:
    from benchmarks import eager

    def make(channels_last):
        step = eager.step_function(
            model,
            task.variables,
            task.images,
            task.labels,
            train=task.train,
            channels_last=channels_last,
        )
        return Contender(step)

    return {
        "torchvision_nchw": functools.partial(make, False),
        "torchvision_channels_last": functools.partial(make, True),
    }


def _check(contenders: Mapping[str, Contender]) -> dict[str, float]:
    """How far each lies from the plain port, relative to the largest output.

    Two steps each, so that the second loss tells of the gradients; the first
    steps are the slowest, and these are not measured.
    """
    found = {
        name: np.stack([contender.step() for _ in range(2)])
        for name, contender in contenders.items()
    }
    expected = found["plain"]
    differences = {
        name: float(np.abs(outputs - expected).max() / np.abs(expected).max())
        for name, outputs in found.items()
    }
    for name, difference in differences.items():
        if not difference <= _TOLERANCE:
            raise ValueError(
                f"{name} computes something else than the plain port: its "
                f"output differs by {difference:.1e} of the largest, expected "
                f"at most {_TOLERANCE:.0e}."
            )
    return differences


def _results(contenders, seconds, batch_size) -> dict[str, dict[str, Any]]:
    rates = {
        name: batch_size / statistics.median(times)
        for name, times in seconds.items()
    }
    peers = [rates[name] for name in rates if name.startswith("torchvision")]
    return {
        name: {
            "images_per_second": rates[name],
            "best_images_per_second": batch_size / min(seconds[name]),
            "ratio_to_plain": rates[name] / rates["plain"],
            "ratio_to_torchvision": (
                rates[name] / max(peers) if peers else None
            ),
            "compile_seconds": contender.compile_seconds,
            "temp_bytes": contender.temp_bytes,
        }
        for name, contender in contenders.items()
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
