"""A config -> everything a run is made of, checked before anything runs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from densenet_jax.choices import check_choice
from densenet_jax.data.examples import Source
from densenet_jax.data.preprocessing import Preprocessing
from densenet_jax.data.sources import open_source
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.ops import compiler_options
from densenet_jax.models.variants import create_model, list_models
from densenet_jax.tasks.classification import Classification
from densenet_jax.training import sharding, steps
from densenet_jax.training.optimizer import make_optimizer, make_schedule
from densenet_jax.training.state import TrainState, init_state

_POSITIVE = (lambda v: v > 0, "positive")
_POSITIVE_OR_NONE = (lambda v: v is None or v > 0, "positive or None")
_NOT_NEGATIVE = (lambda v: v >= 0, "0 or more")
_RANGES = {
    "seed": _NOT_NEGATIVE,
    "epochs": _POSITIVE,
    "batch_size": _POSITIVE,
    "accumulate": _POSITIVE,
    "label_smoothing": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "ema_decay": (lambda v: v is None or 0 < v < 1, "in (0, 1) or None"),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.base_batch_size": _POSITIVE,
    "optimizer.momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _POSITIVE_OR_NONE,
    "schedule.factor": _POSITIVE,
    "dataset.num_workers": _NOT_NEGATIVE,
    "log_every_steps": _POSITIVE,
    "eval_every_epochs": _POSITIVE,
    "checkpoint.every_epochs": _POSITIVE,
    "checkpoint.every_minutes": _POSITIVE_OR_NONE,
    "checkpoint.keep_newest": _POSITIVE,
    "checkpoint.keep_best": _POSITIVE,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes, built but neither compiled nor initialised.

    Attributes:
      model: the network.
      task: what it learns.
      train_source, test_source: the data.
      preprocessing: of the data.
      schedule: learning rate at each step.
      total_steps: length of the run.
      steps_per_epoch: a fraction: epochs end within batches.
      batch: the global batch's shapes and shardings.
      abstract_state: the state's shapes and shardings.
      init: creates the initial state with its sharding, random or from given
        variables.
      train_step, eval_step: jitted; see `training.steps`.
    """

    model: DenseNet
    task: Classification
    train_source: Source
    test_source: Source
    preprocessing: Preprocessing
    schedule: optax.Schedule
    total_steps: int
    steps_per_epoch: Fraction
    batch: dict[str, jax.ShapeDtypeStruct]
    abstract_state: TrainState
    init: Callable[..., TrainState]
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]


def build(
    config: ConfigDict,
    *,
    mesh: Mesh | None = None,
    sources: tuple[Source, Source] | None = None,
) -> Experiment:
    """Builds what the config describes; runs nothing on the devices.

    Args:
      config: the recipe.
      mesh: the devices, of `sharding.make_mesh`; all there are by default.
      sources: train and test data; opened as the config says by default.

    Raises:
      ValueError: for whatever in the config does not fit together.
    """
    _check_ranges(config)
    check_choice("model", config.model.name, list_models())
    mesh = sharding.make_mesh() if mesh is None else mesh
    sharding.check_batch_size(config.batch_size, config.accumulate, mesh.size)
    train_source, test_source = sources or open_sources(config)
    preprocessing, image_shape = make_preprocessing(config, train_source)
    make_preprocessing(config, test_source)
    model = make_model(config.model, train_source)

    steps_per_epoch = Fraction(len(train_source.examples), config.batch_size)
    total_steps, schedule, optimizer = _make_optimization(
        config, steps_per_epoch
    )
    task = Classification(label_smoothing=config.label_smoothing)
    replicated, sharded = sharding.replicated(mesh), sharding.over_data(mesh)
    init = functools.partial(
        init_state,
        model,
        optimizer,
        image_shape,
        seed=config.seed,
        use_ema=config.ema_decay is not None,
    )
    train_step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizer,
        seed=config.seed,
        task=task,
        augment=preprocessing.augment,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
        freeze_backbone=config.optimizer.backbone_lr_scale == 0,
    )
    eval_step = functools.partial(
        steps.eval_step,
        model=model,
        task=task,
        normalize=preprocessing.normalize,
    )
    jit = functools.partial(
        jax.jit,
        out_shardings=replicated,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    return Experiment(
        model=model,
        task=task,
        train_source=train_source,
        test_source=test_source,
        preprocessing=preprocessing,
        schedule=schedule,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        batch=task.abstract_batch(config.batch_size, image_shape, sharded),
        abstract_state=_abstract(init, replicated),
        init=jax.jit(init, out_shardings=replicated),
        train_step=jit(train_step, donate_argnums=0),
        eval_step=jit(eval_step),
    )


def _abstract(init: Callable, sharding: jax.sharding.Sharding) -> Any:
    """The shapes of what init returns, with a sharding."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(init),
    )


def _make_optimization(
    config: ConfigDict, steps_per_epoch: Fraction
) -> tuple[int, optax.Schedule, optax.GradientTransformation]:
    """The length of the run in steps, the learning rate, and the optimizer."""
    total_steps = round(config.epochs * steps_per_epoch)
    if total_steps < 1:
        raise ValueError(
            f"epochs is {config.epochs}: of {float(steps_per_epoch):.1f} steps "
            "each that makes no step."
        )
    schedule = learning_rates(config, steps_per_epoch)
    options = dict(config.optimizer)
    del options["learning_rate"], options["base_batch_size"]
    optimizer = make_optimizer(schedule=schedule, **options)
    if config.optimizer.backbone_lr_scale == 0 and not config.pretrained:
        raise ValueError(
            "optimizer.backbone_lr_scale is 0, which freezes random weights: "
            "set config.pretrained too."
        )
    return total_steps, schedule, optimizer


def learning_rates(
    config: Mapping[str, Any], steps_per_epoch: Fraction
) -> optax.Schedule:
    """The learning rate at each step, of a config or of its JSON values."""
    optimizer, options = config["optimizer"], dict(config["schedule"])
    warmup_epochs = options.pop("warmup_epochs")
    return make_schedule(
        **options,
        learning_rate=optimizer["learning_rate"]
        * (config["batch_size"] / optimizer["base_batch_size"]),
        total_steps=round(config["epochs"] * steps_per_epoch),
        warmup_steps=round(warmup_epochs * steps_per_epoch),
    )


def open_sources(config: ConfigDict) -> tuple[Source, Source]:
    """Opens the train and the test split of the config's data set.

    Raises:
      ValueError: as `open_split`.
    """
    data = config.dataset
    return (
        open_split(config, data.train_split),
        open_split(config, data.test_split),
    )


def open_split(config: ConfigDict, split: str) -> Source:
    """Opens a split of the config's data set.

    Raises:
      ValueError: as `open_source`.
    """
    data = config.dataset
    splits = data.train_split, data.test_split
    return open_source(data.name, split, data.data_dir, data.on_error, splits)


def make_preprocessing(
    config: ConfigDict, source: Source
) -> tuple[Preprocessing, tuple[int, int, int]]:
    """The preprocessing of a source, and the shape of the images after it.

    Raises:
      ValueError: they do not fit together.
    """
    preprocessing = Preprocessing(**config.preprocessing)
    return preprocessing, _image_shape(source, preprocessing)


def _check_ranges(config: ConfigDict) -> None:
    for key, (inside, expected) in _RANGES.items():
        value = functools.reduce(getattr, key.split("."), config)
        if not inside(value):
            raise ValueError(f"{key} is {value!r}: must be {expected}.")


def make_model(options: ConfigDict, source: Source) -> DenseNet:
    """The network of a config's model section, with a source's classes.

    Raises:
      ValueError: an attribute out of range, or fewer classes than the source.
    """
    options = {k: v for k, v in options.items() if v is not None}
    check_choice("model.dtype", options["dtype"], ("float32", "bfloat16"))
    options["dtype"] = jnp.dtype(options["dtype"])
    options.setdefault("num_classes", source.num_classes)
    if options["num_classes"] < source.num_classes:
        raise ValueError(
            f"model.num_classes is {options['num_classes']} and the data set "
            f"has {source.num_classes} classes."
        )
    return create_model(options.pop("name"), **options)


def _image_shape(
    source: Source, preprocessing: Preprocessing
) -> tuple[int, int, int]:
    height, width, channels = source.image_shape
    if preprocessing.image_size is not None:
        height = width = preprocessing.image_size
    if None in (height, width, channels):
        raise ValueError(
            f"The data set's images are of shape {source.image_shape}, where "
            "None differs from image to image: set preprocessing.image_size."
        )
    for name in ("mean", "std"):
        values = getattr(preprocessing, name)
        if len(values) not in (1, channels):
            raise ValueError(
                f"preprocessing.{name} has {len(values)} values for images of "
                f"{channels} channels."
            )
    for name in ("color_jitter", "lighting"):
        if getattr(preprocessing, name) and channels != 3:
            raise ValueError(
                f"preprocessing.{name} is for images of 3 channels: the data "
                f"set's have {channels}."
            )
    return height, width, channels
