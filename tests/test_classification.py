import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.tasks.classification import (
    Classification,
    cross_entropy,
    example_sums,
)
from densenet_jax.tasks.sums import merge

TASK = Classification()


def test_cross_entropy_against_the_formula():
    logits = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], np.float32)
    labels = np.array([1, 0])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(got, -log_p[[0, 1], labels], rtol=1e-6)
    # Smoothing by s: (1 - s) on the label, s / classes on every class.
    expected = -(0.7 * log_p[[0, 1], labels] + 0.1 * log_p.sum(-1))
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_large_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4]])
    labels = jnp.array([1])
    assert cross_entropy(logits, labels)[0] == 2e4
    gradient = jax.grad(lambda x: cross_entropy(x, labels).sum())(logits)
    np.testing.assert_array_equal(gradient, [[1.0, -1.0]])


def _sums(*arrays):
    logits, labels, mask, losses = map(jnp.asarray, arrays)
    return example_sums(logits, labels, losses, mask)


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
    whole = TASK.means(_sums(logits, labels, mask, losses))
    parts = {}
    for part in (slice(0, 4), slice(4, 6)):
        sums = _sums(logits[part], labels[part], mask[part], losses[part])
        parts = merge(parts, sums)
    assert TASK.means(parts) == pytest.approx(whole)
    assert whole["top5"] == 1.0  # three classes
