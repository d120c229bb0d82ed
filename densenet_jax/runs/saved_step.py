"""A checkpoint as it is on disk, checked as it is read."""

import json
from typing import Any

from densenet_jax.runs.file_list import FILE_LIST, changed_files
from densenet_jax.runs.fingerprints import (
    describe_arrays,
    digest,
    fingerprints,
)
from densenet_jax.runs.manager import Manager


class SavedStep:
    """What was saved of one step.

    Every method raises, and what it raises depends on the libraries, where a
    file cannot be read; and ValueError where it does not hold what was saved.
    """

    def __init__(self, manager: Manager, step: int):
        self._manager = manager
        self._step = step
        self.path = manager.directory / str(step)

    def record(self) -> dict[str, Any] | None:
        """The fingerprints; None of a step of an earlier version."""
        path = self.path
        # Either of these says that there are fingerprints, should the other
        # be lost.
        listed = path / "_CHECKPOINT_METADATA"
        if not (path / "fingerprints").exists() and not (
            listed.exists() and b'"fingerprints"' in listed.read_bytes()
        ):
            return None
        record = self._read("fingerprints/metadata")
        rest = {k: v for k, v in record.items() if k != "record"}
        if record.get("record") != digest(rest):
            raise ValueError("fingerprints/metadata is not what was saved")
        return record

    def changed_files(self) -> list[str]:
        """What is known to have happened to its files."""
        return changed_files(self.path) if self.has_list() else []

    def has_list(self) -> bool:
        """Whether there is a list of its files."""
        return (self.path / FILE_LIST).exists()

    def remark(self) -> str | None:
        """What is to be said of a step that was read, if anything."""
        if self.record() is None:
            return (
                f"The checkpoint of step {self._step:,} is of an earlier "
                "version and has no fingerprints: whether it is as it was "
                "saved is not known."
            )
        if not self.has_list() and "://" not in str(self.path):
            return f"The checkpoint of step {self._step:,} has no {FILE_LIST}."
        return None

    def metrics(self) -> dict[str, float] | None:
        """Of the step, if it was evaluated."""
        if not any(self.path.iterdir()):
            raise ValueError("the directory is empty")
        there = (self.path / "metrics").exists()
        metrics = self._read("metrics/metrics") if there else None
        self._check("metrics", "metrics/metrics", metrics)
        return metrics

    def config(self) -> dict[str, Any]:
        """As it was saved."""
        config = self._read("config/metadata")
        self._check("config", "config/metadata", config)
        return config

    def described(self) -> Any:
        """The tree of what is stated of the arrays, with shapes and dtypes."""
        changes = self.changed_files()
        if changes:
            raise ValueError(changes[0])
        tree = self._manager.described(self._step)
        self._compare("state/_METADATA:", describe_arrays(tree), 0)
        return tree

    def arrays(self, abstract_state: Any) -> Any:
        """The arrays, sharded as asked."""
        state = self._manager.read_state(self._step, abstract_state)
        self._compare("the fingerprint of", fingerprints(state), 1)
        return state

    def _compare(self, what, found, place):
        record = self.record()
        if record is None:
            return
        saved = {k: entry[place] for k, entry in record["arrays"].items()}
        for path in sorted(found.keys() | saved.keys()):
            if found.get(path) != saved.get(path):
                raise ValueError(
                    f"{what} {path} is {found.get(path, 'missing')}, was saved "
                    f"as {saved.get(path, 'nothing')}"
                )

    def _check(self, key, file, value):
        record = self.record()
        if record is not None and record[key] != digest(value):
            raise ValueError(f"{file} is not what was saved")

    def _read(self, name):
        try:
            return json.loads((self.path / name).read_text())
        except ValueError as error:
            raise ValueError(f"{name} is no JSON ({error})") from error
