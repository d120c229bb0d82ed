"""A small DenseNet-BC on handwritten digits: what `make train` runs.

    python train.py --config=configs/digits.py --workdir=runs/digits

Needs no download: 1,797 images of 8x8 pixels come with scikit-learn; every
fifth is held out. Costs about a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.model.name = "densenet_bc_100_12"
    config.model.block_layers = (4, 4, 4)
    config.dataset.name = "digits"
    config.dataset.test_split = "test"
    config.preprocessing.mean = (77.8,)
    config.preprocessing.std = (95.9,)
    config.preprocessing.shift = 1
    config.epochs = 30.0
    config.batch_size = 64
    config.optimizer.base_batch_size = 64
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 1.0
    config.checkpoint.every_epochs = 5.0
    return config
