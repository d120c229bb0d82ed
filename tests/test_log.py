from densenet_jax.runs.curves import plot_curves, read_metrics
from densenet_jax.runs.log import RunLog

VALUES = {"epoch": 0.5, "loss": 1.5, "top1": 0.25}


def _write(workdir, steps, first_step=0):
    log = RunLog(workdir, first_step)
    for step in steps:
        log.write(step, "train", VALUES)
        log.write(step, "test", VALUES)
    log.close()
    return log


def test_one_object_a_line(tmp_path):
    log = _write(tmp_path, [5])
    assert read_metrics(log.path) == [
        {"step": 5, "split": "train", **VALUES},
        {"step": 5, "split": "test", **VALUES},
    ]
    events = list((tmp_path / "tensorboard").iterdir())
    assert [p.name.startswith("events.out.tfevents") for p in events] == [True]
    assert b"train/loss" in events[0].read_bytes()


def test_continuing_drops_what_will_be_repeated(tmp_path):
    log = _write(tmp_path, [5, 10, 15])
    with log.path.open("a") as file:
        file.write('{"step": 20, "spl')  # killed while writing
    _write(tmp_path, [], first_step=10)
    kept = [(r["step"], r["split"]) for r in read_metrics(log.path)]
    assert kept == [(s, split) for s in (5, 10) for split in ("train", "test")]


def test_curves_are_a_picture(tmp_path):
    records = read_metrics(_write(tmp_path, [5, 10]).path)
    path = tmp_path / "curves.png"
    plot_curves(records, path, "a run")
    assert path.read_bytes().startswith(b"\x89PNG")
