"""Pictures of an ablation, in colours that colour-blind readers tell apart."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

from densenet_jax.analysis.ablation import Group, errors
from densenet_jax.runs import directory as runs

# Okabe and Ito, Color universal design (2008).
_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
_LINES = ("-", "--", ":", "-.")
_VARIANTS = {
    "DenseNet": ("o", _COLORS[0]),
    "DenseNet-B": ("s", _COLORS[1]),
    "DenseNet-C": ("^", _COLORS[2]),
    "DenseNet-BC": ("D", _COLORS[3]),
}

# With more groups than that their labels would cover each other.
_MOST_LABELS = 8

# Characters of a label, where two stand side by side under two panels.
_WIDEST_OF_TWO = 45


def plot_costs(groups: Sequence[Group], path: Path) -> None:
    """Draws error against parameters and multiply-adds: figures 3 and 4.

    A marker is the mean over the seeds of a group, its bar the sample
    standard deviation; a line joins the groups of a variant.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, attribute in zip(panels, ("parameters", "multiply_adds")):
        for variant, (marker, color) in _VARIANTS.items():
            chosen = [g for g in groups if g.variant == variant]
            chosen.sort(key=lambda g: getattr(g, attribute))
            if not chosen:
                continue
            axes.errorbar(
                [getattr(g, attribute) for g in chosen],
                [g.final[0] for g in chosen],
                [g.final[1] or 0 for g in chosen],
                color=color,
                marker=marker,
                capsize=4,
                label=variant,
            )
            if len(groups) <= _MOST_LABELS:
                _label(axes, chosen, attribute)
        axes.set(xscale="log", xlabel=attribute.replace("_", "-"))
        axes.margins(x=0.15, y=0.12)
        _count_plainly(axes.xaxis)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 test error (%)")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def plot_curves(groups: Sequence[Group], path: Path) -> None:
    """Draws training loss and test error over epochs, one colour a group.

    A line is the mean over the seeds, a band their range.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    styles = itertools.cycle(
        (color, line) for line in _LINES for color in _COLORS
    )
    for group, (color, line) in zip(groups, styles):
        style = dict(color=color, linestyle=line)
        for axes, curves in zip(panels, (_losses(group), _errors(group))):
            epochs, values = _common(curves)
            axes.plot(epochs, values.mean(0), **style, label=group.label)
            if len(curves) > 1:
                low, high = values.min(0), values.max(0)
                axes.fill_between(
                    epochs, low, high, color=color, alpha=0.15, linewidth=0
                )
    panels[0].set(ylabel="training cross entropy (nats)", yscale="log")
    _count_plainly(panels[0].yaxis)
    # The first epochs' errors would leave no room for the last ones'.
    panels[1].set(
        ylabel="top-1 test error (%)",
        ylim=(0, min(100, 3 * max(g.final[0] for g in groups))),
    )
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    _add_legend(figure, *panels[0].get_legend_handles_labels())
    figure.savefig(path, dpi=110)


def _add_legend(figure, handles, labels):
    """Below the panels, which stay as high as they are."""
    columns = 2 if max(map(len, labels)) <= _WIDEST_OF_TWO else 1
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def plot_heat_map(groups: Sequence[Group], path: Path) -> bool:
    """Draws error over growth rate x compression.

    Returns:
      Whether it did: the groups vary in these, and in nothing else.
    """
    if set(groups[0].settings) != {"model.growth_rate", "model.compression"}:
        return False
    cells = {(g.model.growth_rate, g.model.compression): g for g in groups}
    growth_rates, compressions = (sorted(set(v)) for v in zip(*cells))
    values = np.full((len(compressions), len(growth_rates)), np.nan)
    for (k, theta), g in cells.items():
        values[compressions.index(theta), growth_rates.index(k)] = g.final[0]
    figure = Figure(
        figsize=(2.5 + 1.3 * values.shape[1], 1.5 + 0.9 * values.shape[0]),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", aspect="auto", origin="lower")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        if np.isnan(value):
            axes.text(j, i, "-", ha="center", va="center")
            continue
        mean, deviation = cells[growth_rates[j], compressions[i]].final
        spread = "" if deviation is None else f"\n± {deviation:.2f}"
        axes.text(
            *(j, i, f"{mean:.2f}{spread}"),
            ha="center",
            va="center",
            color="black" if value > middle else "white",
        )
    axes.set_xticks(range(len(growth_rates)), growth_rates)
    axes.set_yticks(range(len(compressions)), compressions)
    axes.set(xlabel="growth rate k", ylabel="compression θ")
    figure.colorbar(image, label="top-1 test error (%)")
    figure.savefig(path, dpi=110)
    return True


def _label(axes, groups, attribute):
    """Names what the variant's name does not: above the line, then below."""
    varied = [
        key
        for key, value in groups[0].settings.items()
        if any(g.settings[key] != value for g in groups)
    ]
    for i, g in enumerate(groups):
        settings = {key: g.settings[key] for key in varied}
        side = 1 if i < len(groups) / 2 else -1
        axes.annotate(
            runs.label(settings, g.runs[0].config, "\n"),
            (getattr(g, attribute), g.final[0]),
            xytext=(6 * side, 3 * side),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="bottom" if side > 0 else "top",
            fontsize=9,
            bbox=dict(facecolor="white", linewidth=0, alpha=0.7, pad=0.5),
        )


def _losses(group):
    """(epochs, losses) of each run."""
    return [
        (
            [r["epoch"] for r in run.split("train")],
            [r["loss"] for r in run.split("train")],
        )
        for run in group.runs
    ]


def _errors(group):
    """(epochs, errors in percent) of each run."""
    return [
        ([r["epoch"] for r in run.split("test")], errors(run))
        for run in group.runs
    ]


def _common(curves):
    """The epochs that all curves have, and their values [curves, epochs]."""
    by_epoch = [dict(zip(*curve)) for curve in curves]
    epochs = sorted(set.intersection(*map(set, by_epoch)))
    return epochs, np.array([[c[e] for e in epochs] for c in by_epoch])


def _count_plainly(axis):
    """Marks a logarithmic axis in plain numbers, three or more of them.

    1, 2, 5, 10, 20, ...; equal steps where these are too far apart.
    """
    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()
    by_125 = LogLocator(subs=(1, 2, 5))
    axis.set_major_locator(by_125 if high > 20 * low else MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_count))


def _count(value, _):
    """1500000 -> '1.5M'."""
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{suffix}"
    return f"{value:g}"
