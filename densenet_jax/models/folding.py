"""Norms that follow a convolution, made part of it for inference."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from densenet_jax.models import geometry
from densenet_jax.models.densenet import DenseNet


def fold_norms(
    model: DenseNet, variables: Mapping[str, Any]
) -> tuple[DenseNet, dict[str, Any]]:
    """A model for inference without the norms that follow a convolution.

    With running statistics a norm multiplies and adds channel by channel, which
    the convolution before it does as well with another kernel and a bias:
    norm0 goes into conv0, norm2 of each dense layer into its conv1, and only
    their biases are left. The other norms stay: a ReLU lies between them and
    the next convolution, and the convolutions before them have other readers.

    >>> folded, folded_variables = fold_norms(model, variables)
    >>> logits = folded.apply(folded_variables, images)

    Args:
      model: as it was trained.
      variables: its {'params', 'batch_stats'}; not changed.

    Returns:
      The model with folded=True, and its variables. Outputs are the same
      within rounding. Training it is an error.

    Raises:
      ValueError: the norms are folded already, or not batch normalisation, or
        variables are another model's.
    """
    if model.folded:
        raise ValueError("The norms of this model are folded already.")
    if model.norm != "batch":
        raise ValueError(
            f"The model has norm={model.norm!r}: only batch normalisation, "
            "whose moments are known in inference, can be folded."
        )
    try:
        params = flatten_dict(variables["params"], sep="/")
        batch_stats = flatten_dict(variables["batch_stats"], sep="/")
        for operation in geometry.walk(model):
            norm, conv = operation.path, operation.folds_into
            if conv is None:
                continue
            scale = params.pop(f"{norm}/scale")
            variance = batch_stats.pop(f"{norm}/var")
            mean = batch_stats.pop(f"{norm}/mean")
            factor = scale * lax.rsqrt(variance + model.norm_epsilon)
            kernel = params[f"{conv}/kernel"]
            params[f"{conv}/kernel"] = kernel * jnp.expand_dims(
                factor, (0, 1, 2)
            )
            params[f"{norm}/bias"] = params[f"{norm}/bias"] - mean * factor
    except KeyError as error:
        raise ValueError(
            f"The variables have no {error}: they are not this model's."
        ) from error
    return model.copy(folded=True), {
        "params": unflatten_dict(params, sep="/"),
        "batch_stats": unflatten_dict(batch_stats, sep="/"),
    }
