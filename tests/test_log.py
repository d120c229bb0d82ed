from fractions import Fraction

import numpy as np
import pytest

from densenet_jax.runs.curves import plot_curves, read_metrics
from densenet_jax.runs.log import RunLog
from densenet_jax.tasks.classification import CLASSIFICATION

SUMS = {
    "loss": np.float32(6),
    "top1": np.int32(1),
    "top5": np.int32(3),
    "count": np.int32(4),
    "grad_norm": np.float32(2),
    "param_norm": np.float32(5),
}
RESULT = {"loss": 1.0, "top1": 0.5, "top5": 0.75}


def _open(workdir, first_step=0, **kwargs):
    return RunLog(
        workdir,
        first_step,
        means=CLASSIFICATION.means,
        schedule=lambda step: 0.1 * step,
        steps_per_epoch=Fraction(5, 2),
        **kwargs,
    )


def _write(workdir, steps, first_step=0):
    log = _open(workdir, first_step)
    for step in steps:
        log.add(step, SUMS)
        log.flush(step)
        log.evaluation(step, RESULT)
    log.close()
    return workdir / "metrics.jsonl"


def test_one_object_a_line(tmp_path):
    train, test = read_metrics(_write(tmp_path, [5]))

    assert test == {"step": 5, "split": "test", "epoch": 2.0, **RESULT}
    del train["images_per_second"], train["data_wait"]
    assert train == {
        "step": 5,
        "split": "train",
        "epoch": 2.0,
        "loss": 1.5,
        "top1": 0.25,
        "top5": 0.75,
        "grad_norm": 2.0,
        "param_norm": 5.0,
        # The step from 4 to 5 was taken with the rate of step 4.
        "learning_rate": 0.4,
        "bad_records": 0,
    }
    events = list((tmp_path / "tensorboard").iterdir())
    assert [p.name.startswith("events.out.tfevents") for p in events] == [True]
    assert b"train/loss" in events[0].read_bytes()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_norms_are_averaged_over_steps_and_sums_over_examples(tmp_path):
    log = _open(tmp_path)
    log.add(1, SUMS)
    log.add(2, {**SUMS, "loss": np.float32(2), "grad_norm": np.float32(4)})
    log.flush(2)
    log.add(3, SUMS)
    log.flush(3)
    log.close()

    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["loss"], first["grad_norm"]) == (1.0, 3.0)
    assert (second["loss"], second["grad_norm"]) == (1.5, 2.0)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
def test_what_is_not_finite_is_named_with_its_step(tmp_path, name):
    log = _open(tmp_path)
    with pytest.raises(FloatingPointError, match=f"Step 7: .*{name} is nan"):
        log.add(7, {**SUMS, name: np.float32("nan")})
    with pytest.raises(FloatingPointError, match="Evaluation at step 7: loss"):
        log.evaluation(7, {**RESULT, "loss": float("inf")})
    log.close()


def test_other_hosts_write_nothing(tmp_path):
    log = _open(tmp_path, write=False)
    log.add(1, SUMS)
    log.flush(1)
    log.evaluation(1, RESULT)
    log.close()
    assert not list(tmp_path.iterdir())


def test_continuing_drops_what_will_be_repeated(tmp_path):
    path = _write(tmp_path, [5, 10, 15])
    with path.open("a") as file:
        file.write('{"step": 20, "spl')  # killed while writing
    _write(tmp_path, [], first_step=10)
    kept = [(r["step"], r["split"]) for r in read_metrics(path)]
    assert kept == [(s, split) for s in (5, 10) for split in ("train", "test")]


def test_curves_are_a_picture(tmp_path):
    records = read_metrics(_write(tmp_path, [5, 10]))
    path = tmp_path / "curves.png"
    plot_curves(records, path, "a run")
    assert path.read_bytes().startswith(b"\x89PNG")
