import csv
import json

import pytest

from densenet_jax.analysis import ablation_plots
from densenet_jax.runs import directory as runs
from densenet_jax.tools import report
from tests.run_directories import write_run


def _sweep(directory):
    """Four settings with a seed each; three that came to nothing."""
    for k in (6, 12):
        for compression in (0.5, 1.0):
            write_run(
                directory / f"{k}_{compression}",
                [90, 50, k + compression],
                **{
                    "model.growth_rate": k,
                    "model.compression": compression,
                },
            )
    failed = write_run(directory / "failed", [99, 99, 99], seed=5)
    (failed / runs.FAILURE).write_text(json.dumps({"reason": "exit 1: NaN"}))
    write_run(directory / "early", [99], seed=6)
    names = ["6_0.5", "failed", "early", "never"]
    (directory / runs.TRIALS).write_text(json.dumps(names))
    return directory


def test_report(tmp_path, capsys):
    sweep = _sweep(tmp_path / "sweep")
    assert report.main([str(sweep)]) == 0
    folder = sweep / "report"
    assert {p.name for p in folder.iterdir()} == {
        "report.md",
        "report.csv",
        "costs.png",
        "curves.png",
        "heat_map.png",
    }
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"]({picture.name})" in (folder / "report.md").read_text()
    text = (folder / "report.md").read_text()
    assert "4 finished runs of 4 settings" in text
    assert "| 6.50 | 6.50 | 1 |" in text
    for name, reason in {
        "failed": "failed: exit 1: NaN",
        "early": "unfinished: epoch 1.0 of 3",
        "never": "no config.json",
    }.items():
        assert f"| {sweep / name} | {reason} |" in text
    assert "99.00" not in text
    with (folder / "report.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 7
    assert f"Wrote {folder / 'report.md'}" in capsys.readouterr().out

    # A report is none of the runs that the next one reads.
    assert report.main([str(sweep)]) == 0


def test_several_directories_and_an_output(tmp_path):
    for seed, name in enumerate("ab"):
        write_run(tmp_path / name, [9, 5, 7 + seed], seed=seed)
    output = tmp_path / "new" / "output"
    directories = [str(tmp_path / name) for name in "ab"]
    assert report.main([*directories, f"--output={output}"]) == 0
    text = (output / "report.md").read_text()
    assert "| all | DenseNet-BC | " in text
    assert "| 7.50 ± 0.71 | 5.00 ± 0.00 | 2 |" in text
    assert "Left out" not in text
    assert not (output / "heat_map.png").exists()


@pytest.mark.parametrize("name", ["empty", "none"])
def test_nothing_to_report(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / name)]) == 1
    assert f"No finished run in {tmp_path / name}" in capsys.readouterr().err
    assert not (tmp_path / name / "report").exists()


def test_unfinished_runs_alone_are_listed(tmp_path, capsys):
    write_run(tmp_path / "early", [9])
    assert report.main([str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / 'early'}: unfinished: epoch 1.0 of 3" in message


def test_a_failed_report_leaves_the_last_one(tmp_path, monkeypatch):
    sweep = _sweep(tmp_path / "sweep")
    report.main([str(sweep)])
    before = {p: p.read_bytes() for p in (sweep / "report").iterdir()}
    (sweep / "12_1.0" / "metrics.jsonl").unlink()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(ablation_plots, "plot_heat_map", fail)
    assert report.main([str(sweep)]) == 1
    assert before == {p: p.read_bytes() for p in (sweep / "report").iterdir()}
