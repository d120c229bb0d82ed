import importlib
from pathlib import Path

import numpy as np
import pytest

from densenet_jax.data.sources import Source
from densenet_jax.models.registry import list_models
from densenet_jax.training import experiment

FOLDER = Path(__file__).parent.parent / "configs"
RECIPES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")
CIFAR_NETS = [
    name.removeprefix("densenet_") for name in list_models() if "_" in name
]
CIFAR_NETS.remove("264_k48") if "264_k48" in CIFAR_NETS else None

# Image shape and number of classes of the data sets that the recipes name.
DATA_SETS = {
    "imagenet2012": ((None, None, 3), 1000),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "digits": ((8, 8, 1), 10),
}
