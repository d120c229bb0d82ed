"""The paper's nets on CIFAR-10 (section 4.2 and table 2).

    python train.py --config=configs/cifar10.py:bc_100_12 --workdir=runs/c10

The argument picks the net, and with `,plain` the data as they are:

    argument     parameters   error %, flips and shifts   error %, none
    40_12              1.0M                        5.24            7.00
    100_12             7.0M                        4.10            5.77
    100_24            27.2M                        3.74            5.83
    bc_100_12          0.8M                        4.51            5.92
    bc_250_24         15.3M                        3.62            5.19
    bc_190_40         25.6M                        3.46               -

(the paper's errors after 300 epochs; the README says what was measured here).
Dropout of 0.2 only without augmentation, as in the paper.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "bc_100_12") -> ConfigDict:
    net, _, data = argument.partition(",")
    if data not in ("", "plain"):
        raise ValueError(
            f"The argument {argument!r} ends in {data!r}: use NET or NET,plain."
        )
    config = common.get_config()
    config.model.name = f"densenet_{net}"
    config.dataset.name = "cifar10"
    config.dataset.test_split = "test"
    config.preprocessing.mean = (125.3, 123.0, 113.9)
    config.preprocessing.std = (63.0, 62.1, 66.7)
    if data == "plain":
        config.model.dropout_rate = 0.2
    else:
        config.preprocessing.flip = True
        config.preprocessing.shift = 4
    config.epochs = 300.0
    config.batch_size = 64
    config.optimizer.base_batch_size = 64
    config.schedule.boundaries = (0.5, 0.75)
    return config
