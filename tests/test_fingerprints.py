"""Golden values are of the same sums written in numpy, below."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.runs.fingerprints import digest, fingerprints
from densenet_jax.training import sharding


def _mix(x):
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def expected(array):
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    words = array.ravel().view(bits).astype(np.uint32)
    index = np.arange(words.size, dtype=np.uint32) + np.uint32(0x9E3779B9)
    return int(np.sum(_mix(words ^ _mix(index)), dtype=np.uint32))


def _arrays():
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(3, 5, 2)).astype(np.float32)
    floats[0, 0] = np.nan, -0.0
    return {
        "float32": floats,
        "bfloat16": rng.normal(size=(2, 7)).astype(jnp.bfloat16),
        "int32": rng.integers(-9, 9, size=16, dtype=np.int32),
        "uint8": rng.integers(0, 255, size=(4, 4), dtype=np.uint8),
        "bool": rng.integers(0, 2, size=9).astype(bool),
        "scalar": np.array(7, np.int32),
    }


@pytest.mark.parametrize("name", _arrays())
def test_they_are_the_sums_that_are_meant(name):
    array = _arrays()[name]

    assert fingerprints(jnp.asarray(array)) == {"": expected(array)}


def test_each_array_has_its_own_by_its_path():
    tree = {"a": [_arrays()["float32"], _arrays()["int32"]], "b": {}}
    same = {"c": np.zeros(4, np.float32), "d": np.zeros(4, np.float32)}

    assert fingerprints({**tree, **same}) == {
        "a/0": expected(tree["a"][0]),
        "a/1": expected(tree["a"][1]),
        "c": expected(same["c"]),
        "d": expected(same["d"]),
    }


@pytest.mark.parametrize("name", ["float32", "bfloat16", "uint8"])
def test_every_bit_counts(name):
    array = _arrays()[name]
    changed = []
    for place in range(array.nbytes * 8):
        raw = bytearray(array.tobytes())
        raw[place // 8] ^= 1 << place % 8
        changed.append(np.frombuffer(raw, array.dtype).reshape(array.shape))

    found = fingerprints(changed)

    assert expected(array) not in found.values()
    assert len(set(found.values())) == len(found)


def test_elements_that_change_places_are_noticed():
    array = np.arange(64, dtype=np.float32)
    # Sums with weights 2 i + 1 do not see the highest bit move.
    array[0], array[32] = 0.0, -0.0
    swapped = array.copy()
    swapped[[0, 32]] = swapped[[32, 0]]
    rolled, turned = np.roll(array, 1), array.reshape(8, 8).T.ravel()

    found = fingerprints([array, swapped, rolled, turned])

    assert len(set(found.values())) == 4


def test_shards_have_the_fingerprint_of_the_whole():
    mesh = sharding.make_mesh()
    array = jnp.arange(64.0).reshape(16, 4)
    parts = jax.device_put(array, sharding.over_data(mesh))
    copies = jax.device_put(array, sharding.replicated(mesh))
    assert not parts.sharding.is_fully_replicated

    assert fingerprints([parts, copies]) == dict.fromkeys(
        ["0", "1"], expected(np.asarray(array))
    )


def test_a_digest_is_of_values_not_of_their_text():
    assert digest({"a": (1, 2.0), "b": None}) == digest(
        {"b": None, "a": [1, 2.0]}
    )
    assert digest({"a": 1}) != digest({"a": 2})
