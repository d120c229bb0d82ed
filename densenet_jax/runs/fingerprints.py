"""Integers that tell whether a checkpoint holds what was saved.

Those of arrays are computed on the devices, before they are saved and after
they are restored: whatever happens on the way, in memory, in a library or on
a disk, changes them. They depend on the values and their places alone, not on
how an array is sharded or stored.
"""

import collections
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def describe_arrays(tree: Any) -> dict[str, str]:
    """The shape and dtype of every array by its path, as '(2, 3) float32'."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{tuple(leaf.shape)} {leaf.dtype}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def fingerprints(tree: Any) -> dict[str, int]:
    """A number in [0, 2**32) for every array of a tree, by its path.

    Any change of one element changes it; any other change leaves it as it was
    with a probability of about 2**-32. Waits for the arrays.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return {}
    sums = _compiled(_replicated(getattr(leaves[0], "sharding", None)))(leaves)
    return dict(zip(describe_arrays(tree), jax.device_get(sums).tolist()))


def digest(value: Any) -> str:
    """A hash of JSON values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def make_record(
    state: Any, config: Mapping[str, Any], metrics: Mapping[str, float] | None
) -> dict[str, Any]:
    """What is kept with a checkpoint to tell later whether it is whole."""
    shapes = describe_arrays(state)
    record = {
        "arrays": {
            path: [shapes[path], number]
            for path, number in fingerprints(state).items()
        },
        "config": digest(config),
        "metrics": digest(metrics),
    }
    return {**record, "record": digest(record)}


@functools.cache
def _compiled(sharding):
    return jax.jit(_sums, out_shardings=sharding)


def _replicated(sharding):
    """Where every process can read the numbers."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return sharding.update(spec=jax.sharding.PartitionSpec())
    return None


def _sums(arrays: Sequence[jax.Array]) -> jax.Array:
    """[arrays]: of each, the sum of a hash of every element and its index."""
    groups = collections.defaultdict(list)
    for number, x in enumerate(arrays):
        groups[x.shape, x.dtype].append(number)
    # A reduction for each shape, not for each array: a net has hundreds of
    # arrays and few shapes, and compiling takes a tenth of the time.
    sums = [
        _sums_of_stack(jnp.stack([arrays[number] for number in group]))
        for group in groups.values()
    ]
    order = [number for group in groups.values() for number in group]
    places = sorted(range(len(order)), key=order.__getitem__)
    return jnp.concatenate(sums)[jnp.array(places)]


def _sums_of_stack(stack: jax.Array) -> jax.Array:
    words = _words(stack)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(1, words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        places = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += places * jnp.uint32(stride)
    # One to one in the word, so that any change of one word is noticed; not
    # linear, so that words that change places are noticed too.
    hashed = _mix(words ^ _mix(index + jnp.uint32(0x9E3779B9)))
    # Modulo 2**32, in any order: sums of parts on several devices agree.
    return jnp.sum(hashed, axis=range(1, words.ndim), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit integers whose every output bit depends on
    every input bit: multiplications by odd numbers, and shifts."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as 32-bit integers, one or more an element."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    # Complex numbers are pairs to the devices, not bits.
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
