"""One run a directory: who holds it, and when it is taken over."""

import concurrent.futures
import json
import os
import subprocess
import threading
import time

import pytest

from densenet_jax.runs import lock
from densenet_jax.runs.lock import NAME, RunLock


def _refused(workdir, **options):
    with pytest.raises(ValueError, match="in use by") as refusal:
        RunLock(workdir, **options)
    (line,) = str(refusal.value).splitlines()
    return line


def _edit(workdir, **changes):
    path = workdir / NAME
    holder = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(holder))


@pytest.fixture
def other(tmp_path):
    """Another process, and its lock on tmp_path."""
    process = subprocess.Popen(["sleep", "600"])
    held = RunLock(tmp_path)
    _edit(tmp_path, pid=process.pid, started=lock._start_time(process.pid))
    yield process
    held.release()
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path):
    first = RunLock(tmp_path)
    holder = json.loads((tmp_path / NAME).read_text())
    assert _refused(tmp_path) == (
        f"{tmp_path} is in use by process {os.getpid()} on {holder['host']} "
        f"since {holder['since']}: wait for its end, stop it, or choose "
        "another --workdir."
    )
    first.release()
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path).release()


def test_a_process_that_is_gone_holds_nothing(tmp_path, other):
    assert f"process {other.pid} on" in _refused(tmp_path)
    other.kill()
    # Not waited for yet, it is a zombie, whose number still exists.
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    taken = RunLock(tmp_path, say=pytest.fail)
    assert f"process {os.getpid()} on" in _refused(tmp_path)
    taken.release()
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_no_process_has_holds_nothing(tmp_path, other):
    other.kill()
    other.wait()
    RunLock(tmp_path, say=pytest.fail).release()


def test_a_number_that_another_process_has_now(tmp_path, other):
    _edit(tmp_path, started="1")
    RunLock(tmp_path, say=pytest.fail).release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "\xff"])
@pytest.mark.parametrize("beats", [True, False])
def test_what_cannot_be_seen_from_here_is_watched(tmp_path, text, beats):
    """Another machine, container or version; waits 30 s that nobody spends."""
    path = tmp_path / NAME
    path.write_text(text)
    slept, said = [], []

    def sleep(seconds):
        slept.append(seconds)
        if beats and len(slept) == 20:
            path.write_text(text + " ")

    options = {"patience_seconds": 30, "sleep": sleep, "say": said.append}
    if beats:
        _refused(tmp_path, **options)
        assert sum(slept) == 20
        assert path.read_text() == text + " "
    else:
        RunLock(tmp_path, **options).release()
        assert sum(slept) == 30
        assert not path.exists()
    assert "Waiting 30 s at most" in said[0]


def test_another_machine_is_watched_though_the_number_is_gone(tmp_path, other):
    other.kill()
    other.wait()
    _edit(tmp_path, machine=["elsewhere"], host="elsewhere")
    said = []

    def sleep(_):
        _edit(tmp_path, heartbeat="now")

    assert "on elsewhere since" in _refused(
        tmp_path, sleep=sleep, say=said.append
    )
    assert "on elsewhere since" in said[0]


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    times = iter(range(1000))
    monkeypatch.setattr(lock, "_now", lambda: str(next(times)))
    held = RunLock(tmp_path, beat_seconds=0.01)
    first = (tmp_path / NAME).read_text()
    _until(lambda: (tmp_path / NAME).read_text() != first)
    # What another machine would see of it.
    monkeypatch.setattr(lock, "_machine", lambda: ["elsewhere"])
    _refused(tmp_path, say=lambda _: None, sleep=lambda _: time.sleep(0.05))
    held.check()
    held.release()
    assert not (tmp_path / NAME).exists()


def test_a_holder_that_lost_it_says_so_and_leaves_the_other_alone(tmp_path):
    held = RunLock(tmp_path, beat_seconds=0.01)
    held.check()
    other = json.dumps({"pid": 7, "host": "elsewhere", "since": "today"})
    temporary = tmp_path / "other"
    temporary.write_text(other)
    temporary.replace(tmp_path / NAME)

    _until(lambda: held._lost)
    with pytest.raises(OSError, match="process 7 on elsewhere since today"):
        held.check()
    held.release()
    assert (tmp_path / NAME).read_text() == other


def _until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_at_once_one_gets_it(tmp_path, stale):
    count = 8
    barrier = threading.Barrier(count)

    def start(_):
        barrier.wait()
        try:
            held = RunLock(tmp_path, say=pytest.fail)
        except ValueError:
            held = None
        barrier.wait()  # all have tried before one gives it back
        if held:
            held.release()
        return held

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for _ in range(20):
            if stale:
                left = RunLock(tmp_path)
                _edit(tmp_path, started="1")
            assert len(list(filter(None, pool.map(start, range(count))))) == 1
            if stale:
                left.release()
            assert list(tmp_path.iterdir()) == []
