"""Sweeps: what is expanded, refused, run, continued and left alone."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from densenet_jax.runs import directory as runs
from densenet_jax.sweeps import launch, trials
from densenet_jax.sweeps.board import Board
from densenet_jax.tools import sweep
from tests.run_directories import write_run

ROOT = Path(__file__).parent.parent

RECIPE = """
from configs import digits

def get_config():
    config = digits.get_config()
    config.model.block_layers = (1,)
    config.model.growth_rate = 4
    config.batch_size = 240
    config.epochs = {epochs}
    config.schedule.warmup_epochs = 0.0
    config.checkpoint.every_epochs = 0.2
    return config

def sweep(add):
    {sweep}
"""
SEEDS = "for seed in range(3): add({'seed': seed})"


def _recipe(tmp_path, lines=SEEDS, epochs=1.0):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(sweep=lines, epochs=epochs))
    return path


def _arguments(tmp_path, *arguments, **recipe):
    path = _recipe(tmp_path, **recipe)
    return [f"--config={path}", f"--workdir={tmp_path / 'runs'}", *arguments]


# What a sweep is made of


def test_trials_are_named_after_what_differs(tmp_path):
    lines = """
    add({})
    add({"model.block_layers": [2, 1], "model.name": "densenet_40_12"})
    add({"epochs": 2, "dataset.train_split": "train[:50%/x]"})
    """
    expanded = trials.expand(str(_recipe(tmp_path, lines)), tmp_path)
    base, net, data = expanded
    assert [base.name, net.name, data.name] == [
        "base",
        "block_layers=2-1,model.name=densenet_40_12",
        "epochs=2.0,train_split=train[:50%-x]",
    ]
    assert net.directory == tmp_path / net.name
    assert expanded[net].model.block_layers == (2, 1)
    assert expanded[net].model.growth_rate == 4
    assert expanded[data].epochs == 2.0
    assert expanded[base].is_locked
    assert "--config.model.block_layers=[2, 1]" in net.command


def test_a_recipe_with_an_argument(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from configs.cifar10 import get_config\n"
        "def sweep(add): add({'seed': 1})"
    )
    expanded = trials.expand(f"{path}:40_12,plain", tmp_path)
    ((trial, config),) = expanded.items()
    assert config.model.name == "densenet_40_12"
    assert f"--config={path}:40_12,plain" in trial.command


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "add({'model.growth_rte': 6})",
            "sweeps 'model.growth_rte', which is no key of its config. Did "
            "you mean model.growth_rate",
        ),
        ("add({'model.growth_rate': 'six'})", "growth_rate is 'six': exp"),
        ("add({'model.growth_rate': 6.5})", "growth_rate is 6.5: expect"),
        ("add({'seed': None})", "sets seed to None: leave it out"),
        ("add({'seed': 1}); add({'seed': 1})", "adds seed=1 twice"),
        ("add({'epochs': 1}); add({'epochs': 1.0})", "adds epochs=1.0 twice"),
        ("pass", "adds no trial"),
        (
            "add({'seed': 1}); add({'model.compression': 1.5})",
            "Trial compression=1.5: compression is 1.5: must be in (0, 1]",
        ),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    tmp_path, capsys, lines, message
):
    assert sweep.main(_arguments(tmp_path, lines=lines)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_recipe_without_a_sweep(tmp_path, capsys):
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path}"]
    assert sweep.main(arguments) == 1
    assert "configs/digits.py has no sweep(add)" in capsys.readouterr().err
    arguments[0] = f"--config={tmp_path / 'none.py'}"
    assert sweep.main(arguments) == 1
    assert "none.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--shard=0/2", "--shard=3/2", "--shard=1", "--parallel=0"]
)
def test_numbers_out_of_range(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        sweep.main(_arguments(tmp_path, option))
    assert option.partition("=")[2] + " is not" in capsys.readouterr().err


def test_dry_run_prints_what_is_left(tmp_path, capsys):
    arguments = _arguments(tmp_path, "--dry_run")
    assert sweep.main(arguments) == 0
    first, *commands = capsys.readouterr().out.splitlines()
    assert first == "3 trials, 0 of them finished."
    assert len(commands) == 3
    assert f"--config.seed=2 --workdir={tmp_path}/runs/seed=2" in commands[2]
    assert not (tmp_path / "runs").exists()


def test_shards_are_disjoint_and_complete(tmp_path, capsys):
    shown = []
    for i in (1, 2):
        assert (
            sweep.main(_arguments(tmp_path, "--dry_run", f"--shard={i}/2")) == 0
        )
        shown.append(capsys.readouterr().out.splitlines()[1:])
    assert [len(commands) for commands in shown] == [2, 1]
    assert sweep.main(_arguments(tmp_path, "--dry_run")) == 0
    every = capsys.readouterr().out.splitlines()[1:]
    assert sorted(shown[0] + shown[1]) == sorted(every)


def test_a_run_of_another_config_is_not_taken_for_the_trial(tmp_path, capsys):
    write_run(tmp_path / "runs" / "seed=1", [9, 5, 7])
    assert sweep.main(_arguments(tmp_path)) == 1
    message = capsys.readouterr().err
    assert "seed=1 holds a run of another config" in message
    assert "batch_size was 64, is 240" in message


# Running


@pytest.fixture
def stand_ins(tmp_path):
    """Three trials whose processes leave a finished run without training."""
    finished = write_run(tmp_path / "finished", [9, 5, 7])
    code = """
import shutil, sys
from pathlib import Path
shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)
"""
    return [
        _trial(code, tmp_path / name, finished, tmp_path / name)
        for name in "abc"
    ]


def _trial(code, directory, *arguments):
    command = (sys.executable, "-c", code, *map(str, arguments))
    return trials.Trial(directory.name, directory, command)


def _run_here(made, parallel=1):
    """Returns how many failed, and what was printed without a terminal."""
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines), Board(made, Console()) as board:
        failed = launch.run_here(made, parallel, board)
    return failed, lines.getvalue().splitlines()


def _starts(trial):
    """How often a trial's process was started."""
    return sum(
        line.startswith("$ ")
        for line in (trial.directory / "log.txt").read_text().splitlines()
    )


def test_what_is_finished_is_left_alone(stand_ins):
    a, b, c = stand_ins
    assert trials.run(b) == "b: finished"
    assert _run_here([a, b, c]) == (
        0,
        [
            "[0/3] a: running",
            "[1/3] a: finished, test error 7.00%",
            "[2/3] b: finished, test error 7.00%",
            "[2/3] c: running",
            "[3/3] c: finished, test error 7.00%",
        ],
    )
    assert [_starts(trial) for trial in stand_ins] == [1, 1, 1]


def test_a_failure_does_not_stop_the_rest_and_is_tried_again(stand_ins):
    a, b, c = stand_ins
    fails = dataclasses.replace(b, command=_trial("1 / 0", b.directory).command)
    failed, lines = _run_here([a, fails, c])
    assert failed == 1
    assert "[2/3] b: failed, exit 1: ZeroDivisionError" in "\n".join(lines)
    assert (a.problem, c.problem) == (None, None)
    assert b.problem.startswith("failed: exit 1: ZeroDivisionError")
    assert _run_here(stand_ins)[0] == 0
    assert [_starts(trial) for trial in stand_ins] == [1, 2, 1]


def test_several_run_at_a_time(stand_ins):
    # Each waits for the other to have begun.
    code = """
import sys, time
from pathlib import Path
me, other = map(Path, sys.argv[1:])
while not (other / "log.txt").exists():
    time.sleep(0.1)
"""
    a, b = (t.directory for t in stand_ins[:2])
    pair = [_trial(code, a, a, b), _trial(code, b, b, a)]
    _, lines = _run_here(pair, parallel=2)
    assert lines[:2] == ["[0/2] a: running", "[0/2] b: running"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_stops_its_trials(stand_ins, stop):
    a, b, c = stand_ins
    sleeps = _trial("import time; time.sleep(60)", b.directory)
    log = b.directory / "log.txt"

    def interrupt():
        _wait_for(log.exists)
        os.kill(os.getpid(), stop)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit, match=r"^Stopped\. The same command"):
        _run_here([a, sleeps, c])
    thread.join()
    # The lock is free, so the process is gone; nothing says it failed.
    assert b.problem == "no config.json"
    assert _run_here(stand_ins)[0] == 0
    assert [_starts(trial) for trial in stand_ins] == [1, 2, 1]


def test_a_trial_of_a_killed_sweep_is_waited_for(stand_ins):
    """kill -9 leaves its process running: none starts beside it."""
    a = stand_ins[0]
    slowly = "import time; time.sleep(2)" + a.command[2]
    process = trials.start(
        dataclasses.replace(a, command=(*a.command[:2], slowly, *a.command[3:]))
    )
    assert _run_here([a]) == (
        0,
        [
            "[0/1] a: running, by another process",
            "[1/1] a: finished, test error 7.00%",
        ],
    )
    process.wait()
    assert _starts(a) == 1


def _wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle(tmp_path):
    """Real training: a NaN, kill -9 of all processes, and then to the end."""
    lines = """
    add({"seed": 0})
    add({"preprocessing.std": (1e-30,)})
    add({"seed": 1})
    """
    directory = tmp_path / "runs"
    command = [
        *(sys.executable, "-m", "densenet_jax.tools.sweep"),
        *_arguments(tmp_path, lines=lines, epochs=8.0),
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    _wait_for(lambda: runs.progress(directory / "seed=1") is not None)
    process.kill()
    process.wait()
    first = (directory / "seed=0" / "metrics.jsonl").read_bytes()

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1
    assert "1 of 3 trials failed" in again.stderr
    assert "std=1e-30: failed, exit 1: Step" in again.stdout
    assert (directory / "seed=0" / "metrics.jsonl").read_bytes() == first
    for seed in (0, 1):
        runs.read_run(directory / f"seed={seed}")


# Ends of single trials


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit('no memory')", "exit 1: no memory"),
        ("import os; print('hi'); os.abort()", "signal 6: "),
        ("print('done')", "ended well, but is no config.json"),
    ],
)
def test_how_a_trial_failed_is_kept(tmp_path, code, reason):
    trial = _trial(code, tmp_path / "trial")
    assert trials.run(trial).startswith(f"trial: failed, {reason}")
    assert trial.problem.startswith(f"failed: {reason}")


def test_a_trial_that_a_signal_stopped_has_not_failed(tmp_path):
    code = "import sys; print('Stopped by SIGTERM: saved'); sys.exit(75)"
    trial = _trial(code, tmp_path / "trial")
    said = trials.run(trial)
    assert said == "trial: failed, exit 75: Stopped by SIGTERM: saved"
    assert trial.problem == "no config.json"


def test_a_trial_runs_once_at_a_time(tmp_path):
    trial = _trial("input()", tmp_path / "trial")
    process = trials.start(
        _trial("import time; time.sleep(60)", tmp_path / "trial")
    )
    try:
        assert trials.start(trial) is None
        assert trials.run(trial) == "trial: another process is at it"
    finally:
        process.kill()
        process.wait()
    assert trials.run(trial).startswith("trial: failed, exit 1: EOFError")


# The board


def _board(tmp_path, **console):
    errors = {"good": [9, 5, 7], "bad": [9], "later": []}
    made = [
        trials.Trial(name, write_run(tmp_path / name, e, seed=i), ())
        for i, (name, e) in enumerate(errors.items())
    ]
    output = io.StringIO()
    return made, Board(made, Console(file=output, width=100, **console)), output


def test_the_board_is_lines_where_there_is_no_terminal(tmp_path, capsys):
    (good, bad, _), board, output = _board(tmp_path)
    with board:
        board.running(good, here=True)
        board.running(good, here=True)
        board.running(bad, here=False)
        board.refresh()
        board.ended(good, None)
        board.ended(bad, "exit 1: why")
    assert output.getvalue() == ""
    assert capsys.readouterr().out.splitlines() == [
        "[0/3] good: running",
        "[0/3] bad: running, by another process",
        "[1/3] good: finished, test error 7.00%",
        "[2/3] bad: failed, exit 1: why",
    ]


def test_the_board_is_a_table_in_a_terminal(tmp_path, capsys):
    (good, bad, _), board, output = _board(tmp_path, force_terminal=True)
    with board:
        board.running(bad, here=True)
        board.ended(good, None)
        board.refresh()
    assert capsys.readouterr().out == ""
    shown = output.getvalue()
    assert "1 running, 1 waiting, 1 finished" in shown
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if "│" in line]
    cells = {row[0].strip(): [c.strip() for c in row[1:]] for row in rows}
    assert cells["good"] == ["finished", "3.0", "7.00%", ""]
    assert cells["bad"] == ["running", "1.0", "9.00%", "0.0"]
    assert cells["later"] == ["waiting", "", "", ""]
    assert [*cells][-3:] == ["bad", "later", "good"]


# Slurm


def test_slurm_without_submitit(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert sweep.main(_arguments(tmp_path, "--launcher=slurm")) == 1
    assert "pip install submitit" in capsys.readouterr().err


def _python(*words):
    """A process of its own: submitit's logging closes the captured stderr."""
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed")
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


_JOBS = """
import sys
from pathlib import Path
from densenet_jax.sweeps import launch, trials

directory = Path(sys.argv[1])
code = "raise SystemExit('no memory')"
jobs = launch.submit(
    [
        trials.Trial(name, directory / name, (sys.executable, "-c", code))
        for name in "ab"
    ],
    directory,
    parallel=2,
    options={"timeout_min": 1, "slurm_partition": "gpu"},
    cluster="local",
)
for job in jobs:
    print(job.result())
launch.submit([], directory, parallel=1, options={"gpu": 1}, cluster="local")
"""


def test_trials_are_jobs(tmp_path):
    """Through submitit's local executor: the same calls, another cluster."""
    process = _python("-c", _JOBS, tmp_path)
    submitted, results = process.stdout.splitlines()[:2], process.stdout
    assert [line.split()[1] for line in submitted] == ["a", "b"]
    for name in "ab":
        assert f"{name}: failed, exit 1: no memory" in results
        with pytest.raises(ValueError, match=r"^failed: exit 1: no memory"):
            runs.read_run(tmp_path / name)
    assert "submitit refuses: " in process.stderr


def test_slurm_needs_slurm(tmp_path):
    if shutil.which("srun"):
        pytest.skip("Slurm is installed")
    arguments = _arguments(tmp_path, "--launcher=slurm")
    process = _python("-m", "densenet_jax.tools.sweep", *arguments)
    assert process.returncode == 1
    assert "submitit refuses: " in process.stderr
