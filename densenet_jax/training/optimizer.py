"""Learning rate schedules and optimizers by name, from optax's parts."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from densenet_jax.choices import check_choice

SCHEDULES = ("step", "cosine")
OPTIMIZERS = ("sgd", "adamw", "lars", "lamb")


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int,
    boundaries: Sequence[float],
    factor: float,
) -> optax.Schedule:
    """The learning rate at each step.

    Args:
      name: 'step' multiplies by `factor` at each boundary; 'cosine' decays to
        zero (Loshchilov and Hutter, 1608.03983).
      learning_rate: the highest, after the warm-up.
      total_steps: length of the run.
      warmup_steps: of these, the first that rise linearly from zero.
      boundaries: for 'step', shares of total_steps, as (0.5, 0.75).
      factor: for 'step'.

    Raises:
      ValueError: an unknown name, or numbers that make no schedule.
    """
    check_choice("schedule", name, SCHEDULES)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"A warm-up of {warmup_steps} steps does not fit a run of "
            f"{total_steps}: shorten schedule.warmup_epochs."
        )
    if not all(0 < b < 1 for b in boundaries):
        raise ValueError(
            f"schedule.boundaries {tuple(boundaries)} must lie between 0 and "
            "1: they are shares of the run."
        )
    if name == "cosine":
        main = optax.cosine_decay_schedule(
            learning_rate, total_steps - warmup_steps
        )
    else:
        factors = collections.defaultdict(lambda: 1.0)
        for boundary in boundaries:
            factors[round(boundary * total_steps) - warmup_steps] *= factor
        main = optax.piecewise_constant_schedule(learning_rate, factors)
    if warmup_steps:
        rise = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        main = optax.join_schedules([rise, main], [warmup_steps])
    # optax would promote an integer step silently.
    return lambda step: main(jnp.asarray(step, jnp.float32))


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    decay_norms_and_biases: bool,
    clip_norm: float | None,
    backbone_lr_scale: float = 1.0,
) -> optax.GradientTransformation:
    """An optimizer with weight decay and gradient clipping.

    Args:
      name: 'sgd' (decay added to the gradient, as PyTorch and the paper),
        'adamw', 'lars' or 'lamb'.
      schedule: from `make_schedule`.
      momentum, nesterov: for 'sgd' and 'lars'.
      weight_decay: per step, on kernels.
      decay_norms_and_biases: and on norm scales and all biases, as the paper.
      clip_norm: largest global norm of a gradient; None does not clip.
      backbone_lr_scale: of the learning rate, for all parameters but the
        classifier's; 0 leaves them as they are.

    Raises:
      ValueError: an unknown name, or a negative rate.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    if backbone_lr_scale < 0:
        raise ValueError(
            f"optimizer.backbone_lr_scale is {backbone_lr_scale}: must not be "
            "negative."
        )

    def make(schedule):
        return _make(
            name,
            schedule,
            momentum,
            nesterov,
            weight_decay,
            mask=None if decay_norms_and_biases else is_kernel,
        )

    optimizer = make(schedule)
    if backbone_lr_scale != 1:
        body = (
            make(lambda step: backbone_lr_scale * schedule(step))
            if backbone_lr_scale
            else optax.set_to_zero()
        )
        optimizer = optax.partition(
            {True: optimizer, False: body}, _is_classifier
        )
    if clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def _make(name, schedule, momentum, nesterov, weight_decay, mask):
    if name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask),
            optax.sgd(schedule, momentum, nesterov),
        )
    if name == "adamw":
        return optax.adamw(schedule, weight_decay=weight_decay, mask=mask)
    if name == "lars":
        return optax.lars(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=True if mask is None else mask,
            trust_ratio_mask=is_kernel,
            momentum=momentum,
            nesterov=nesterov,
        )
    return optax.lamb(schedule, weight_decay=weight_decay, mask=mask)


def _is_classifier(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key == "classifier", params
    )


def is_kernel(params: Any) -> Any:
    """The same tree, True where the parameter is a kernel."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
