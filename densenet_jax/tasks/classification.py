"""Classification: each image has one label.

What a task says, for the steps, the loop, the checkpoints and the tools, which
know no labels: what a batch holds, the loss, sums that merge, the value that
ranks checkpoints, and the line that a person reads.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Classification:
    """Softmax cross entropy; top-1 and top-5 accuracy.

    Attributes:
      label_smoothing: in training, the share of the target that is spread
        evenly over all classes (Szegedy et al., 1512.00567, section 7).
    """

    label_smoothing: float = 0.0

    def abstract_batch(
        self,
        batch_size: int,
        image_shape: Sequence[int],
        sharding: jax.sharding.Sharding,
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """'image' uint8 [batch, height, width, channels], 'label' [batch]."""
        shape = (batch_size, *image_shape)
        return {
            "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding),
            "label": jax.ShapeDtypeStruct(
                shape[:1], jnp.int32, sharding=sharding
            ),
        }

    def train_losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The loss of each example, float32 [batch], in nats.

        Args:
          logits: [batch, num_classes].
          batch: 'label' [batch]; of mixed images also 'other_label', and 'lam',
            the share of 'label' in the image and in its loss.
        """
        losses = cross_entropy(logits, batch["label"], self.label_smoothing)
        if "other_label" in batch:
            others = cross_entropy(
                logits, batch["other_label"], self.label_smoothing
            )
            losses = batch["lam"] * losses + (1 - batch["lam"]) * others
        return losses

    def train_sums(
        self, logits: jax.Array, batch: Batch, losses: jax.Array
    ) -> Sums:
        """See `example_sums`."""
        all_valid = jnp.ones_like(batch["label"], bool)
        return example_sums(logits, batch["label"], losses, all_valid)

    def eval_sums(self, logits: jax.Array, batch: Batch) -> Sums:
        """Sums over a batch that has a 'mask' [batch]; see `example_sums`.

        Args:
          logits: [batch, num_classes], or [batch * crops, num_classes] of
            crops of each image in turn, whose logits are averaged as in the
            authors' code (fb.resnet.torch, train.lua).
        """
        labels = batch["label"]
        logits = logits.reshape(len(labels), -1, logits.shape[-1]).mean(axis=1)
        losses = cross_entropy(logits, labels)
        return example_sums(logits, labels, losses, batch["mask"])

    def means(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Per example: loss in nats, top-1 and top-5 accuracy in [0, 1]."""
        return {
            name: float(sums[name]) / float(sums["count"])
            for name in ("loss", "top1", "top5")
        }

    def rank(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """Greater is better: by top-1 accuracy, of equals by the loss."""
        return metrics["top1"], -metrics["loss"]

    def headline(self, metrics: Mapping[str, float]) -> str:
        """The metric that ranks, in a few characters."""
        return f"{metrics['top1']:.2%}"

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The metrics on a line of the console."""
        return f"top-1 {metrics['top1']:.2%}, loss {metrics['loss']:.4f}"


CLASSIFICATION = Classification()


def cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Softmax cross entropy in nats.

    Args:
      logits: float32 [batch, num_classes].
      labels: int [batch].
      label_smoothing: see `Classification`.

    Returns:
      [batch].
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(targets, label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def example_sums(
    logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array
) -> Sums:
    """Sums over the examples where mask holds.

    Args:
      logits: [batch, num_classes].
      labels: int [batch].
      losses: [batch].
      mask: bool [batch].

    Returns:
      Scalars 'loss', 'top1', 'top5' (correct predictions) and 'count'.
    """
    # With fewer than five classes every class is among the first five.
    guesses = min(5, logits.shape[-1])
    _, ranked = jax.lax.top_k(logits, guesses)
    hits = ranked == labels[:, None]
    values = {
        "loss": losses,
        "top1": hits[:, 0],
        "top5": hits.any(axis=-1),
        "count": jnp.ones_like(labels),
    }
    return {name: jnp.sum(v, where=mask) for name, v in values.items()}
