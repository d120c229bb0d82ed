"""Damages checkpoints at random, and looks at what a run makes of them.

python -m benchmarks.damage [--count=200] [--seed=0]

A tiny run on the digits is stopped before its last step. Again and again one
file of its newest checkpoint has a bit flipped, is cut off or deleted, half of
the times without files.json, so that the fingerprints have to notice it; and
the run is started again. Prints how often the damage was named with its step,
and how often the state that the run goes on from has other bits than the run
that was never stopped had after that step; one of ten goes on to the end, and
there its state is compared.
"""

import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from benchmarks.arguments import parser, positive
from configs import digits
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.runs.file_list import FILE_LIST
from densenet_jax.training import loop, start
from densenet_jax.training.experiment import Experiment, build

_TOTAL = 6


def damage(directory: Path, rng: random.Random) -> str:
    """Damages one file below a directory; returns how.

    Every other time each file has the same chance, else each byte has.
    """
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    files = [p for p in files if p.stat().st_size]
    sizes = [p.stat().st_size for p in files]
    (path,) = rng.choices(files, sizes if rng.random() < 0.5 else None)
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flipped", "flipped", "cut off", "deleted"])
    if kind == "flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "cut off":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        path.unlink()
    return kind


def _config():
    config = digits.get_config()
    config.update_from_flattened_dict(
        {
            "model.block_layers": (1,),
            "model.growth_rate": 4,
            "batch_size": 240,
            "epochs": 1.0,
            "ema_decay": 0.9,
            "eval_every_epochs": 0.5,
            "schedule.warmup_epochs": 0.0,
            "checkpoint.every_epochs": 0.3,
        }
    )
    return config.lock()


def _states(experiment, workdir):
    """Of every step that a run has a checkpoint of, all arrays."""
    checkpoints = Checkpoints(
        workdir / "checkpoints", experiment.task.rank, read_only=True
    )
    with contextlib.closing(checkpoints):
        return {
            step: _arrays(checkpoints.restore(step, experiment.abstract_state))
            for step in checkpoints.steps
        }


def _arrays(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def _start(config, experiment, workdir):
    """The step and the arrays that a run goes on from."""
    checkpoints = Checkpoints(workdir / "checkpoints", experiment.task.rank)
    with contextlib.closing(checkpoints):
        saved = start.config_to_save(config, experiment)
        step, state = start.start_training(
            config, experiment, checkpoints, saved
        )
        return step, _arrays(state)


def _share_compilations(experiment: Experiment):
    """All runs are of one experiment: nothing is compiled twice."""
    compiled = experiment.train_step.lower(
        experiment.abstract_state, experiment.batch
    ).compile()
    loop.build = lambda _: experiment
    loop._compile = lambda _: compiled


def _try(experiment, config, stopped, expected, rng, folder, to_end):
    """Damages a copy of the stopped run, continues it; returns what came."""
    newest = max(
        (p for p in (stopped / "checkpoints").iterdir()),
        key=lambda p: int(p.name),
    )
    workdir = folder / "run"
    shutil.copytree(stopped, workdir)
    directory = workdir / "checkpoints" / newest.name
    listed = rng.random() < 0.5
    if not listed:
        (directory / FILE_LIST).unlink()
    kind = damage(directory, rng)
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        if to_end:
            loop.train_and_evaluate(config, workdir)
            step, found = _TOTAL, _states(experiment, workdir)[_TOTAL]
        else:
            step, found = _start(config, experiment, workdir)
    named = [
        line
        for line in said.getvalue().splitlines()
        if line.startswith(f"The checkpoint of step {newest.name}")
    ]
    aside = (workdir / "checkpoints" / f"damaged-{newest.name}").exists()
    same = all(np.array_equal(a, b) for a, b in zip(found, expected[step]))
    shutil.rmtree(workdir)
    return {
        "kind": f"{kind}{'' if listed else ', no list'}",
        "set aside": aside,
        "named": bool(named),
        "other bits": not same,
    }


def main(argv: list[str] | None = None) -> int:
    flags = parser(__doc__)
    flags.add_argument("--count", type=positive, default=200)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args(argv)
    logging.set_verbosity(logging.FATAL)
    config = _config()
    experiment = build(config)
    _share_compilations(experiment)
    rng = random.Random(args.seed)
    counts = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loop.train_and_evaluate(config, folder / "whole")
        expected = _states(experiment, folder / "whole")
        # As if it had been stopped: only the last checkpoint is not there.
        stopped = folder / "whole"
        shutil.rmtree(stopped / "checkpoints" / str(_TOTAL))
        for number in tqdm(range(args.count), desc="damaged", unit=" runs"):
            result = _try(
                experiment,
                config,
                stopped,
                expected,
                rng,
                folder,
                to_end=number % 10 == 0,
            )
            kind = result.pop("kind")
            counts[kind, "runs"] += 1
            for name, value in result.items():
                counts[kind, name] += value
    columns = ("runs", "set aside", "named", "other bits")
    print(f"{'':22}" + "".join(f"{name:>12}" for name in columns))
    kinds = sorted({kind for kind, _ in counts})
    for kind in kinds:
        row = "".join(f"{counts[kind, name]:12}" for name in columns)
        print(f"{kind:22}{row}")
    total = {name: sum(counts[k, name] for k in kinds) for name in columns}
    print(f"{'all':22}" + "".join(f"{total[name]:12}" for name in columns))
    return int(total["other bits"] > 0 or total["named"] < total["runs"])


if __name__ == "__main__":
    sys.exit(main())
