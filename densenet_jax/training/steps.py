"""One step of training and of evaluation: pure functions of arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from densenet_jax.tasks.classification import (
    CLASSIFICATION,
    Batch,
    Classification,
    Sums,
)
from densenet_jax.tasks.sums import merge
from densenet_jax.training.state import TrainState


def random_keys(
    seed: int, step: jax.typing.ArrayLike, microbatch: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The keys of dropout and of augmentation for a microbatch of a step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    key = jax.random.fold_in(key, microbatch)
    return key, jax.random.fold_in(key, 1)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    task: Classification = CLASSIFICATION,
    augment: Callable[[jax.Array, Batch], Batch] = lambda _, batch: batch,
    accumulate: int = 1,
    ema_decay: float | None = None,
    freeze_backbone: bool = False,
) -> tuple[TrainState, Sums]:
    """Takes one step of gradient descent.

    Args:
      state: donated under jit.
      batch: as `task.abstract_batch` says.
      model: applied with train=True.
      optimizer: whose state is in `state`.
      seed: of dropout and augmentation; each step draws its own.
      task: what is learned.
      augment: takes a key and a batch, and returns the batch that the network
        sees.
      accumulate: number of microbatches, run in sequence to save memory. Norms
        and augment see one microbatch at a time; the running statistics move
        at each.
      ema_decay: of the averages in `state.ema`, capped early in the run at
        (1 + step) / (10 + step).
      freeze_backbone: only the classifier has a gradient; norms use their
        running statistics, which stay, and nothing is dropped out.

    Returns:
      The next state, and the task's sums over the batch with 'grad_norm' and
      'param_norm', the global norms of the mean gradient and of the parameters
      after the step.
    """

    def loss_and_sums(params, batch_stats, microbatch, index):
        dropout_key, augment_key = random_keys(seed, state.step, index)
        microbatch = augment(augment_key, microbatch)
        outputs, batch_stats = _forward(
            model,
            params,
            batch_stats,
            microbatch["image"],
            dropout_key,
            freeze_backbone,
        )
        losses = task.train_losses(outputs, microbatch)
        sums = task.train_sums(outputs, microbatch, losses)
        return losses.mean(), (batch_stats, sums)

    gradients, batch_stats, sums = _gradients(
        loss_and_sums, state, batch, accumulate
    )
    updates, opt_state = optimizer.update(
        gradients, state.opt_state, state.params
    )
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    if ema_decay is not None:
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
        state = state.replace(
            ema=optax.incremental_update(state.variables, state.ema, 1 - decay)
        )
    norms = {
        "grad_norm": optax.tree.norm(gradients),
        "param_norm": optax.tree.norm(state.params),
    }
    return state, {**sums, **norms}


def _forward(model, params, batch_stats, images, key, freeze_backbone):
    """Outputs and new statistics, as in training."""
    if freeze_backbone:
        head = {"classifier": params["classifier"]}
        variables = {
            "params": {**jax.lax.stop_gradient(params), **head},
            "batch_stats": batch_stats,
        }
        return model.apply(variables, images, train=False), batch_stats
    outputs, updates = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    return outputs, updates.get("batch_stats", {})


def _gradients(loss_and_sums, state, batch, accumulate):
    """Mean gradients, new statistics and sums of microbatches in sequence."""
    gradient = jax.grad(loss_and_sums, has_aux=True)
    if accumulate == 1:
        gradients, (batch_stats, sums) = gradient(
            state.params, state.batch_stats, batch, 0
        )
        return gradients, batch_stats, sums

    def add_microbatch(carry, indexed_microbatch):
        batch_stats, gradients, sums = carry
        new_gradients, (batch_stats, new_sums) = gradient(
            state.params, batch_stats, *indexed_microbatch
        )
        gradients = jax.tree.map(jnp.add, gradients, new_gradients)
        return (batch_stats, gradients, merge(sums, new_sums)), None

    microbatches = {name: _split(x, accumulate) for name, x in batch.items()}
    indexed = (microbatches, jnp.arange(accumulate))
    _, (_, abstract_sums) = jax.eval_shape(
        loss_and_sums,
        state.params,
        state.batch_stats,
        *jax.tree.map(lambda x: x[0], indexed),
    )
    zeros = jax.tree.map(jnp.zeros_like, (state.params, abstract_sums))
    (batch_stats, gradients, sums), _ = jax.lax.scan(
        add_microbatch, (state.batch_stats, *zeros), indexed
    )
    gradients = jax.tree.map(lambda g: g / accumulate, gradients)
    return gradients, batch_stats, sums


def eval_step(
    variables: Mapping[str, Any],
    batch: Batch,
    *,
    model: nn.Module,
    task: Classification = CLASSIFICATION,
    normalize: Callable[[jax.Array], jax.Array] = lambda images: images,
) -> Sums:
    """The task's sums over a batch that has a 'mask' [batch].

    Args:
      variables: of the model.
      batch: 'image' [batch, height, width, channels], or [batch, crops,
        height, width, channels]; what the task reads; 'mask' [batch].
      model: applied with train=False.
      task: what was learned.
      normalize: of the images.
    """
    images = normalize(batch["image"])
    images = images.reshape(-1, *images.shape[-3:])
    return task.eval_sums(model.apply(variables, images, train=False), batch)


def _split(x: jax.Array, microbatches: int) -> jax.Array:
    """[batch, ...] -> [microbatches, batch / microbatches, ...].

    Every microbatch takes rows at a stride, so that with a sharded batch each
    device splits the rows that it has and nothing moves.
    """
    return jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1)
