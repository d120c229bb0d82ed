import copy

import pytest

from densenet_jax.runs.config import upgrade


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"model": {"form": "products"}},
            {"model": {"implementation": "matmul"}},
        ),
        ({"model": {"form": "native"}}, {"model": {"implementation": "xla"}}),
        ({"model": {"form": None}}, {"model": {"implementation": None}}),
        ({"model": {"remat": "half"}}, {"model": {"remat": "early"}}),
        ({"model": {"remat": "convs"}}, {"model": {"remat": "convs"}}),
        (
            {"optimizer": {"body_rate": 0.1, "name": "sgd"}},
            {"optimizer": {"backbone_lr_scale": 0.1, "name": "sgd"}},
        ),
        ({"optimizer": {"name": "sgd"}}, {"optimizer": {"name": "sgd"}}),
    ],
)
def test_earlier_keys_become_those_of_today(old, new):
    before = copy.deepcopy(old)
    assert upgrade(old) == new
    assert old == before  # nothing is changed in place
    assert upgrade(new) == new
