"""Trains or evaluates a DenseNet.

python train.py --config=configs/densenet121.py --workdir=runs/densenet121
python train.py --config=configs/cifar10.py:bc_100_12 --workdir=runs/c10 \
    --config.model.growth_rate=24

Exit status: 0 at the end; 75 where a signal stopped the run, which is to be
started again by the same command; 1 or 2 after an error, the last line.
"""

import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from densenet_jax.files import as_path
from densenet_jax.training import loop, signals

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, a file of configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run writes, and continues from; gs://BUCKET/NAME too.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval"],
    "train, or evaluate the best checkpoint in --workdir.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other hosts of this job; start the same command on each.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Address HOST:PORT; found by itself on TPU and Slurm."
)
_NUM_HOSTS = flags.DEFINE_integer("num_hosts", None, "With --coordinator.")
_HOST = flags.DEFINE_integer("host", None, "From 0; with --coordinator.")
_DEBUG = flags.DEFINE_bool(
    "debug", False, "Show the traceback of every error, foreseen ones too."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    # The libraries' warnings tell their developers, not ours, what to do.
    logging.set_verbosity(logging.ERROR)
    place = (_COORDINATOR.value, _NUM_HOSTS.value, _HOST.value)
    if place != (None,) * 3 and not _DISTRIBUTED.value:
        raise app.UsageError(
            "--coordinator, --num_hosts and --host go with --distributed."
        )
    stop = signals.StopSignals()
    stop.install()
    try:
        if _DISTRIBUTED.value:
            # JAX's own service sees SIGTERM alone, and takes its handler.
            jax.config.update("jax_enable_preemption_service", False)
            jax.distributed.initialize(*place)
        _run(stop)
    except signals.Stopped as stopped:
        signals.tell(str(stopped))
        sys.exit(signals.EXIT_CODE)
    except Exception as error:
        # What a user can mend; a traceback would hide what to do.
        foreseen = isinstance(error, (ValueError, OSError, FloatingPointError))
        if _DEBUG.value or not foreseen:
            traceback.print_exc()
        first, *_ = str(error).splitlines() or [""]
        sys.exit(str(error) if foreseen else f"{type(error).__name__}: {first}")


def _run(stop: signals.StopSignals) -> None:
    config, workdir = _CONFIG.value, as_path(_WORKDIR.value)
    if _MODE.value == "eval":
        loop.evaluate_best(config, workdir)
    else:
        loop.train_and_evaluate(config, workdir, signals=stop)


if __name__ == "__main__":
    app.run(main)
