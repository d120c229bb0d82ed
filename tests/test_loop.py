import contextlib
import itertools
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits
from densenet_jax.runs import description
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.runs.curves import read_metrics
from densenet_jax.runs.directory import read_config
from densenet_jax.runs.lock import NAME, RunLock
from densenet_jax.tasks.classification import CLASSIFICATION
from densenet_jax.tools import evaluate
from densenet_jax.training import evaluation, loop, resume, start
from densenet_jax.training.experiment import build
from densenet_jax.training.signals import Stopped, StopSignals


def _config(**changes):
    """Six steps of a tiny net.

    Evaluates at 3 and 6; saves at 2, 4 and 6, and at 3 since nothing is better
    then; logs after every second step.
    """
    config = digits.get_config()
    config.model.block_layers = (1,)
    config.model.growth_rate = 4
    config.batch_size = 240
    config.epochs = 1.0
    config.eval_every_epochs = 0.5
    config.log_every_steps = 2
    config.checkpoint.every_epochs = 0.3
    config.schedule.warmup_epochs = 0.0
    config.update_from_flattened_dict(changes)
    return config


def _files(workdir):
    return {
        path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()
    }


def _records(workdir):
    """The metrics without the timing."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [
        {
            k: v
            for k, v in r.items()
            if k not in ("images_per_second", "data_wait")
        }
        for r in records
    ]


def _waits(config, workdir):
    """data_wait, and the seconds it is a share of, where training logged."""
    train = [
        r
        for r in read_metrics(workdir / "metrics.jsonl")
        if r["split"] == "train"
    ]
    images = np.diff([0, *(r["step"] for r in train)]) * config.batch_size
    return (
        np.array([r["data_wait"] for r in train]),
        images / [r["images_per_second"] for r in train],
    )


def _final_state(config, workdir):
    checkpoints = Checkpoints(
        workdir / "checkpoints", CLASSIFICATION.rank, read_only=True
    )
    state = checkpoints.restore(
        checkpoints.newest, build(config).abstract_state
    )
    checkpoints.close()
    return jax.device_get(state)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: config, workdir, result."""
    config = _config()
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return config, workdir, loop.train_and_evaluate(config, workdir)


def test_a_run_leaves_what_it_promises(finished):
    config, workdir, result = finished
    assert json.loads((workdir / "config.json").read_text()) == {
        **json.loads(config.to_json()),
        "class_names": None,  # the digits have none
        "task": "classification",
        "image_shape": [8, 8, 1],
    }
    assert read_config(workdir) == json.loads(config.to_json())
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())
    records = _records(workdir)
    assert [(r["step"], r["split"]) for r in records] == [
        (2, "train"),
        (3, "train"),
        (3, "test"),
        (4, "train"),
        (6, "train"),
        (6, "test"),
    ]
    assert {k: records[-1][k] for k in result} == result
    assert set(result) == {"loss", "top1", "top5"}
    steps = {p.name for p in (workdir / "checkpoints").iterdir()}
    best = "3" if records[2]["top1"] > records[5]["top1"] else "6"
    assert steps == {"4", "6", best}


def test_eval_mode_agrees_and_changes_nothing(finished, capsys):
    config, workdir, _ = finished
    before = _files(workdir)
    best = loop.evaluate_best(config, workdir)
    assert best["top1"] == max(
        r["top1"] for r in _records(workdir) if r["split"] == "test"
    )
    assert f"test top-1 {best['top1']:.2%}" in capsys.readouterr().out
    assert _files(workdir) == before


def test_tools_evaluate_agrees_with_eval_mode(finished, capsys):
    """It takes the run's preprocessing: no option says it."""
    config, workdir, _ = finished
    best = loop.evaluate_best(config, workdir)
    assert "changed" not in capsys.readouterr().out
    assert evaluate.main([f"--weights={workdir}", "--dataset=digits"]) == 0
    said = f"top-1 {best['top1']:.2%}, top-5 {best['top5']:.2%}, loss "
    assert f"{said}{best['loss']:.4f}" in capsys.readouterr().out


def test_eval_mode_says_other_preprocessing(finished, capsys):
    _, workdir, _ = finished
    loop.evaluate_best(_config(**{"preprocessing.mean": (0.0,)}), workdir)
    said = "changed config: preprocessing.mean was [77.8], is [0.0]"
    assert said in capsys.readouterr().out


def test_starting_a_finished_run_again_trains_no_further(finished):
    config, workdir, result = finished
    records = _records(workdir)
    assert loop.train_and_evaluate(config, workdir) == result
    assert _records(workdir) == records


class _Interrupted:
    bad_records = 0

    def __init__(self, batches, count):
        self._batches, self._count = batches, count

    def __next__(self):
        if not self._count:
            raise KeyboardInterrupt
        self._count -= 1
        return next(self._batches)

    def close(self):
        self._batches.close()


# What else a checkpoint has to hold; images are flipped by the workers.
_MORE_STATE = {
    "ema_decay": 0.9,
    "model.dropout_rate": 0.2,
    "accumulate": 2,
    "preprocessing.flip": True,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of a run."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    loop.train_and_evaluate(_config(**_MORE_STATE), workdir)
    return workdir


@pytest.mark.parametrize(
    "num_workers", [0, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_continued_run_is_the_uninterrupted_one(
    uninterrupted, tmp_path, monkeypatch, num_workers
):
    """Stopped in the middle of an epoch; all of the state, to the bit."""
    config = _config(**_MORE_STATE)
    config.dataset.num_workers = num_workers
    train_batches = loop.pipeline.train_batches
    with monkeypatch.context() as patch:
        patch.setattr(
            loop.pipeline,
            "train_batches",
            lambda *args, **kw: _Interrupted(train_batches(*args, **kw), 5),
        )
        with pytest.raises(KeyboardInterrupt):
            loop.train_and_evaluate(config, tmp_path)
    assert _records(tmp_path)[-1]["step"] == 4
    loop.train_and_evaluate(config, tmp_path)

    assert _records(tmp_path) == _records(uninterrupted)
    whole, parts = (
        _final_state(config, path) for path in (uninterrupted, tmp_path)
    )
    assert whole.step == 6
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


class _Slow:
    """Batches of which each takes some time."""

    SECONDS = 0.3
    bad_records = 0

    def __init__(self, batches):
        self._batches = batches

    def __next__(self):
        time.sleep(self.SECONDS)
        return next(self._batches)

    def close(self):
        self._batches.close()


def test_waiting_for_data_is_a_share_of_the_time(tmp_path, monkeypatch):
    train_batches = loop.pipeline.train_batches
    monkeypatch.setattr(
        loop.pipeline,
        "train_batches",
        lambda *args, **kw: _Slow(train_batches(*args, **kw)),
    )
    config = _config()
    loop.train_and_evaluate(config, tmp_path)
    waits, seconds = _waits(config, tmp_path)
    assert (waits >= 0).all()
    assert (waits <= 1).all()
    assert (waits * seconds).sum() >= 6 * _Slow.SECONDS


def test_data_at_hand_are_not_waited_for(finished):
    config, workdir, _ = finished
    waits, _ = _waits(config, workdir)
    assert (waits >= 0).all()
    assert waits.min() < 0.5


@pytest.mark.parametrize("log_every_steps", [1, 4])
def test_any_logging_interval_goes_with_any_other(tmp_path, log_every_steps):
    config = _config(
        log_every_steps=log_every_steps,
        eval_every_epochs=0.85,
        **{"checkpoint.every_epochs": 0.85},
    )
    loop.train_and_evaluate(config, tmp_path)
    records = _records(tmp_path)
    steps = [r["step"] for r in records if r["split"] == "train"]
    # Evaluation and checkpoint at 6 = ceil(0.85 * 5.99), then the end.
    every = range(log_every_steps, 7, log_every_steps)
    assert steps == sorted({*every, 6})


def test_nothing_compiles_after_the_first_turns(tmp_path, monkeypatch):
    compiled, seen = [], {}

    def listen(event, *_args, **_kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    monkeypatch.setattr(
        RunLock, "check", lambda _: seen.update({len(seen): len(compiled)})
    )
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        loop.train_and_evaluate(
            _config(**{"checkpoint.every_epochs": 0.5}), tmp_path
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert seen[0] > 0
    # Before each step and each of an evaluation's two batches. The third step
    # is the first that is evaluated and saved.
    assert len(seen) == 7 + 4
    assert seen[1] == seen[2] == seen[3]
    assert seen[6] == seen[7] == seen[8] == seen[10] == len(compiled), seen


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = _config(**{"preprocessing.mean": (float("nan"),)})
    with pytest.raises(FloatingPointError, match=r"Step 1: .* is nan"):
        loop.train_and_evaluate(config, tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    # At the fourth step the parameters' squares overflow.
    config = _config(
        **{
            "schedule.name": "step",
            "schedule.boundaries": (0.5,),
            "schedule.factor": 1e38,
            "checkpoint.every_epochs": 0.1,
            "checkpoint.keep_newest": 1,
        }
    )
    with pytest.raises(FloatingPointError, match=r"Step 4: .* param_norm is"):
        loop.train_and_evaluate(config, tmp_path)
    assert _final_state(config, tmp_path).step == 3


def test_a_checkpoint_past_the_end_is_refused(finished):
    _, workdir, _ = finished
    with pytest.raises(ValueError, match="of step 6, past the config's last"):
        loop.train_and_evaluate(_config(epochs=0.5), workdir)


def test_a_finished_run_can_be_made_longer(finished, tmp_path, capsys):
    _, workdir, _ = finished
    longer = tmp_path / "longer"
    shutil.copytree(workdir, longer)
    before = _records(longer)
    loop.train_and_evaluate(_config(epochs=1.4), longer)
    assert "learning rate at step 6 was 0 by" in capsys.readouterr().out
    after = _records(longer)
    assert after[: len(before)] == before
    assert after[-1]["step"] == round(1.4 * 1437 / 240)


class _Signalled(StopSignals):
    """A signal that comes while something is being done."""

    def after(self, count):
        """A wrapper of a function, whose call of that number brings it."""

        def wrap(function):
            def wrapped(*args, **kwargs):
                nonlocal count
                count -= 1
                if count == 0:
                    self.receive(signal.SIGTERM)
                return function(*args, **kwargs)

            return wrapped

        return wrap


@pytest.mark.parametrize(
    ("owner", "name", "count", "step"),
    [
        # The first evaluation takes batches too, and one look for a third.
        (loop.pipeline.Batches, "__next__", 8, 5),
        # Evaluations, of two batches each, are after steps 3 and 6; their
        # batches are taken ahead of the question whether to go on.
        (evaluation.pipeline, "eval_batches", 1, 3),
        pytest.param(
            loop.Checkpoints, "improved_by", 1, 4, marks=pytest.mark.slow
        ),
        pytest.param(loop.Checkpoints, "save", 2, 4, marks=pytest.mark.slow),
        (evaluation.pipeline, "eval_batches", 2, 6),
    ],
    ids=["step", "evaluation", "evaluated", "save", "last evaluation"],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    uninterrupted, tmp_path, monkeypatch, owner, name, count, step
):
    """No step is lost, no evaluation either, and no bit differs."""
    config = _config(**_MORE_STATE)
    signals = _Signalled()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signals.after(count)(getattr(owner, name)))
        with pytest.raises(
            Stopped, match=rf"^Stopped by SIGTERM: saved step {step}\. Start"
        ):
            loop.train_and_evaluate(config, tmp_path, signals=signals)
    assert not (tmp_path / NAME).exists()
    assert _final_state(config, tmp_path).step == step
    loop.train_and_evaluate(config, tmp_path)

    def tests(workdir):
        return [r for r in _records(workdir) if r["split"] == "test"]

    assert tests(tmp_path) == tests(uninterrupted)
    assert _best(tmp_path) == _best(uninterrupted)
    whole, parts = (
        _final_state(config, path) for path in (uninterrupted, tmp_path)
    )
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def _best(workdir):
    checkpoints = Checkpoints(
        workdir / "checkpoints", CLASSIFICATION.rank, read_only=True
    )
    with contextlib.closing(checkpoints):
        return checkpoints.best


def test_a_signal_before_the_first_step_saves_nothing(tmp_path, monkeypatch):
    signals = StopSignals()
    begin = loop.Requests.begin

    def begin_late(self):
        begin(self)
        signals.receive(signal.SIGHUP)

    monkeypatch.setattr(loop.Requests, "begin", begin_late)
    with pytest.raises(Stopped, match=r"^Stopped by SIGHUP before the first"):
        loop.train_and_evaluate(_config(), tmp_path, signals=signals)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("minutes", "steps"),
    [
        # Each look is 45 s after the one before: as the run begins, before
        # each step, and after a save.
        (3.0, [3, 6]),
        (None, [6]),
    ],
)
def test_the_clock_asks_for_checkpoints_too(tmp_path, minutes, steps):
    config = _config(
        eval_every_epochs=1.0,
        **{
            "checkpoint.every_epochs": 1.0,
            "checkpoint.every_minutes": minutes,
            "checkpoint.keep_newest": 9,
        },
    )
    ticks = itertools.count(0, 45.0)
    loop.train_and_evaluate(config, tmp_path, clock=lambda: next(ticks))
    saved = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert sorted(saved) == steps


def test_two_runs_never_share_a_directory(tmp_path):
    lock = RunLock(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
        loop.train_and_evaluate(_config(), tmp_path)
    assert set(tmp_path.iterdir()) == before
    lock.release()


def test_evaluation_takes_no_lock(finished):
    config, workdir, _ = finished
    lock = RunLock(workdir)
    try:
        loop.evaluate_best(config, workdir)
    finally:
        lock.release()


def test_another_architecture_cannot_continue(finished):
    _, workdir, _ = finished
    before = _files(workdir)
    with pytest.raises(ValueError, match="denselayer1/conv1/kernel"):
        loop.train_and_evaluate(_config(**{"model.growth_rate": 6}), workdir)
    assert _files(workdir) == before


def test_another_place_in_the_data_cannot_continue(finished):
    _, workdir, _ = finished
    with pytest.raises(ValueError, match="batch_size was 240, is 80"):
        loop.train_and_evaluate(_config(batch_size=80), workdir)


def test_a_changed_config_is_said(finished, capsys):
    _, workdir, result = finished
    again = loop.train_and_evaluate(
        _config(**{"optimizer.momentum": 0.5}), workdir
    )
    assert again == result
    assert "optimizer.momentum was 0.9, is 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (
            {"schedule.name": "step"},
            "was 0.00375 by the saved config and is",
        ),
        (
            {"schedule.name": "cosine"},
            # 0.375 (1 + cos(pi / 4)) / 2
            "was 0 by the saved config and is 0.32 now",
        ),
    ],
    ids=str,
)
def test_a_rate_that_jumps_is_said(capsys, schedule, rates):
    """A run of four times the epochs moves all shares of it."""
    saved = json.loads(_config(**schedule).to_json())
    resume._say_other_rate(saved, build(_config(epochs=4.0, **schedule)), 6)
    assert f"learning rate at step 6 {rates}" in capsys.readouterr().out
    resume._say_other_rate(saved, build(_config(**schedule)), 6)
    assert capsys.readouterr().out == ""


def _folders(root, *names, size=8):
    """A train and a test image for each class."""
    for split in ("train", "val"):
        for i, name in enumerate(names):
            path = root / split / name / "1.png"
            path.parent.mkdir(parents=True)
            pixels = np.full((size, size, 3), 40 * i, np.uint8)
            Image.fromarray(pixels).save(path)


def _folder_config(root, **changes):
    return _config(
        **{
            "dataset.name": "folder",
            "dataset.data_dir": str(root),
            "dataset.test_split": "val",
            "preprocessing.image_size": 8,
            "preprocessing.resize_size": 8,
            "batch_size": 8,
            "optimizer.base_batch_size": 8,
            "epochs": 8.0,
            "eval_every_epochs": 8.0,
            "checkpoint.every_epochs": 8.0,
            **changes,
        }
    )


def test_other_classes_are_refused(tmp_path):
    data, workdir = tmp_path / "data", tmp_path / "run"
    _folders(data, "1", "10", "2")
    config = _folder_config(data)
    loop.train_and_evaluate(config, workdir)
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["class_names"] == ["1", "10", "2"]
    assert loop.evaluate_best(config, workdir)

    for split in ("train", "val"):
        (data / split / "2").rename(data / split / "0")
    message = r"class 0 was '1', is '0'\. Restore"
    with pytest.raises(ValueError, match=message):
        loop.evaluate_best(config, workdir)
    config.epochs = 16.0
    with pytest.raises(ValueError, match=message):
        loop.train_and_evaluate(config, workdir)


def test_classes_that_the_data_lack_are_named_too(tmp_path):
    _folders(tmp_path, "cat", "dog")
    config = _folder_config(tmp_path, **{"model.num_classes": 3})
    saved = start.config_to_save(config, build(config))
    assert saved["class_names"] == ["cat", "dog", "class 2"]
    # As a checkpoint of another data set of as many classes would be.
    names = saved["class_names"]
    assert not description.name_difference(names, list(names))


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot write to .*file/run"):
        loop.train_and_evaluate(_config(), tmp_path / "file" / "run")


def test_eval_mode_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="No checkpoints in"):
        loop.evaluate_best(_config(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
