"""Metrics as sums over examples, which merge exactly by addition."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def example_sums(
    logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
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


def add(total: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two dicts of sums; either may be empty."""
    return {
        name: total.get(name, 0) + new.get(name, 0) for name in {**total, **new}
    }


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """Per example: loss in nats, top-1 and top-5 accuracy in [0, 1]."""
    return {
        name: float(sums[name]) / float(sums["count"])
        for name in ("loss", "top1", "top5")
    }
