"""Who takes part in `step.py`: ours, a plain linen port, torchvision."""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import programs
from benchmarks.plain import plain_port
from densenet_jax import compiler_options, fold_norms
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes

TORCHVISION = ("torchvision_nchw", "torchvision_channels_last")


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


def random_task(
    model: DenseNet, *, train: bool, batch_size: int, image_size: int
) -> Task:
    """Random images and labels, and He's initial values."""
    rng = np.random.default_rng(0)
    shape = (batch_size, image_size, image_size, 3)
    images = rng.standard_normal(shape, np.float32)
    labels = rng.integers(model.num_classes, size=batch_size, dtype=np.int32)
    return Task(train, _initial_variables(model, rng), images, labels)


def makers(
    model: DenseNet, task: Task, policies: Sequence[str]
) -> dict[str, Callable[[], Contender]]:
    """Makes each contender, by name; 'plain' is the baseline.

    Ours are compiled with `compiler_options`; where there are any,
    'plain_options' shows what they do for the plain port.

    Args:
      model: ours.
      task: what to do.
      policies: the remat policies to train with.
    """
    plain = functools.partial(_compiled, plain_port(model), task)
    found = {"plain": functools.partial(plain, {})}
    options = compiler_options()
    if options:
        found["plain_options"] = functools.partial(plain, options)
    if task.train:
        for policy in policies:
            ours = model.copy(remat=policy)
            found[f"ours_{policy}"] = functools.partial(
                _compiled, ours, task, options
            )
    else:
        found["ours"] = functools.partial(_compiled, model, task, options)
        folded, variables = fold_norms(model, task.variables)
        found["ours_folded"] = functools.partial(
            _compiled, folded, task._replace(variables=variables), options
        )
    if torchvision_absent(model) is None:
        for name in TORCHVISION:
            channels_last = name.endswith("channels_last")
            found[name] = functools.partial(_eager, model, task, channels_last)
    return found


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
        "stem_stride": None,
        "stem_pool": None,
        "stem_padding": "explicit",
        "blur_pool": "none",
        "compression": 0.5,
        "norm_epsilon": 1e-5,
    }
    for name, value in theirs.items():
        if (ours := getattr(model, name)) != value:
            return f"its {name} is {value}, and the model's is {ours}"
    if not model.bottleneck_width:
        return "its layers have bottlenecks, and the model's have none"
    return None


def _initial_variables(model, rng) -> dict[str, Any]:
    """Drawn from tensor_shapes: `model.init` would compile for seconds."""
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


def _compiled(
    model: nn.Module, task: Task, options: Mapping[str, str]
) -> Contender:
    # Copies: training overwrites them.
    variables = jax.tree.map(jnp.array, task.variables)
    batch = {"image": jnp.array(task.images), "label": jnp.array(task.labels)}
    if task.train:
        state = programs.train_state(model, task.images.shape[1], variables)
        program = programs.train_program(model, state, batch, **options)

        def step():
            nonlocal state
            state, loss = jax.block_until_ready(program.run(state, batch))
            return np.asarray(loss)
    else:
        program = programs.infer_program(
            model, variables, batch["image"], **options
        )

        def step():
            return np.asarray(program.run(variables, batch["image"]))

    return Contender(step, program.compile_seconds, program.temp_bytes)


def _eager(model: DenseNet, task: Task, channels_last: bool) -> Contender:
    # Imports torch, which need not be installed.
    from benchmarks import eager

    step = eager.step_function(
        model,
        task.variables,
        task.images,
        task.labels,
        train=task.train,
        channels_last=channels_last,
    )
    return Contender(step)
