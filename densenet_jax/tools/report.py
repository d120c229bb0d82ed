"""Compares finished runs: a table, their numbers and pictures.

python -m densenet_jax.tools.report runs/ablation

Reads every run in the directories given or below, and writes to report/ in
the first, or to --output: report.md, report.csv with a line for each run, and
the pictures that report.md shows. Runs of one config and different seeds are
one line, mean ± sample standard deviation. Runs that failed or are not
finished are listed, and count for nothing.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from densenet_jax.analysis import ablation, ablation_plots
from densenet_jax.files import in_bucket, replacing
from densenet_jax.runs import directory as runs
from densenet_jax.tools import command

_TEXT = """# {title}

{count} finished runs of {groups} settings. Errors are top-1, on the test split:
after the last step, which the pictures show, and at the best evaluation of
each run, which the test images themselves have chosen. Mean ± sample standard
deviation over n seeds.

{table}

## Error against cost

![Test error against parameters and multiply-adds](costs.png)

Multiply-adds of convolutions and the linear layer, for one image.

## Curves

![Training loss and test error over epochs](curves.png)

Lines: the mean over seeds; bands: from the lowest seed to the highest.
"""

_HEAT_MAP = """
## Growth rate and compression

![Test error by growth rate and compression](heat_map.png)
"""

_EXCLUDED = """
## Left out

| run | reason |
| --- | --- |
{rows}
"""


def report(arguments: argparse.Namespace) -> None:
    """Writes the report, and prints its table and where it is."""
    finished, excluded = _read(arguments.directories)
    if not finished:
        reasons = "".join(f"\n{p}: {why}" for p, why in excluded.items())
        raise ValueError(
            f"No finished run in {' '.join(map(str, arguments.directories))}: "
            f"give the directory of a run or of a sweep.{reasons}"
        )
    groups, repeated = ablation.group(finished)
    excluded |= repeated
    table = ablation.table(groups)
    output = arguments.output or arguments.directories[0] / "report"
    if not in_bucket(output):
        output.mkdir(parents=True, exist_ok=True)
    # All is made before any of it takes the place of an older report's.
    with tempfile.TemporaryDirectory() as made:
        made = Path(made)
        ablation_plots.plot_costs(groups, made / "costs.png")
        ablation_plots.plot_curves(groups, made / "curves.png")
        text = _TEXT.format(
            title=arguments.directories[0].resolve().name,
            count=sum(len(g.runs) for g in groups),
            groups=len(groups),
            table=table,
        )
        if ablation_plots.plot_heat_map(groups, made / "heat_map.png"):
            text += _HEAT_MAP
        if excluded:
            rows = "\n".join(f"| {p} | {why} |" for p, why in excluded.items())
            text += _EXCLUDED.format(rows=rows)
        ablation.write_csv(groups, excluded, made / "report.csv")
        (made / "report.md").write_text(text)
        for file in made.iterdir():
            with replacing(output / file.name) as temporary:
                shutil.copy(file, temporary)
    print(table)
    for path, why in excluded.items():
        print(f"Left out {path}: {why}")
    print(f"Wrote {output / 'report.md'}")


def _read(
    directories: Sequence[Path],
) -> tuple[list[runs.Run], dict[Path, str]]:
    """The finished runs, and why each of the others is left out."""
    finished, excluded = [], {}
    for directory in directories:
        found = set(runs.find_runs(directory))
        trials = directory / runs.TRIALS
        if trials.exists():
            found |= {
                directory / name for name in json.loads(trials.read_text())
            }
        for path in sorted(found):
            try:
                finished.append(runs.read_run(path))
            except ValueError as error:
                excluded[path] = str(error)
    return finished, excluded


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("report", __doc__)
    parser.add_argument(
        "directories",
        nargs="+",
        type=command.directory,
        metavar="DIR",
        help="runs, or directories of runs",
    )
    parser.add_argument(
        "--output",
        type=command.directory,
        metavar="DIR",
        help="where to write, made if need be (report/ in the first DIR)",
    )
    return command.run(parser, report, argv)


if __name__ == "__main__":
    sys.exit(main())
