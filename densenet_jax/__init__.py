"""DenseNet in JAX and Flax."""

from densenet_jax.checkpoints.torch_weights import load_pretrained, save_torch
from densenet_jax.models.folding import fold_norms
from densenet_jax.models.platforms import compiler_options
from densenet_jax.models.registry import create_model, list_models

__all__ = [
    "compiler_options",
    "create_model",
    "fold_norms",
    "list_models",
    "load_pretrained",
    "save_torch",
]
