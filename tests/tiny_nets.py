"""Small nets, and what tests of files ask of them."""

from pathlib import Path

import jax
import numpy as np
import pytest

from densenet_jax.models.densenet import DenseNet
from densenet_jax.weights.containers import open_tensors

GOLDEN = Path(__file__).parent / "data" / "weights"

TINY = DenseNet(
    block_layers=(2, 1), growth_rate=4, bottleneck_width=2, num_classes=3
)
CIFAR = DenseNet(
    block_layers=(2, 2),
    growth_rate=4,
    compression=1.0,
    bottleneck_width=0,
    stem="cifar",
    stem_norm=False,
    num_classes=10,
)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_refused(path, match):
    """In one line."""
    with pytest.raises(ValueError, match=match) as error:
        open_tensors(path)
    assert "\n" not in str(error.value)
