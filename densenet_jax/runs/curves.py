"""Training curves of one run as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from densenet_jax.files import replacing

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl: 'step', 'epoch', 'split' and values.

    Raises:
      ValueError: there is no such file, or a line is no record.
    """
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines()
    except FileNotFoundError:
        raise ValueError(f"no {path.name}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(
                f"{path.name} is cut off in line {number} of {len(lines)}"
            )
        records.append(record)
    return records


def plot_curves(records: Sequence[Record], path: Path, title: str) -> None:
    """Draws loss and error over epochs, training and test, to a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, error = figure.subplots(1, 2)
    for split, color in (("train", "tab:blue"), ("test", "tab:orange")):
        chosen = [r for r in records if r["split"] == split]
        epochs = [r["epoch"] for r in chosen]
        style = dict(color=color, label=split, marker=".", markersize=3)
        loss.plot(epochs, [r["loss"] for r in chosen], **style)
        errors = [100 * (1 - r["top1"]) for r in chosen]
        if errors and split == "test":
            style["label"] = f"test, last {errors[-1]:.2f}%"
        error.plot(epochs, errors, **style)
    loss.set(xlabel="epoch", ylabel="cross entropy (nats)", yscale="log")
    error.set(xlabel="epoch", ylabel="top-1 error (%)", ylim=(0, None))
    for axes in (loss, error):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
