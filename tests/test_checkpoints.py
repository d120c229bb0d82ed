import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import checkpoint_manager

from densenet_jax.runs.checkpoints import Checkpoints, load_variables
from densenet_jax.tasks.classification import CLASSIFICATION
from densenet_jax.training import sharding

rank = CLASSIFICATION.rank


def _state(value=0, width=3):
    return {
        "params": {"kernel": jnp.full((2, width), float(value))},
        "step": jnp.int32(value),
    }


@pytest.fixture
def directory(tmp_path):
    """Four checkpoints, the second the best, the last not evaluated."""
    checkpoints = Checkpoints(tmp_path, rank, keep_newest=1, keep_best=1)
    for step, top1, loss in [(1, 0.5, 0.1), (2, 0.7, 0.2), (3, 0.7, 0.3)]:
        checkpoints.save(
            step, _state(step), {"name": "a"}, {"top1": top1, "loss": loss}
        )
    checkpoints.save(4, _state(4), {"name": "b", "list": [1, 2]}, None)
    checkpoints.close()
    return tmp_path


def _files(directory):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_newest_and_best_are_kept(directory):
    checkpoints = Checkpoints(directory, rank, read_only=True)
    assert (checkpoints.newest, checkpoints.best) == (4, 2)
    assert sorted(p.name for p in directory.iterdir()) == ["2", "4"]


def test_closing_waits_for_what_clears_the_directory(tmp_path, monkeypatch):
    """Its thread would end in a traceback where the process ends first."""
    cleared = []

    async def clear(*_, **__):
        await asyncio.sleep(0.2)
        cleared.append(True)

    monkeypatch.setattr(
        checkpoint_manager.temporary_paths, "cleanup_temporary_paths", clear
    )
    Checkpoints(tmp_path, rank).close()
    assert cleared


def test_what_improves_on_the_best(directory):
    checkpoints = Checkpoints(directory, rank, read_only=True)
    assert checkpoints.improved_by({"top1": 0.8, "loss": 9.0})
    assert checkpoints.improved_by({"top1": 0.7, "loss": 0.1})
    assert not checkpoints.improved_by({"top1": 0.7, "loss": 0.2})
    assert not checkpoints.improved_by({"top1": 0.6, "loss": 0.0})


def test_the_best_is_loaded_not_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", rank)
    for step, top1 in ((1, 0.9), (2, 0.1)):
        state = {"params": jnp.float32(step), "batch_stats": {}}
        metrics = {"top1": top1, "loss": 1.0}
        checkpoints.save(step, state, {"name": str(step)}, metrics)
    checkpoints.close()

    step, variables, config = load_variables(tmp_path)

    assert (step, config) == (1, {"name": "1"})
    assert variables["params"] == 1


def test_restores_where_asked(directory):
    before = _files(directory)
    checkpoints = Checkpoints(directory, rank, read_only=True)
    replicated = sharding.replicated(sharding.make_mesh())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        _state(),
    )
    restored = checkpoints.restore(2, abstract)
    np.testing.assert_array_equal(
        restored["params"]["kernel"], _state(2)["params"]["kernel"]
    )
    assert restored["step"] == 2
    assert restored["step"].sharding.num_devices == 8
    assert checkpoints.config(4) == {"name": "b", "list": [1, 2]}
    checkpoints.close()
    assert _files(directory) == before


def test_another_architecture_is_told_apart(directory):
    checkpoints = Checkpoints(directory, rank, read_only=True)
    other = {**_state(width=5), "extra": jnp.zeros(2)}
    other.pop("step")
    with pytest.raises(ValueError, match="3 arrays differ") as caught:
        checkpoints.restore(4, jax.eval_shape(lambda: other))
    message = str(caught.value)
    assert "params/kernel: (2, 3) float32, expected (2, 5) float32" in message
    assert "extra: missing, expected (2,) float32" in message
    assert "step: () int32, expected nothing" in message


def test_empty_directory_has_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, rank)
    assert checkpoints.newest is None
    assert checkpoints.best is None
    assert checkpoints.improved_by({"top1": 0.0, "loss": 9.0})
