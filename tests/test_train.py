"""The command line, as a person types it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
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


@pytest.mark.parametrize("debug", [False, True])
def test_a_failure_that_is_foreseen_is_one_line(tmp_path, debug):
    run = _run(
        tmp_path,
        *TINY,
        f"--config.pretrained={tmp_path}/absent.pth",
        f"--debug={debug}",
    )
    assert run.returncode == 1
    assert "absent.pth" in run.stderr.splitlines()[-1]
    assert ("Traceback" in run.stderr) == debug
    assert not (tmp_path / "run.lock").exists()


def test_the_reason_of_any_failure_is_the_last_line(tmp_path):
    program = """
import train
from absl import app

def fail(*_, **__):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\\n  a long list")

train.loop.evaluate_best = fail
app.run(train.main)
"""
    flags = ["--config=configs/digits.py", f"--workdir={tmp_path}"]
    run = subprocess.run(
        [sys.executable, "-c", program, *flags, "--mode=eval"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert "Traceback" in run.stderr


def _wait_for_steps(workdir, process):
    """Until the first step was logged."""
    deadline = time.monotonic() + 300
    path = workdir / "metrics.jsonl"
    while not path.exists() or not path.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Long enough for a signal to come in time.
LONG = (
    "--config.epochs=400",
    "--config.eval_every_epochs=400",
    "--config.checkpoint.every_epochs=400",
    "--config.log_every_steps=1",
)


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_started_again(tmp_path):
    process = subprocess.Popen(
        _command(tmp_path, *TINY, *LONG),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for_steps(tmp_path, process)
    second = _run(tmp_path, *TINY, *LONG)
    assert second.returncode == 1
    assert f"in use by process {process.pid} on" in second.stderr
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    *_, last = stderr.splitlines()
    saved = re.fullmatch(
        r"Stopped by SIGTERM: saved step ([\d,]+)\. Start the same command to "
        r"go on\.",
        last,
    )
    step = int(saved[1].replace(",", ""))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [str(step)]
    epochs = (step + 2) * 240 / 1437
    again = _run(tmp_path, *TINY, f"--config.epochs={epochs}")
    assert again.returncode == 0, again.stderr
    assert f"Continuing from step {step:,}." in again.stdout


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path):
    run = _run(tmp_path)
    assert run.returncode == 0, run.stderr
    *_, last = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last)["top1"] >= 0.975


def _start_hosts(workdir, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                *_command(workdir, *arguments),
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


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all_at_one_step(tmp_path):
    hosts = _start_hosts(tmp_path, *TINY, *LONG)
    _wait_for_steps(tmp_path, hosts[0])
    hosts[1].send_signal(signal.SIGHUP)
    said = set()
    for host in hosts:
        _, stderr = host.communicate(timeout=120)
        assert host.returncode == 75, stderr
        said |= {x for x in stderr.splitlines() if x.startswith("Stopped by")}
    (line,) = said
    assert re.match(r"Stopped by SIGHUP: saved step [1-9]", line)
    step = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"saved step {step['step']:,}." in line
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path):
    def records(workdir):
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    one = _run(tmp_path / "one", *TINY)
    assert one.returncode == 0, one.stderr
    for host in _start_hosts(tmp_path / "two", *TINY):
        _, stderr = host.communicate(timeout=600)
        assert host.returncode == 0, stderr
    pairs = zip(
        records(tmp_path / "one"), records(tmp_path / "two"), strict=True
    )
    for a, b in pairs:
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
