"""DenseNet-121 on ImageNet, as the paper trains it (section 4.2).

    python train.py --config=configs/densenet121.py --workdir=runs/densenet121

Costs 90 passes over 1.28 million images at 2.8 billion multiply-adds each (8.0
million parameters). Expect a validation error of 25.02% top-1 and 7.71% top-5
(the paper's, one central crop; not repeated here), and of 23.61% and 6.66%
with --mode=eval --config.preprocessing.ten_crop=True. Crops, colour jitter,
lighting noise and flips are those of the authors' code, but for its bicubic
resizing: crops are resized bilinearly, or by averaging areas where they shrink
to less than half, and testing is torchvision's.

On TPU or a recent GPU add --config.model.dtype=bfloat16; to fit a smaller
memory, --config.model.remat=early or layer.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.dataset.name = "imagenet2012"
    config.preprocessing.mean = (123.675, 116.28, 103.53)
    config.preprocessing.std = (58.395, 57.12, 57.375)
    config.preprocessing.image_size = 224
    config.preprocessing.resize_size = 256
    config.preprocessing.random_resized_crop = True
    config.preprocessing.flip = True
    config.preprocessing.color_jitter = 0.4
    config.preprocessing.lighting = 0.1
    return config
