"""Makes tests/data/golden_run.zip and .npz with the code of commit 74c2b26.

    git worktree add ../golden 74c2b26
    cd ../golden && python ../THIS/tests/make_golden_run.py ../THIS/tests/data

The zip is the directory of a run on digits as it was after 12 of 22 steps; the
.npz has every array of its state then, 'at_12/PATH', and after the end,
'at_22/PATH'. That commit named keys model.form, optimizer.body_rate and
remat='half'.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

OPTIONS = [
    "--config=configs/digits.py",
    "--config.epochs=1.0",
    "--config.model.block_layers=(1,2)",
    "--config.model.growth_rate=2",
    "--config.model.dropout_rate=0.2",
    "--config.model.remat=half",
    "--config.model.form=products",
    "--config.ema_decay=0.9",
    "--config.optimizer.body_rate=0.5",
    "--config.preprocessing.mixup=0.2",
    "--config.schedule.warmup_epochs=0.2",
    "--config.checkpoint.every_epochs=0.5",
    "--config.checkpoint.keep_newest=9",
]


def read_arrays(checkpoints, step: int) -> dict[str, np.ndarray]:
    state = checkpoints.restore(step, checkpoints.abstract_state(step))
    return {
        f"at_{step}/{jax.tree_util.keystr(path, simple=True, separator='/')}": (
            np.asarray(leaf)
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def main(target: Path) -> None:
    sys.path.insert(0, os.getcwd())
    from densenet_jax.checkpoints.manager import Checkpoints

    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        subprocess.run(
            [sys.executable, "train.py", f"--workdir={run}", *OPTIONS],
            check=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        checkpoints = Checkpoints(run / "checkpoints", read_only=True)
        arrays = {}
        for step in (12, 22):
            arrays |= read_arrays(checkpoints, step)
        np.savez_compressed(target / "golden_run.npz", **arrays)
        # As if it had been killed before its last checkpoint.
        shutil.rmtree(run / "checkpoints/22")
        shutil.rmtree(run / "tensorboard")
        (run / "curves.png").unlink()
        shutil.make_archive(str(target / "golden_run"), "zip", run)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
