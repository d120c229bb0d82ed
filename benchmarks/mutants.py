"""Puts plausible faults into the library, one at a time, and runs its tests.

python benchmarks/mutants.py
python benchmarks/mutants.py --only=recompute --jobs=2

Each fault of `faults.toml` replaces one piece of a file in a copy of the
project and runs the test files named beside it, which must then fail. Prints
the faults that no test noticed; the last line is one JSON object. A fault whose
piece is not in its file exactly once is an error: the table follows the code.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tqdm import tqdm

_ROOT = Path(__file__).parents[1]
_TIMEOUT = 1800  # seconds: a fault that never ends is noticed


def read_faults(only: str) -> list[dict]:
    """The faults whose name or file has `only` in it.

    Raises:
      ValueError: a fault's piece is not in its file exactly once.
    """
    text = (Path(__file__).parent / "faults.toml").read_text()
    faults = tomllib.loads(text)["fault"]
    for fault in faults:
        count = (_ROOT / fault["file"]).read_text().count(fault["old"])
        if count != 1:
            raise ValueError(
                f"{fault['name']!r}: {fault['old']!r} is {count} times in "
                f"{fault['file']}, expected once."
            )
    return [f for f in faults if only in f["name"] or only in f["file"]]


def run_tests(fault: dict | None, tests: list[str]) -> bool:
    """Whether tests pass in a copy of the project with a fault in it."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        _copy_tracked_files(copy)
        if fault is not None:
            path = copy / fault["file"]
            path.write_text(
                path.read_text().replace(fault["old"], fault["new"])
            )
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0"]
        try:
            done = subprocess.run(
                [*command, *tests],
                cwd=copy,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode not in (0, 1, 2):  # passed, failed, cannot be imported
        raise RuntimeError(f"{' '.join(tests)}:\n{done.stdout[-2000:]}")
    return done.returncode == 0


def _copy_tracked_files(target: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=_ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_ROOT / name, target / name)


def benchmark(flags: argparse.Namespace) -> int:
    """Runs all; returns the exit status, 1 where too many go unnoticed."""
    faults = read_faults(flags.only)
    if not flags.skip_baseline:
        # Else tests that always fail would notice everything.
        files = {test for fault in faults for test in fault["tests"]}
        if not run_tests(None, sorted(files)):
            raise RuntimeError("The tests fail without a fault.")
    missed = []
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        futures = {
            pool.submit(run_tests, fault, fault["tests"]): fault["name"]
            for fault in faults
        }
        done = concurrent.futures.as_completed(futures)
        for future in (bar := tqdm(done, total=len(futures))):
            if future.result():
                missed.append(futures[future])
                bar.write(f"not noticed: {missed[-1]}")
    share = 1 - len(missed) / len(faults)
    print(f"{len(faults)} faults, {share:.1%} noticed.")
    print(json.dumps({"faults": len(faults), "missed": sorted(missed)}))
    return int(share < 0.95)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a name or file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--skip_baseline",
        action="store_true",
        help="do not run the tests without a fault",
    )
    return benchmark(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
