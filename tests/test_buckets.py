"""Runs in a bucket, against an emulator on the loopback."""

import functools
import importlib.util
import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import digits
from densenet_jax import files
from densenet_jax.data.images import BadRecordError
from densenet_jax.data.sources import open_source
from densenet_jax.files import as_path, replacing
from densenet_jax.runs import copied
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.runs.curves import read_metrics
from densenet_jax.runs.directory import find_runs, prepare
from densenet_jax.tasks.classification import CLASSIFICATION
from densenet_jax.tools import evaluate, predict, report, sweep
from densenet_jax.training import loop
from densenet_jax.training.experiment import build
from tests import fake_gcs
from tests.tiny_tfds import write_tiny_tfds

# Not imported here: gcsfs reads its environment when it is.
for _package in ("gcsfs", fake_gcs.PACKAGE):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"needs {_package}", allow_module_level=True)

ROOT = Path(__file__).parent.parent
RUNS = itertools.count()
TINY = {
    "model.block_layers": (1,),
    "model.growth_rate": 4,
    "batch_size": 240,
    "epochs": 1.0,
    "eval_every_epochs": 0.5,
    "log_every_steps": 2,
    "checkpoint.every_epochs": 0.3,
    "schedule.warmup_epochs": 0.0,
}


def _config():
    """Six steps: evaluates at 3 and 6, saves at 2, 3, 4 and 6."""
    config = digits.get_config()
    config.update_from_flattened_dict(TINY)
    return config


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for the module: the clients keep the address in their globals."""
    with (
        pytest.MonkeyPatch.context() as patch,
        fake_gcs.serving(tmp_path_factory.mktemp("server")) as bucket,
    ):
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        # fsspec has read its environment when it was imported.
        import fsspec

        for name in ("gs", "gcs"):
            options = fsspec.config.conf.setdefault(name, {})
            patch.setitem(options, "token", "anon")
        yield bucket


@pytest.fixture
def bucket(server):
    server.fault = lambda *_: None
    server.requests.clear()
    server.faults = server.sent = 0
    yield server
    server.fault = lambda *_: None


@pytest.fixture
def directory(bucket):
    """A directory in the bucket that no test has used."""
    return as_path(f"gs://bucket/test{next(RUNS)}")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A finished run on the disk."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    loop.train_and_evaluate(_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def trained_and_count(server):
    """The same run in the bucket, and how many requests it made."""
    server.fault = lambda *_: None
    server.requests.clear()
    workdir = as_path("gs://bucket/trained/run")
    loop.train_and_evaluate(_config(), workdir)
    return workdir, len(server.requests)


@pytest.fixture
def trained(trained_and_count):
    return trained_and_count[0]


def _state(workdir):
    checkpoints = Checkpoints(
        workdir / "checkpoints", CLASSIFICATION.rank, read_only=True
    )
    state = checkpoints.restore(
        checkpoints.newest, build(_config()).abstract_state
    )
    checkpoints.close()
    return jax.device_get(state)


def _records(workdir):
    timing = ("images_per_second", "data_wait")
    return [
        {k: v for k, v in record.items() if k not in timing}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]


def _assert_same(workdir, local):
    """Parameters, statistics, optimizer and log, to the bit."""
    assert _records(workdir) == _records(local)
    jax.tree.map(np.testing.assert_array_equal, _state(workdir), _state(local))


def _name(path):
    return str(path).removeprefix("gs://bucket/")


# Paths


def test_an_address_survives_pathlib_and_strings(bucket):
    address = "gs://bucket/a/b"
    for given in (address, Path(address), epath.Path(address)):
        assert str(as_path(given)) == address
        assert files.in_bucket(as_path(given))
    assert not files.in_bucket(as_path("~/a"))
    assert as_path("~") == Path.home()


@pytest.mark.parametrize("name", ["s3://b/x", "memory://x", "gs://", "gs:///x"])
def test_other_addresses_are_refused(bucket, name):
    with pytest.raises(ValueError, match="neither a path on this machine nor"):
        as_path(name)


def test_a_missing_client_is_named(bucket, monkeypatch):
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *_: None if name == "gcsfs" else 1,
    )
    with pytest.raises(ValueError, match="gcsfs is not installed: pip install"):
        as_path("gs://bucket/run")


def test_replacing_writes_whole_or_not_at_all(bucket, directory):
    path = directory / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert bucket.names(_name(directory)) == [_name(path)]
    assert bucket.read(_name(path)) == b"old"


def test_what_others_write_is_seen(bucket, directory):
    assert find_runs(directory) == []
    bucket.write(_name(directory / "a" / "config.json"), b"{}")
    bucket.write(_name(directory / "a" / "checkpoints/6/config.json"), b"{}")
    assert find_runs(directory) == [directory / "a"]
    bucket.write(_name(directory / "b" / "metrics.jsonl"), b"")
    assert find_runs(directory) == [directory / "a", directory / "b"]


def test_a_bucket_that_is_not_there_is_neither_made_nor_a_traceback(bucket):
    with pytest.raises(OSError, match=r"^Cannot write to gs://absent/run \(.+"):
        prepare(as_path("gs://absent/run"))
    assert not any(path.startswith("/b") for _, path in bucket.requests)
    assert not as_path("gs://absent").exists()


def test_an_address_as_a_local_path_is_refused(bucket):
    with pytest.raises(ValueError, match="make it by densenet_jax"):
        prepare(Path("gs://bucket/run"))


def test_a_bucket_that_refuses_is_one_line(bucket):
    bucket.fault = lambda *_: "refused"
    with pytest.raises(OSError, match="Cannot write to gs://bucket/run") as e:
        prepare(as_path("gs://bucket/run"))
    assert "choose another --workdir" in str(e.value)
    assert "\n" not in str(e.value)


# Logs


def test_logs_are_copied_rarely_unless_asked(bucket, directory, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(copied.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(copied, "_SECONDS", 600)
    monkeypatch.setattr(copied, "_SHARE", 0.1)
    log = copied.Copied(directory, ["metrics.jsonl"])
    copies = 0
    with (log.directory / "metrics.jsonl").open("a", buffering=1) as file:
        for second in range(0, 60_000, 100):
            now[0] = float(second)
            file.write(f"{second}\n")
            before = len(bucket.requests)
            log.copy_if_due()
            copies += len(bucket.requests) > before
        # Ten in the first 6,000 s, then ten a factor of e: 10 + 10 log(10).
        assert 28 < copies < 36
        log.copy()
        lines = bucket.read(_name(directory / "metrics.jsonl")).split()
        assert len(lines) == 600
        before = len(bucket.requests)
        log.copy()  # nothing is new
        assert len(bucket.requests) == before
    log.close()


def test_a_log_that_cannot_be_copied_is_one_line(bucket, directory):
    log = copied.Copied(directory, ["metrics.jsonl"])
    (log.directory / "metrics.jsonl").write_text("line\n")
    bucket.fault = lambda *_: "refused"
    with pytest.raises(OSError, match=r"Cannot write gs://.*metrics.jsonl \("):
        log.close()
    assert not log.directory.exists()


# Runs


def test_a_run_equals_a_local_one(bucket, trained, local):
    _assert_same(trained, local)
    names = {name.split("/")[2] for name in bucket.names("trained/run/")}
    assert names == {path.name for path in local.iterdir()}
    events = bucket.names("trained/run/tensorboard/")
    assert len(events) == 1
    assert b"test/top1" in bucket.read(events[0])
    assert bucket.read("trained/run/curves.png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(share, marks=pytest.mark.slow)
        for share in (0.3, 0.5, 0.6, 0.9)
    ],
)
def test_a_run_whose_bucket_is_lost_continues(
    trained_and_count, bucket, directory, local, share
):
    """Every request is refused from one on, as after a kill; then none is."""
    _, count = trained_and_count
    bucket.requests.clear()
    bucket.fault = lambda _, __, n: "refused" if n > share * count else None
    with pytest.raises(Exception):  # noqa: B017, PT011
        loop.train_and_evaluate(_config(), directory / "run")
    bucket.fault = lambda *_: None
    loop.train_and_evaluate(_config(), directory / "run")
    _assert_same(directory / "run", local)


@pytest.mark.slow
def test_a_run_survives_faults(bucket, directory, local):
    """One request in twelve fails, in turn by 503 and by a cut answer."""
    kinds = itertools.cycle(["error", "cut"])
    bucket.fault = lambda _, __, n: next(kinds) if n % 12 == 11 else None
    loop.train_and_evaluate(_config(), directory)
    bucket.fault = lambda *_: None
    print(f"{bucket.faults} faults in {len(bucket.requests)} requests")
    assert bucket.faults > 10
    _assert_same(directory, local)


@pytest.mark.slow
def test_a_killed_process_continues(
    trained_and_count, bucket, directory, local
):
    """SIGKILL at requests early and late, each time in a new process."""
    _, count = trained_and_count
    command = [
        *(sys.executable, "train.py", "--config=configs/digits.py"),
        f"--workdir={directory}",
        *(f"--config.{key}={value}" for key, value in TINY.items()),
    ]
    said, kills = "", 0
    for share in (0.2, 0.7, 0.3, 0.4, 0.3, None):
        bucket.requests.clear()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        last = share and int(share * count)
        bucket.fault = functools.partial(_kill, process, last)
        said += process.communicate()[0]
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    print(f"{kills} SIGKILLs, continued {said.count('Continuing')} times")
    assert process.returncode == 0
    assert kills >= 3
    assert "Continuing from step" in said
    _assert_same(directory, local)


def _kill(process, last, _, __, number):
    if number == last:
        process.kill()


# Tools


def test_tools_read_runs(trained, local, tmp_path, capsys):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    for tool, arguments in (
        (predict, [str(tmp_path / "a.png")]),
        (evaluate, ["--dataset=digits"]),
    ):
        said = []
        for run in (local, trained):
            assert tool.main([f"--weights={run}", *arguments]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]


def test_weights_that_are_no_run_are_one_line(bucket, capsys):
    bucket.write("net.safetensors", b"x")
    assert predict.main(["--weights=gs://bucket/net.safetensors", "a"]) == 1
    said = capsys.readouterr().err
    assert "only the directory of a run is read" in said
    assert said.count("\n") == 1


def test_report_reads_and_writes(bucket, trained, capsys):
    assert report.main(["gs://bucket/trained"]) == 0
    assert "| 1 |" in capsys.readouterr().out
    text = bucket.read("trained/report/report.md")
    assert b"# trained\n" in text
    names = bucket.names("trained/report/")
    assert [n.rpartition("/")[2] for n in names] == [
        *("costs.png", "curves.png", "report.csv", "report.md"),
    ]


@pytest.mark.slow
def test_sweep(bucket, directory, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from configs import digits\n"
        "def get_config():\n"
        "    config = digits.get_config()\n"
        f"    config.update_from_flattened_dict({TINY!r})\n"
        "    return config\n"
        "def sweep(add):\n"
        "    add({'seed': 1})\n"
    )
    arguments = [f"--config={recipe}", f"--workdir={directory}"]
    assert sweep.main(arguments) == 0
    assert not (tmp_path / "gs:").exists()
    trial = directory / "seed=1"
    assert json.loads((directory / "trials.json").read_text()) == ["seed=1"]
    assert "Finished 6 steps" in (trial / "log.txt").read_text()
    assert report.main([str(directory)]) == 0
    capsys.readouterr()
    assert sweep.main([*arguments, "--dry_run"]) == 0
    assert capsys.readouterr().out == "1 trials, 1 of them finished.\n"


# Data


def _upload(bucket, local, directory):
    for path in local.rglob("*"):
        if path.is_file():
            name = directory / path.relative_to(local).as_posix()
            bucket.write(_name(name), path.read_bytes())


def test_image_folders(bucket, directory, tmp_path):
    rng = np.random.default_rng(0)
    for name in (
        *("train/cat/b.png", "train/cat/deep/a.png", "train/dog/a.PNG"),
        *("train/.hidden/a.png", "test/dog/c.png"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).save(path)
    (tmp_path / "train/cat/notes.txt").write_text("")
    _upload(bucket, tmp_path, directory)
    for split in ("train", "test"):
        expected, found = (
            open_source("folder", split, str(root), "skip", ("train",))
            for root in (tmp_path, directory)
        )
        assert found.class_names == expected.class_names
        assert len(found.examples) == len(expected.examples)
        for one, other in zip(expected.examples, found.examples):
            assert one["label"] == other["label"]
            np.testing.assert_array_equal(
                one["image"].decode(), other["image"].decode()
            )
    with pytest.raises(ValueError, match="has no directory 'val', but: test"):
        open_source("folder", "val", str(directory))


def test_a_bucket_out_of_reach_is_no_bad_record(bucket, directory):
    bucket.write(_name(directory / "train/cat/a.png"), b"x")
    source = open_source("folder", "train", str(directory))
    bucket.fault = lambda *_: "refused"
    with pytest.raises(OSError, match=r"^Cannot read gs://.*a.png"):
        source.examples[0]
    bucket.fault = lambda *_: None
    (directory / "train/cat/a.png").unlink()
    with pytest.raises(BadRecordError, match="no such object"):
        source.examples[0]


def test_tfds(bucket, directory, tmp_path):
    images, labels = write_tiny_tfds(tmp_path)
    _upload(bucket, tmp_path, directory)
    shutil.rmtree(tmp_path)
    source = open_source("cifar10", "train", str(directory))
    assert len(source.examples) == len(images)
    for example, image, label in zip(source.examples, images, labels):
        assert example["label"] == label
        np.testing.assert_array_equal(example["image"].decode(), image)
