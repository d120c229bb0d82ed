"""The command line, as a person types it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = (
    "--config.model.block_layers=(1,)",
    "--config.model.growth_rate=4",
    "--config.batch_size=240",
    "--config.epochs=1",
    "--config.schedule.warmup_epochs=0.5",
)


def _command(workdir, *arguments, config="configs/digits.py"):
    return [
        sys.executable,
        "train.py",
        f"--config={config}",
        f"--workdir={workdir}",
        *arguments,
    ]


def _run(*args, **kwargs):
    return subprocess.run(
        _command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True
    )


def test_train_then_eval(tmp_path):
    trained = _run(tmp_path, *TINY)
    assert trained.returncode == 0, trained.stderr
    *_, last = trained.stdout.splitlines()
    assert last.startswith("Finished 6 steps: test top-1 ")
    assert "denseblock1" in trained.stdout
    assert "Warning" not in trained.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["block_layers"] == [1]

    evaluated = _run(tmp_path, *TINY, "--mode=eval")
    assert evaluated.returncode == 0, evaluated.stderr
    *_, line = evaluated.stdout.splitlines()
    assert line.removeprefix("Step 6: ").removesuffix(".") in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.learning_rte=1"], "Did you mean"),
        (["--config.model.name=densenet12"], "Did you mean densenet121"),
        (["--mode=evaluate"], "train|eval"),
        (["--host=1"], "go with --distributed"),
        (["--workdir=s3://bucket/run"], "mount the storage"),
    ],
)
def test_mistakes_are_named_last(tmp_path, arguments, message):
    run = _run(tmp_path, *TINY, *arguments)
    assert run.returncode != 0
    assert message in "".join(run.stderr.splitlines()[-4:])


def test_a_failure_that_is_foreseen_is_one_line(tmp_path):
    run = _run(tmp_path, *TINY, f"--config.pretrained={tmp_path}/absent.pth")
    assert run.returncode == 1
    assert "absent.pth" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path):
    run = _run(tmp_path)
    assert run.returncode == 0, run.stderr
    *_, last = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last)["top1"] >= 0.975


@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path):
    def records(workdir):
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    one = _run(tmp_path / "one", *TINY)
    assert one.returncode == 0, one.stderr
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [
        subprocess.Popen(
            [
                *_command(tmp_path / "two", *TINY),
                "--distributed",
                f"--coordinator=localhost:{port}",
                "--num_hosts=2",
                f"--host={i}",
            ],
            cwd=ROOT,
            env={**os.environ, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for host in hosts:
        _, stderr = host.communicate(timeout=600)
        assert host.returncode == 0, stderr
    pairs = zip(
        records(tmp_path / "one"), records(tmp_path / "two"), strict=True
    )
    for a, b in pairs:
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
