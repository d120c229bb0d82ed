"""DenseNet-264 on ImageNet: as densenet121.py, with a deeper net.

    python train.py --config=configs/densenet264.py --workdir=runs/densenet264

Costs 90 passes over 1.28 million images at 5.8 billion multiply-adds each
(33.3 million parameters). Expect a validation error of 22.15% top-1 and
6.12% top-5 (the paper's, one central crop; not repeated here).
"""

from ml_collections import ConfigDict

from configs import densenet121


def get_config() -> ConfigDict:
    config = densenet121.get_config()
    config.model.name = "densenet264"
    return config
