"""Runs the trials that a recipe's sweep(add) lists, each a process of its own.

python -m densenet_jax.tools.sweep --config=configs/ablation.py \\
    --workdir=runs/ablation --parallel=2

A trial runs in a directory of its own in --workdir, named after what it
differs in, with its output in log.txt. One that fails does not stop the rest.
The same command again leaves out what has finished, continues what has not
and tries what failed again; python -m densenet_jax.tools.report shows the
results. Every trial's config is checked, on the CPU, before the first starts.

Several machines that share --workdir: give each its part, --shard=1/2 and
--shard=2/2. On GPUs and TPUs a trial takes all devices of its machine; to run
one trial a GPU, start a sweep for each, with CUDA_VISIBLE_DEVICES and --shard.
"""

import argparse
import json
import re
import shlex
import sys
from typing import Any

import jax
from rich.console import Console
from tqdm import tqdm

from densenet_jax.files import replacing
from densenet_jax.runs.directory import TRIALS, prepare
from densenet_jax.sweeps import launch, trials
from densenet_jax.sweeps.board import Board
from densenet_jax.tools import command


def sweep(arguments: argparse.Namespace) -> None:
    """Runs what is left of the sweep, and says how it went."""
    # The devices are the trials'.
    jax.config.update("jax_platforms", "cpu")
    expanded = trials.expand(arguments.config, arguments.workdir)
    for trial, config in tqdm(
        expanded.items(), desc="check", unit=" trials", disable=None
    ):
        trials.check(trial, config)
    number, count = arguments.shard
    mine = list(expanded)[number - 1 :: count]
    unfinished = [trial for trial in mine if trial.problem]
    print(
        f"{len(mine)} trials, {len(mine) - len(unfinished)} of them finished."
    )
    if arguments.dry_run:
        for trial in unfinished:
            print(shlex.join(trial.command))
        return
    prepare(arguments.workdir)
    with replacing(arguments.workdir / TRIALS) as temporary:
        names = [trial.name for trial in expanded]
        temporary.write_text(json.dumps(names, indent=2))
    if arguments.launcher == "slurm":
        launch.submit(
            unfinished,
            arguments.workdir,
            parallel=arguments.parallel,
            options=dict(arguments.slurm),
        )
        return
    with Board(mine, Console()) as board:
        failed = launch.run_here(mine, arguments.parallel, board)
    if failed:
        raise ValueError(
            f"{failed} of {len(mine)} trials failed: see their log.txt. The "
            "same command tries them again."
        )


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(
            f"{text} is not I/N with I in 1 ... N, as in 1/2"
        )
    return number, count


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE")
    return key, int(value) if value.isdecimal() else value


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("sweep", __doc__)
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a recipe with sweep(add), FILE or FILE:ARGUMENT",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=command.directory,
        help="of the whole sweep",
    )
    parser.add_argument(
        "--parallel",
        type=_positive,
        default=1,
        metavar="N",
        help="trials at a time; on CPUs they share the cores (1)",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="run every N-th trial from the I-th alone",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check all trials, and print the commands of the unfinished",
    )
    parser.add_argument("--launcher", choices=["here", "slurm"], default="here")
    parser.add_argument(
        "--slurm",
        nargs="+",
        type=_option,
        default=[],
        metavar="KEY=VALUE",
        help="for submitit's AutoExecutor, as slurm_partition=gpu "
        f"gpus_per_node=1 (timeout_min={launch.TIMEOUT_MINUTES})",
    )
    return command.run(parser, sweep, argv)


if __name__ == "__main__":
    sys.exit(main())
