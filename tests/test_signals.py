"""Signals, in processes of their own."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from densenet_jax.training import sharding, signals
from densenet_jax.training.polling import Agreement, Requests

_EXIT = signals.EXIT_CODE

# The program says when it is ready, and then keeps its main thread in C code.
_PROGRAM = """
import signal, subprocess, sys, threading, time
from densenet_jax.training.signals import StopSignals
stop = StopSignals()
stop.before_exit(lambda: open("left", "x").close())
stop.install()
{first}
sys.stdout.write("ready\\n")
sys.stdout.flush()
{then}
"""
_BUSY = "threading.Event().wait()"
_LOOP = """
while not stop.requested:
    time.sleep(0.01)
print(signal.Signals(stop.requested).name, flush=True)
sys.exit(7)
"""


def _start(tmp_path, first="", then=_BUSY, before=(), **options):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = _PROGRAM.format(first=first, then=textwrap.dedent(then))
    options = {"stderr": subprocess.PIPE, **options}
    process = subprocess.Popen(
        [*before, sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_before_training_a_signal_ends_the_process(tmp_path, name):
    process = _start(tmp_path)
    process.send_signal(signal.Signals[name])
    _, said = process.communicate(timeout=30)
    assert process.returncode == _EXIT == 75
    assert said == (
        f"Stopped by {name}: there was nothing to save. Start the same "
        "command again.\n"
    )
    assert (tmp_path / "left").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_in_training_the_loop_hears_of_it(tmp_path, name):
    process = _start(tmp_path, "stop.defer()", _LOOP)
    process.send_signal(signal.Signals[name])
    printed, said = process.communicate(timeout=30)
    assert process.returncode == 7
    assert printed == f"{name}\n"
    assert said == (
        f"{name}: stopping after this step; again to stop at once.\n"
    )
    assert not (tmp_path / "left").exists()


def test_a_second_signal_ends_the_process(tmp_path):
    process = _start(tmp_path, "stop.defer()")
    process.send_signal(signal.SIGINT)
    # As a launcher would, which passes on what the terminal sent already.
    process.send_signal(signal.SIGTERM)
    time.sleep(signals._REPEAT_SECONDS + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == _EXIT
    first, last = said.splitlines()
    assert first.endswith(": stopping after this step; again to stop at once.")
    assert last.startswith("Stopped by a second signal, SIGTERM, without")


def test_what_was_ignored_stays_ignored(tmp_path):
    process = _start(tmp_path, before=["nohup"], stdin=subprocess.DEVNULL)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "Stopped by SIGTERM" in process.communicate(timeout=30)[1]


def test_processes_that_load_data_live_on(tmp_path):
    """A terminal's Ctrl-C and Slurm signal them too."""
    process = _start(
        tmp_path,
        """
stop.defer()
child = subprocess.Popen(["sleep", "600"])
""",
        """
while not stop.requested:
    time.sleep(0.01)
time.sleep(0.5)
print(child.poll(), flush=True)
child.kill()
""",
        start_new_session=True,
    )
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "None\n"


def test_a_pipe_or_a_terminal_that_ended_stops_nothing(tmp_path):
    """Ctrl-C ends tee too; a closed terminal is the reason for SIGHUP."""
    read, write = os.pipe()
    process = _start(tmp_path, "stop.defer()", _LOOP, stderr=write)
    os.close(read)
    os.close(write)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 7

    controller, terminal = pty.openpty()
    process = _start(
        tmp_path,
        "stop.defer()",
        """
while not stop.requested:
    time.sleep(0.01)
time.sleep(0.5)
print("to the terminal", file=sys.stderr, flush=True)
sys.exit(7)
""",
        stderr=terminal,
    )
    os.close(terminal)
    os.close(controller)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 7


def _requests(every_minutes, clock=lambda: 0.0):
    stop = signals.StopSignals()
    over_data = sharding.over_data(sharding.make_mesh())
    return stop, Requests(over_data, stop, every_minutes, clock)


def test_the_clock_starts_anew_at_each_checkpoint():
    now = 100.0
    _, requests = _requests(0.5, lambda: now)
    requests.begin()
    seen = []
    for now in (129.0, 130.0, 131.0, 160.9, 161.0):
        requests.poll()
        seen.append(requests.save)
        if now == 131.0:
            requests.saved()
    assert seen == [False, True, True, False, True]
    assert requests.stop == ""


def test_without_an_interval_the_clock_asks_for_nothing():
    stop, requests = _requests(None, lambda: np.inf)
    requests.begin()
    assert not requests.stopping()
    assert not requests.save
    stop.receive(signal.SIGINT)
    assert requests.stopping()
    assert requests.stop == "SIGINT"


def test_hosts_agree_on_the_greatest_one_call_late():
    over_data = sharding.over_data(sharding.make_mesh())
    agree = Agreement(over_data)
    assert agree(0, 1) == (0, 0)
    assert agree(15, 0) == (0, 1)
    assert agree(0, 0) == (15, 0)
    assert agree(0, 0) == (0, 0)
    # One of several hosts, whose devices each hold a row.
    rows = np.zeros((8, 2), np.int32)
    rows[5, 0] = signal.SIGTERM
    rows[2, 1] = 1
    answer = agree._greatest(jax.device_put(rows, over_data))
    assert answer.tolist() == [signal.SIGTERM, 1]
    assert answer.sharding.is_fully_replicated
