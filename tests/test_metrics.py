import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.training import metrics


def _sums(logits, labels, mask):
    losses = jnp.arange(len(labels), dtype=jnp.float32)
    return metrics.example_sums(
        jnp.asarray(logits), jnp.asarray(labels), losses, jnp.asarray(mask)
    )


def test_masked_tail_counts_for_nothing():
    logits = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)
    labels = np.arange(8) % 7
    mask = np.arange(8) < 5
    got = jax.device_get(_sums(logits, labels, mask))
    ranked = np.argsort(-logits, axis=-1)
    # Example by example, as a loop over the real ones would.
    assert got["top1"] == sum(ranked[i, 0] == labels[i] for i in range(5))
    assert got["top5"] == sum(labels[i] in ranked[i, :5] for i in range(5))
    assert (got["count"], got["loss"]) == (5, 10)


def test_parts_merge_to_the_whole():
    logits = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    labels, mask = np.array([0, 1, 2, 0, 1, 2]), np.ones(6, bool)
    logits[:, 0] += 1e-3
    whole = metrics.means(_sums(logits, labels, mask))
    parts = {}
    for part in (slice(0, 4), slice(4, 6)):
        part_sums = _sums(logits[part], labels[part], mask[part])
        parts = metrics.add(parts, {**part_sums, "loss": part_sums["loss"]})
    assert parts["count"] == 6
    assert float(parts["top1"]) / 6 == pytest.approx(whole["top1"])
    assert whole["top5"] == 1.0  # three classes
