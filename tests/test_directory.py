import json
from fractions import Fraction

import pytest

from densenet_jax.runs import directory as runs
from tests.run_directories import read_totals, write_run


def test_a_finished_run(tmp_path):
    changes = {"model.growth_rate": 6, "model.compression": 0.7, "seed": 3}
    run = runs.read_run(write_run(tmp_path / "run", [9, 5, 7], **changes))
    assert run.config["seed"] == 3
    assert run.config["dataset.name"] == "digits"
    assert (run.model.growth_rate, run.model.compression) == (6, 0.7)
    assert run.model.bottleneck_width == 4  # as the named variant has it
    assert read_totals(run.directory) == {
        "parameters": run.parameters,
        "multiply_adds": run.multiply_adds,
    }
    assert [r["step"] for r in run.split("test")] == [22, 45, 67]


def _cut(directory):
    path = directory / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), r"^no config\.json$"),
        (lambda d: (d / "network.json").unlink(), r"^no network\.json$"),
        (lambda d: (d / "metrics.jsonl").unlink(), r"^no metrics\.jsonl$"),
        (
            lambda d: (d / "metrics.jsonl").write_text(""),
            r"^unfinished: no evaluation yet$",
        ),
        (_cut, r"^metrics\.jsonl is cut off in line 6 of 6$"),
        (
            lambda d: (d / "config.json").write_text('{"seed"'),
            r"^config\.json is damaged",
        ),
        (
            lambda d: (d / runs.FAILURE).write_text('{"reason": "exit 1: x"}'),
            r"^failed: exit 1: x$",
        ),
    ],
)
def test_what_is_not_whole_is_named(tmp_path, damage, message):
    directory = write_run(tmp_path / "run", [9, 5, 7])
    runs.read_run(directory)
    damage(directory)
    with pytest.raises(ValueError, match=message):
        runs.read_run(directory)


def test_an_unfinished_run_says_how_far_it_came(tmp_path):
    directory = write_run(tmp_path / "run", [9, 5])
    with pytest.raises(ValueError, match=r"^unfinished: epoch 2\.0 of 3$"):
        runs.read_run(directory)


_LENGTHS = [
    (epochs, Fraction(examples, batch_size))
    for epochs in (0.5, 1.0, 2.5, 30.0, 1 / 3)
    for examples in (45, 1437, 50_000)
    for batch_size in (1, 7, 64, 240)
]


def test_the_last_step_is_the_end_and_no_step_before(tmp_path):
    """The end is `training.experiment`'s: rounded epochs of a fraction."""
    directory = write_run(tmp_path / "run", [])
    config = json.loads((directory / "config.json").read_text())
    lengths = [
        (epochs, steps_per_epoch, round(epochs * steps_per_epoch))
        for epochs, steps_per_epoch in _LENGTHS
        if epochs * steps_per_epoch > 3
    ]
    assert len(lengths) > 40
    for epochs, steps_per_epoch, total in lengths:
        config["epochs"] = epochs
        (directory / "config.json").write_text(json.dumps(config))

        def evaluated_at(step, steps_per_epoch=steps_per_epoch):
            epoch = float(step / steps_per_epoch)
            record = dict(step=step, epoch=epoch, split="test", top1=0.5)
            (directory / "metrics.jsonl").write_text(json.dumps(record))
            runs.read_run(directory)

        evaluated_at(total)
        # Where the end is a half the step before it is as near.
        tie = epochs * steps_per_epoch % 1 == 0.5
        with pytest.raises(ValueError, match=r"^unfinished: epoch"):
            evaluated_at(total - (2 if tie else 1))


def test_runs_are_found_but_not_in_runs(tmp_path):
    run = write_run(tmp_path / "a" / "run", [9])
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / runs.FAILURE).write_text("{}")
    checkpoint = run / "checkpoints" / "3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    assert runs.find_runs(tmp_path) == [run, failed]
    assert runs.find_runs(run) == [run]
    assert runs.find_runs(tmp_path / "none") == []


def test_progress_is_the_last_evaluation(tmp_path):
    run = write_run(tmp_path / "run", [9, 5])
    assert runs.progress(run)["top1"] == 0.95
    _cut(run)
    assert runs.progress(run) is None  # for the moment
    assert runs.progress(tmp_path) is None


def test_labels_are_short_where_they_can_be():
    keys = ["seed", "model.name", "optimizer.name", "model.block_layers"]
    settings = {"model.block_layers": [4, 4], "model.name": "x", "seed": 1}
    label = "block_layers=4-4, model.name=x, seed=1"
    assert runs.label(settings, keys) == label
    assert runs.label(settings, keys, ",") == label.replace(", ", ",")
