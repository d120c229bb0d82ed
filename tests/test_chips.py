import pytest

from densenet_jax.planning.chips import CHIPS, find_chip, num_chips, topologies


def test_a_topology_names_its_chip():
    assert find_chip("v5e:2x4") is CHIPS["v5e"]
    assert find_chip("v5p:2x2x1") is CHIPS["v5p"]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5:2x4", r"Unknown TPU 'v5'. .* Known: v4, v5e, v5p, v6e"),
        ("v5e:3x3", r"topology 'v5e:3x3'.* v5e:1x1, .*v5e:16x16\."),
        ("v4:2x2", r"Did you mean v4:2x2x\d"),
        ("v6e", r"Known: v6e:1x1"),
    ],
)
def test_another_is_answered_with_those_there_are(topology, message):
    with pytest.raises(ValueError, match=message):
        find_chip(topology)


def test_number_of_chips():
    assert num_chips("v5e:1x1") == 1
    assert num_chips("v5e:2x4") == 8
    assert num_chips("v4:2x2x4") == 16


@pytest.mark.parametrize("name", CHIPS)
def test_figures_are_a_chips(name):
    """The MXUs' rate follows from documented sizes and a plausible clock."""
    multiply_adds = {  # a cycle: cores x MXUs x side x side
        "v4": 2 * 4 * 128**2,
        "v5e": 1 * 4 * 128**2,
        "v5p": 2 * 4 * 128**2,
        "v6e": 1 * 2 * 256**2,
    }
    clock = CHIPS[name].peak / (2 * multiply_adds[name])
    assert 0.9e9 < clock < 4e9
    assert topologies(name)[0].startswith(f"{name}:1x1")
