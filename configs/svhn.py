"""The paper's nets on SVHN (section 4.2 and table 2).

    python train.py --config=configs/svhn.py:bc_100_12 --workdir=runs/svhn

    argument     parameters   error %
    40_12              1.0M      1.79
    100_12             7.0M      1.67
    100_24            27.2M      1.59
    bc_100_12          0.8M      1.76
    bc_250_24         15.3M      1.74

(the paper's errors after 40 epochs, of the best epoch on 6,000 of the training
images; not repeated here). Trains on all 604,388 images, the extra ones too,
as they are but for a division by 255, and with dropout of 0.2.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(net: str = "bc_100_12") -> ConfigDict:
    config = common.get_config()
    config.model.name = f"densenet_{net}"
    config.model.dropout_rate = 0.2
    config.dataset.name = "svhn_cropped"
    config.dataset.train_split = "train+extra"
    config.dataset.test_split = "test"
    config.epochs = 40.0
    config.batch_size = 64
    config.optimizer.base_batch_size = 64
    config.schedule.boundaries = (0.5, 0.75)
    return config
