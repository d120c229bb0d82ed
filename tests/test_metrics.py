import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.training import metrics


def _sums(*arrays):
    logits, labels, mask, losses = map(jnp.asarray, arrays)
    return metrics.example_sums(logits, labels, losses, mask)


def test_masked_tail_counts_for_nothing():
    logits = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)
    labels = np.arange(8) % 7
    mask = np.arange(8) < 5
    losses = np.arange(8, dtype=np.float32)
    got = jax.device_get(_sums(logits, labels, mask, losses))
    ranked = np.argsort(-logits, axis=-1)
    # Example by example, as a loop over the real ones would.
    assert got["top1"] == sum(ranked[i, 0] == labels[i] for i in range(5))
    assert got["top5"] == sum(labels[i] in ranked[i, :5] for i in range(5))
    assert (got["count"], got["loss"]) == (5, 10)


def test_parts_merge_to_the_whole():
    logits = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    labels, mask = np.array([0, 1, 2, 0, 1, 2]), np.ones(6, bool)
    losses = np.arange(6, dtype=np.float32) ** 2
    whole = metrics.means(_sums(logits, labels, mask, losses))
    parts = {}
    for part in (slice(0, 4), slice(4, 6)):
        sums = _sums(logits[part], labels[part], mask[part], losses[part])
        parts = metrics.add(parts, sums)
    assert metrics.means(parts) == pytest.approx(whole)
    assert whole["top5"] == 1.0  # three classes
