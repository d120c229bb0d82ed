"""DenseNet in JAX and Flax."""

from densenet_jax.models.folding import fold_norms
from densenet_jax.models.ops import compiler_options
from densenet_jax.models.variants import create_model, list_models
from densenet_jax.weights.export import save_pretrained, save_torch
from densenet_jax.weights.load import load_pretrained
from densenet_jax.weights.pretrained import list_pretrained

__all__ = [
    "compiler_options",
    "create_model",
    "fold_norms",
    "list_models",
    "list_pretrained",
    "load_pretrained",
    "save_pretrained",
    "save_torch",
]
