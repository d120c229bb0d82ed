"""Plain, B, C and BC nets of about 0.1M parameters on CIFAR-10.

    python -m densenet_jax.tools.sweep --config=configs/ablation_cifar10.py \
        --workdir=runs/ablation_cifar10
    python -m densenet_jax.tools.report runs/ablation_cifar10

The comparison of the paper's figure 4, at a size for two CPU cores: the
recipe of cifar10.py, its schedule scaled to 2 epochs, or as many as an
argument says (--config=configs/ablation_cifar10.py:10), with

    net      layers a block   parameters   multiply-adds
    plain                 5       94,650           27.0M
    B                     5       86,970           30.8M
    C                     7       96,878           34.8M
    BC                    7       99,006           39.5M

Costs about 17 minutes an epoch on two CPU cores, the four together, with
--parallel=2. One seed:
small differences are chance.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config(epochs: str = "2") -> ConfigDict:
    config = cifar10.get_config()
    config.model.growth_rate = 8
    config.epochs = float(epochs)
    config.eval_every_epochs = 0.5
    config.checkpoint.every_epochs = 0.5
    return config


def sweep(add) -> None:
    for bottleneck_width, compression, layers in (
        (0, 1.0, 5),
        (4, 1.0, 5),
        (0, 0.5, 7),
        (4, 0.5, 7),
    ):
        add(
            {
                "model.bottleneck_width": bottleneck_width,
                "model.compression": compression,
                "model.block_layers": (layers,) * 3,
            }
        )
