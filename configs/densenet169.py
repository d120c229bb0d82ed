"""DenseNet-169 on ImageNet: as densenet121.py, with a deeper net.

    python train.py --config=configs/densenet169.py --workdir=runs/densenet169

Costs 90 passes over 1.28 million images at 3.4 billion multiply-adds each
(14.1 million parameters). Expect a validation error of 23.80% top-1 and
6.85% top-5 (the paper's, one central crop; not repeated here).
"""

from ml_collections import ConfigDict

from configs import densenet121


def get_config() -> ConfigDict:
    config = densenet121.get_config()
    config.model.name = "densenet169"
    return config
