"""DenseNet-201 on ImageNet: as densenet121.py, with a deeper net.

    python train.py --config=configs/densenet201.py --workdir=runs/densenet201

Costs 90 passes over 1.28 million images at 4.3 billion multiply-adds each
(20.0 million parameters). Expect a validation error of 22.58% top-1 and
6.34% top-5 (the paper's, one central crop; not repeated here).
"""

from ml_collections import ConfigDict

from configs import densenet121


def get_config() -> ConfigDict:
    config = densenet121.get_config()
    config.model.name = "densenet201"
    return config
