"""Losses of each example."""

import jax
import optax


def cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Softmax cross entropy in nats.

    Args:
      logits: float32 [batch, num_classes].
      labels: int [batch].
      label_smoothing: share of the target spread evenly over all classes
        (Szegedy et al., 1512.00567, section 7).

    Returns:
      [batch].
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(targets, label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)
