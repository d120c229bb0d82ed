"""How a dense block is differentiated: what is kept, in which order.

What a dense block computes is defined in `densenet`; everything here wraps that
definition. `nn.remat` recomputes any layer. For layers that name their stages
there is a backward pass of our own, which keeps the outputs of convolutions and
recomputes concatenation, norm and ReLU (Pleiss et al., Memory-Efficient
Implementation of DenseNets, 1707.06990).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from densenet_jax.models.layers import (
    CONV_OUTPUT,
    Maps,
    Moments,
    add_moments_gradient,
    at_least_float32,
    concatenate,
)
from densenet_jax.models.stages import StagedLayer

# Sum pending gradients in groups of this size: larger groups cost memory (up
# to one block output each), smaller ones extra passes.
_MAX_PENDING = 4


def block_policy(remat: str, block: int, num_blocks: int) -> str:
    """The policy of a block, counted from 1: 'early' differs between them."""
    if remat != "early":
        return remat
    return "layer" if block <= num_blocks / 2 else "convs"


def has_own_backward(layer: type[nn.Module], remat: str) -> bool:
    """Whether `by_stages` serves a policy of this layer.

    Not of one that does something else with its stages than calling them.
    """
    return (
        remat in ("convs", "layer")
        and issubclass(layer, StagedLayer)
        and layer.__call__ is StagedLayer.__call__
    )


def wrap_layer(layer: type[nn.Module], remat: str) -> type[nn.Module]:
    """The layer under `nn.remat`, where that is what serves a policy."""
    if remat == "none" or has_own_backward(layer, remat):
        return layer
    policy = None
    if remat.endswith("convs"):
        policy = jax.checkpoint_policies.save_only_these_names(CONV_OUTPUT)
    # Of __call__(self, features, train), train is static.
    return nn.remat(layer, static_argnums=(2,), policy=policy)


class _Layer(NamedTuple):
    """What the backward pass needs of a layer.

    Attributes:
      params: of the layer.
      others: its other variables before the step.
      keys: of the random numbers of each stage; None without any.
      inner: what each stage but the first reads.
    """

    params: Mapping[str, Any]
    others: Mapping[str, Any]
    keys: Sequence[jax.Array | None]
    inner: Sequence[Maps]


def by_stages(
    dense_block: Callable[[nn.Module, jax.Array], Maps],
    layers: Sequence[nn.Module],
    *,
    measure: Callable[[jax.Array], Maps],
    keep_stages: bool,
    materialize: Callable[[jax.Array], jax.Array],
) -> Callable[[nn.Module, jax.Array], Maps]:
    """A dense block in training, with a backward pass of its own.

    Layers read the first channels of one array, in both passes: a concatenation
    for each would be stored for each, and XLA would merge the backward pass's
    with the forward pass's and keep them all.

    Args:
      dense_block: the definition, (block, x) -> features. `block.layers` are
        its layers, and `block.growth_rates` the channels that they make.
      layers: the same layers, unbound: functions of their variables. Each has
        `stages`, the names of methods (x: Maps, train, key) -> array, of which
        each but the first reads the measured output of the one before.
      measure: an array -> the array with its moments.
      keep_stages: keep the outputs of all stages, rather than of the last.
      materialize: see `ops.Operations`.
    """

    def forward(block, x):
        channels = x.shape[-1]
        total = channels + sum(block.growth_rates)
        features = jax.lax.empty((*x.shape[:-1], total), x.dtype)
        features = jax.lax.dynamic_update_slice_in_dim(features, x, 0, axis=-1)
        maps, kept = [measure(x)], []
        for layer in block.layers:
            # Read before the stages below move running statistics.
            others = dict(layer.variables)
            params = others.pop("params", {})
            keys = [layer.stage_key(train=True) for _ in layer.stages]
            moments = concatenate(maps).moments
            read = Maps(features[..., :channels], moments)
            inner = []
            for stage, key in zip(layer.stages, keys):
                inner.append(read)
                new = getattr(layer, stage)(read, True, key)
                read = measure(new)
            kept.append(_Layer(params, others, keys, inner[1:]))
            features = jax.lax.dynamic_update_slice_in_dim(
                features, new, channels, axis=-1
            )
            maps.append(read)
            channels += new.shape[-1]
        output = Maps(features, concatenate(maps).moments)
        if not keep_stages:
            kept = [
                k._replace(inner=[Maps(None, m.moments) for m in k.inner])
                for k in kept
            ]
        return output, (output, kept)

    def backward(residuals, gradient):
        return _backward(layers, materialize, residuals, gradient)

    return nn.custom_vjp(dense_block, forward, backward)


def _backward(layers, materialize, residuals, gradient):
    (features, moments), kept = residuals
    # Gradients of the features, one a consumer, not yet summed: a layer needs
    # the sum for its own channels alone.
    pending, moments_gradient = [gradient.array], gradient.moments
    channels = features.shape[-1]
    gradients = {}
    for i, layer in reversed(list(enumerate(kept, 1))):
        channels, end = channels - layers[i - 1].growth_rate, channels
        own = slice(channels, end)
        new = add_moments_gradient(
            _total(pending, own),
            Maps(features[..., own], moments[own]),
            moments_gradient[own],
        )
        # Recompute this layer only after the gradients of later layers exist:
        # XLA cannot know that these are zeros. (XLA:CPU drops a barrier; for
        # TPUs it copies what is behind one into another layout.)
        delayed = features + 0 * new[:, :1, :1, :1]
        zero = 0 * moments_gradient.mean.ravel()[0]
        read = Maps(delayed[..., :channels], moments[:channels])
        params_gradient, x_gradient, x_moments_gradient = _layer_gradient(
            layers[i - 1], layer, read, new, zero, materialize
        )
        if params_gradient:
            gradients[f"denselayer{i}"] = params_gradient
        pending.append(x_gradient)
        if len(pending) > _MAX_PENDING:
            total = _total(pending, slice(channels)).astype(features.dtype)
            pending = [materialize(total)]
        moments_gradient = jax.tree.map(
            jnp.add, moments_gradient[:channels], x_moments_gradient
        )
    own = slice(channels)
    x_gradient = add_moments_gradient(
        _total(pending, own),
        Maps(features[..., own], moments[own]),
        moments_gradient,
    )
    return {"params": gradients}, x_gradient


def _layer_gradient(module, layer, read, gradient, zero, materialize):
    """The gradients of a layer's params, input array and input moments.

    Args:
      module: the layer, unbound.
      layer: what was kept of it.
      read: its input, to recompute from.
      gradient: of its output.
      zero: that exists only after the gradients of later layers.
    """

    def stage_function(stage, key):
        def run(params, array, moments):
            output, _ = module.apply(
                {**layer.others, "params": params},
                Maps(array, moments),
                True,
                key,
                method=stage,
                mutable=flax.core.DenyList("params"),
            )
            return output

        return run

    vjps, inner = [], []
    for i, (stage, key) in enumerate(zip(module.stages, layer.keys)):
        output, vjp = jax.vjp(stage_function(stage, key), layer.params, *read)
        vjps.append(vjp)
        if i < len(layer.inner):
            array, moments = layer.inner[i]
            array = output if array is None else array
            inner.append(Maps(array, moments))
            delayed = Moments(*(materialize(m + zero) for m in moments))
            read = Maps(array, delayed)
    params_gradient, gradient, moments_gradient = vjps.pop()(gradient)
    while vjps:
        gradient = add_moments_gradient(gradient, inner.pop(), moments_gradient)
        more, gradient, moments_gradient = vjps.pop()(gradient)
        params_gradient = jax.tree.map(jnp.add, params_gradient, more)
    return params_gradient, gradient, moments_gradient


def _total(gradients, channels):
    return sum(at_least_float32(g[..., channels]) for g in gradients)
