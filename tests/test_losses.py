import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.training.losses import cross_entropy


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
