"""One step of training and of evaluation: pure functions of arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from densenet_jax.training import losses, metrics
from densenet_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]


def random_keys(
    seed: int, step: jax.typing.ArrayLike, part: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The keys of dropout and of augmentation for a part of a step's batch."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    key = jax.random.fold_in(key, part)
    return key, jax.random.fold_in(key, 1)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    augment: Callable[[jax.Array, Batch], Batch] = lambda _, batch: batch,
    label_smoothing: float = 0.0,
    accumulate: int = 1,
    ema_decay: float | None = None,
    freeze_backbone: bool = False,
) -> tuple[TrainState, Sums]:
    """Takes one step of gradient descent.

    Args:
      state: donated under jit.
      batch: 'image' [batch, height, width, channels], 'label' [batch].
      model: applied with train=True.
      optimizer: whose state is in `state`.
      seed: of dropout and augmentation; each step draws its own.
      augment: takes a key and a batch, and returns the batch that the network
        sees; with 'other_label' and 'lam' [batch] where images are mixed.
      label_smoothing: see `losses.cross_entropy`.
      accumulate: the batch passes in so many equal parts, one after another,
        in a part of the memory. Norms see one part at a time, and so does
        augment; the running statistics move at each.
      ema_decay: of the averages in `state.ema`, capped early in the run at
        (1 + step) / (10 + step).
      freeze_backbone: only the classifier has a gradient; norms use their
        running statistics, which stay, and nothing is dropped out.

    Returns:
      The next state, and sums over the batch (see `metrics.example_sums`) with
      'grad_norm' and 'param_norm', the global norms of the mean gradient and
      of the parameters after the step.
    """

    def forward(params, batch_stats, images, key):
        if freeze_backbone:
            head = {"classifier": params["classifier"]}
            variables = {
                "params": {**jax.lax.stop_gradient(params), **head},
                "batch_stats": batch_stats,
            }
            return model.apply(variables, images, train=False), batch_stats
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return logits, updates.get("batch_stats", {})

    def loss_and_sums(params, batch_stats, part, index):
        dropout_key, augment_key = random_keys(seed, state.step, index)
        part = augment(augment_key, part)
        logits, batch_stats = forward(
            params, batch_stats, part["image"], dropout_key
        )
        each = losses.cross_entropy(logits, part["label"], label_smoothing)
        if "other_label" in part:
            other = losses.cross_entropy(
                logits, part["other_label"], label_smoothing
            )
            each = part["lam"] * each + (1 - part["lam"]) * other
        everyone = jnp.ones_like(part["label"], bool)
        sums = metrics.example_sums(logits, part["label"], each, everyone)
        return each.mean(), (batch_stats, sums)

    def one_part(carry, indexed_part):
        batch_stats, gradients, sums = carry
        new_gradients, (batch_stats, new_sums) = jax.grad(
            loss_and_sums, has_aux=True
        )(state.params, batch_stats, *indexed_part)
        gradients = jax.tree.map(jnp.add, gradients, new_gradients)
        return (batch_stats, gradients, metrics.add(sums, new_sums)), None

    if accumulate == 1:
        gradients, (batch_stats, sums) = jax.grad(loss_and_sums, has_aux=True)(
            state.params, state.batch_stats, batch, 0
        )
    else:
        parts = {name: _split(x, accumulate) for name, x in batch.items()}
        indexed_parts = (parts, jnp.arange(accumulate))
        _, (_, shapes) = jax.eval_shape(
            loss_and_sums,
            state.params,
            state.batch_stats,
            *jax.tree.map(lambda x: x[0], indexed_parts),
        )
        zeros = jax.tree.map(jnp.zeros_like, (state.params, shapes))
        (batch_stats, gradients, sums), _ = jax.lax.scan(
            one_part, (state.batch_stats, *zeros), indexed_parts
        )
        gradients = jax.tree.map(lambda g: g / accumulate, gradients)

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


def eval_step(
    variables: Mapping[str, Any],
    batch: Batch,
    *,
    model: nn.Module,
    normalize: Callable[[jax.Array], jax.Array] = lambda images: images,
) -> Sums:
    """Sums over a batch that has a 'mask' [batch] beside image and label.

    Args:
      variables: of the model.
      batch: 'image' [batch, height, width, channels], or [batch, crops,
        height, width, channels], whose logits are averaged as in the authors'
        code (fb.resnet.torch, train.lua); 'label' and 'mask' [batch].
      model: applied with train=False.
      normalize: of the images.

    Returns:
      See `metrics.example_sums`.
    """
    images = normalize(batch["image"])
    crops = images.reshape(-1, *images.shape[-3:])
    logits = model.apply(variables, crops, train=False)
    logits = logits.reshape(len(images), -1, logits.shape[-1]).mean(axis=1)
    each = losses.cross_entropy(logits, batch["label"])
    return metrics.example_sums(logits, batch["label"], each, batch["mask"])


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[batch, ...] -> [parts, batch / parts, ...].

    Every part takes rows at a stride, so that with a sharded batch each
    device splits the rows that it has and nothing moves.
    """
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
