"""Runs that differ in some keys of their config, as tables and groups."""

import csv
import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from densenet_jax.models.densenet import DenseNet
from densenet_jax.runs import directory as runs
from densenet_jax.runs.directory import Run

# What a result does not depend on, but for chance.
_SAME = ("seed", "dataset.data_dir", "dataset.num_workers")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one config, with different seeds.

    Attributes:
      settings: what sets it apart, by dotted key of the config.
      label: the same in words, 'growth_rate=6, compression=0.5'.
      runs: one or more.
    """

    settings: Mapping[str, Any]
    label: str
    runs: Sequence[Run]

    @property
    def model(self) -> DenseNet:
        return self.runs[0].model

    @property
    def variant(self) -> str:
        """The paper's name: DenseNet, DenseNet-B, DenseNet-C, DenseNet-BC."""
        letters = "B" * (self.model.bottleneck_width > 0)
        letters += "C" * (self.model.compression < 1)
        return "DenseNet" + f"-{letters}" * bool(letters)

    @property
    def parameters(self) -> int:
        return self.runs[0].parameters

    @property
    def multiply_adds(self) -> int:
        return self.runs[0].multiply_adds

    @functools.cached_property
    def final(self) -> tuple[float, float | None]:
        """Mean and sample deviation of the last test errors, in percent."""
        return mean_and_deviation([final_error(run) for run in self.runs])

    @functools.cached_property
    def best(self) -> tuple[float, float | None]:
        """As `final`, of each run's lowest test error."""
        return mean_and_deviation([best_error(run) for run in self.runs])


def errors(run: Run) -> list[float]:
    """The test errors of a run, top-1 in percent, one an evaluation."""
    return [100 * (1 - record["top1"]) for record in run.split("test")]


def final_error(run: Run) -> float:
    return errors(run)[-1]


def best_error(run: Run) -> float:
    return min(errors(run))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the sample standard deviation (n - 1): None of one."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation


def group(
    finished: Sequence[Run],
) -> tuple[list[Group], dict[Path, str]]:
    """Puts runs that differ in their seed alone together.

    Returns:
      The groups, and what is left out: a second run of one config and seed,
      which is no second sample, with the reason.
    """
    keys = sorted(set().union(*(run.config for run in finished)))
    varied = [
        key
        for key in keys
        if key not in _SAME
        and len({_hashable(run.config.get(key)) for run in finished}) > 1
    ]
    found: dict[tuple, dict[int, Run]] = {}
    excluded = {}
    for run in finished:
        setting = tuple(_hashable(run.config.get(key)) for key in varied)
        seeds = found.setdefault(setting, {})
        twin = seeds.setdefault(run.config["seed"], run)
        if twin is not run:
            excluded[run.directory] = (
                f"the config and seed of {twin.directory.name} again"
            )
    groups = []
    for setting, seeds in found.items():
        settings = dict(zip(varied, setting))
        label = runs.label(settings, keys) or "all"
        groups.append(Group(settings, label, list(seeds.values())))
    return sorted(groups, key=lambda g: (g.variant, g.parameters)), excluded


def table(groups: Sequence[Group]) -> str:
    """One line a group, in Markdown."""
    lines = [
        "| setting | variant | parameters | multiply-adds | test error, last "
        "(%) | test error, best (%) | n |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for g in groups:
        lines.append(
            f"| {g.label} | {g.variant} | {g.parameters:,} | "
            f"{g.multiply_adds:,} | {_plus_minus(*g.final)} | "
            f"{_plus_minus(*g.best)} | {len(g.runs)} |"
        )
    return "\n".join(lines)


def write_csv(
    groups: Sequence[Group], excluded: Mapping[Path, str], path: Path
) -> None:
    """Writes a line for each run; those left out have their reason alone."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("run", "setting", "seed", "variant", "growth_rate"),
                *("compression", "bottleneck_width", "block_layers"),
                *("parameters", "multiply_adds", "last_error_percent"),
                *("best_error_percent", "left_out"),
            ]
        )
        for g in groups:
            model = g.model
            for run in g.runs:
                writer.writerow(
                    [
                        run.directory,
                        g.label,
                        run.config["seed"],
                        g.variant,
                        model.growth_rate,
                        model.compression,
                        model.bottleneck_width,
                        "-".join(map(str, model.block_layers)),
                        g.parameters,
                        g.multiply_adds,
                        f"{final_error(run):.4f}",
                        f"{best_error(run):.4f}",
                        "",
                    ]
                )
        for directory, reason in excluded.items():
            writer.writerow([directory, *[""] * 11, reason])


def _plus_minus(mean: float, deviation: float | None) -> str:
    shown = f"{mean:.2f}"
    return shown if deviation is None else f"{shown} ± {deviation:.2f}"


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
