"""What a run writes down: metrics.jsonl and TensorBoard event files."""

import json
import math
from pathlib import Path

import tensorboardX

from densenet_jax.files import replacing


class RunLog:
    """Appends records to metrics.jsonl and to TensorBoard.

    A run that continues from a checkpoint repeats what came after it, so
    later records are dropped first.
    """

    def __init__(self, workdir: Path, first_step: int):
        """Opens the log to continue after first_step steps."""
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = "".join(x for x in lines if _step_of(x) <= first_step)
            with replacing(self.path) as temporary:
                temporary.write_text(kept)
        self._file = self.path.open("a", buffering=1)
        self._events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1
        )

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Adds a record: the state after `step` steps, seen on `split`."""
        record = {"step": step, "split": split, **values}
        self._file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # cut off while it was written
        return math.inf
