"""An ablation: growth rate x compression on handwritten digits.

    python -m densenet_jax.tools.sweep --config=configs/ablation.py \
        --workdir=runs/ablation --parallel=2
    python -m densenet_jax.tools.report runs/ablation

`get_config` is the recipe that all trials share, as in any other file here.
`sweep` calls `add` once a trial, with what differs from the recipe: any of
its keys, dotted. Each setting runs with two seeds, so that the report can
tell its effect from chance.

Costs eight runs of digits.py, about ten minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    return digits.get_config()


def sweep(add) -> None:
    for growth_rate in (6, 12):
        for compression in (0.5, 1.0):
            for seed in (0, 1):
                add(
                    {
                        "model.growth_rate": growth_rate,
                        "model.compression": compression,
                        "seed": seed,
                    }
                )
