"""Norms that follow a convolution, made part of it for inference."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from densenet_jax.models.densenet import DenseNet


def fold_norms(
    model: DenseNet, variables: Mapping[str, Any]
) -> tuple[DenseNet, dict[str, Any]]:
    """A model for inference without the norms that follow a convolution.

    With running statistics a norm multiplies and adds channel by channel, which
    the convolution before it does as well with another kernel and a bias:
    norm0 goes into conv0, norm2 of each dense layer into its conv1. The other
    norms stay: a ReLU lies between them and the next convolution, and the
    convolutions before them have other readers.

    >>> folded, folded_variables = fold_norms(model, variables)
    >>> logits = folded.apply(folded_variables, images)

    Args:
      model: as it was trained.
      variables: its {'params', 'batch_stats'}; not changed.

    Returns:
      The model with folded=True, and its variables. Outputs are the same
      within rounding. Training it is an error.

    Raises:
      ValueError: the norms are folded already, or variables are another
        model's.
    """
    if model.folded:
        raise ValueError("The norms of this model are folded already.")
    try:
        params = flatten_dict(variables["params"], sep="/")
        batch_stats = flatten_dict(variables["batch_stats"], sep="/")
        for conv, norm in _followed_convs(model):
            scale = params.pop(f"{norm}/scale")
            variance = batch_stats.pop(f"{norm}/var")
            mean = batch_stats.pop(f"{norm}/mean")
            factor = scale * lax.rsqrt(variance + model.norm_epsilon)
            kernel = params[f"{conv}/kernel"]
            params[f"{conv}/kernel"] = kernel * jnp.expand_dims(
                factor, (0, 1, 2)
            )
            params[f"{conv}/bias"] = params.pop(f"{norm}/bias") - mean * factor
    except KeyError as error:
        raise ValueError(
            f"The variables have no {error}: they are not this model's."
        ) from error
    return model.copy(folded=True), {
        "params": unflatten_dict(params, sep="/"),
        "batch_stats": unflatten_dict(batch_stats, sep="/"),
    }


def _followed_convs(model: DenseNet) -> Iterator[tuple[str, str]]:
    """The paths of each convolution that a norm follows, and of the norm."""
    if model.stem_norm:
        yield "conv0", "norm0"
    if model.bottleneck_width:
        for block, num_layers in enumerate(model.block_layers, 1):
            for layer in range(1, num_layers + 1):
                path = f"denseblock{block}/denselayer{layer}"
                yield f"{path}/conv1", f"{path}/norm2"
