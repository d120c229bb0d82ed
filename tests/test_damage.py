import contextlib
import json
import random
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.damage import damage
from configs import digits
from densenet_jax.runs import manager
from densenet_jax.runs.checkpoints import Checkpoints, load_variables
from densenet_jax.runs.damage import DamagedCheckpointError, describe
from densenet_jax.tasks.classification import CLASSIFICATION
from densenet_jax.training import loop, resume
from densenet_jax.training.experiment import build

rank = CLASSIFICATION.rank
CONFIG = {"seed": 0, "batch_size": 8, "dataset": {"name": "digits"}}


def _state(step):
    kernel = jax.random.normal(jax.random.key(step), (32, 16))
    params = {"a": {"kernel": kernel}, "b": {"kernel": kernel + 1}}
    return {"params": params, "batch_stats": {}, "step": jnp.int32(step)}


def _metrics(step):
    return {"top1": 0.1 * step, "loss": 1.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of steps 1, 2 and 3, the last the best."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir / "checkpoints", rank, keep_newest=3)
    for step in (1, 2, 3):
        checkpoints.save(step, _state(step), CONFIG, _metrics(step))
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def _restore(workdir, on_damage="fallback", total=3):
    """What training would start from."""
    config = types.SimpleNamespace(
        checkpoint=types.SimpleNamespace(on_damage=on_damage)
    )
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
        _state(0),
    )
    experiment = types.SimpleNamespace(
        total_steps=total, abstract_state=abstract, steps_per_epoch=1
    )
    checkpoints = Checkpoints(workdir / "checkpoints", rank, keep_newest=3)
    with contextlib.closing(checkpoints):
        return resume.restore_newest(config, experiment, checkpoints, CONFIG)


def _assert_is(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, _state(step))


def _flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)


def _data_file(directory):
    """The largest: it holds the kernels, which no sum of others covers."""
    files = (p for p in directory.rglob("d/*") if p.is_file())
    return max(files, key=lambda p: p.stat().st_size)


def test_what_is_whole_is_not_spoken_of(workdir, capsys):
    step, state = _restore(workdir)

    assert step == 3
    _assert_is(state, 3)
    assert capsys.readouterr().out == "Continuing from step 3.\n"


@pytest.mark.parametrize("seed", range(12))
def test_damage_is_named_and_costs_one_checkpoint(workdir, capsys, seed):
    directory = workdir / "checkpoints/3"
    damage(directory, random.Random(seed))
    damaged = {
        p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()
    }

    step, state = _restore(workdir)

    _assert_is(state, step)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("The checkpoint of step 3")
    if "has no files.json" in said[0]:
        assert step == 3
        return
    assert step == 2
    assert said[0].endswith("It is set aside as damaged-3.")
    assert said[1:] == [
        "Going back to step 2 costs 1 steps.",
        "Continuing from step 2.",
    ]
    aside = workdir / "checkpoints/damaged-3"
    for name, content in damaged.items():
        assert (aside / name).read_bytes() == content


@pytest.mark.parametrize("place", np.linspace(0.05, 0.7, 8))
def test_fingerprints_notice_what_no_list_of_files_does(workdir, capsys, place):
    """TensorStore reads most of these without an error."""
    directory = workdir / "checkpoints/3"
    (directory / "files.json").unlink()
    _flip(_data_file(directory), place)

    step, state = _restore(workdir)

    assert step == 2
    _assert_is(state, 2)
    assert capsys.readouterr().out.startswith("The checkpoint of step 3, ")


def test_the_array_is_named(workdir):
    """Another state under the same names, in files that are in order."""
    directory = workdir / "checkpoints"
    shutil.rmtree(directory / "3/state")
    shutil.copytree(directory / "2/state", directory / "3/state")
    (directory / "3/files.json").unlink()

    checkpoints = Checkpoints(directory, rank, read_only=True)
    with (
        contextlib.closing(checkpoints),
        pytest.raises(
            DamagedCheckpointError,
            match=r"fingerprint of params/a/kernel is [0-9]+, was saved as",
        ),
    ):
        checkpoints.restore(3, checkpoints.abstract_state(3))


@pytest.mark.parametrize("file", ["config/metadata", "metrics/metrics"])
def test_other_values_in_good_json_are_noticed(workdir, capsys, file):
    path = workdir / "checkpoints/3" / file
    (workdir / "checkpoints/3/files.json").unlink()
    path.write_text(path.read_text().replace("1.0", "2.0").replace("8", "9"))

    assert _restore(workdir)[0] == 2
    assert f"{file} is not what was saved" in capsys.readouterr().out


def test_fingerprints_that_are_lost_are_missed(workdir, capsys):
    """Their checkpoint is not taken for one of an earlier version."""
    shutil.rmtree(workdir / "checkpoints/3/fingerprints")
    (workdir / "checkpoints/3/files.json").unlink()

    assert _restore(workdir)[0] == 2
    assert "fingerprints/metadata is missing" in capsys.readouterr().out


def test_an_empty_directory_is_no_checkpoint(workdir, capsys):
    (workdir / "checkpoints/80").mkdir()

    step, state = _restore(workdir)

    assert step == 3
    _assert_is(state, 3)
    said = capsys.readouterr().out
    assert "step 80" in said
    assert "the directory is empty. It is set aside as damaged-80." in said


def test_an_empty_directory_alone_is_a_run_that_begins(tmp_path):
    (tmp_path / "checkpoints/80").mkdir(parents=True)

    assert _restore(tmp_path) == (None, None)


def test_damage_may_stop_the_run(workdir):
    _flip(workdir / "checkpoints/3/config/metadata")

    with pytest.raises(
        DamagedCheckpointError, match=r"step 3.* config/metadata"
    ):
        _restore(workdir, on_damage="stop")

    assert (workdir / "checkpoints/3").exists()
    with pytest.raises(ValueError, match="on_damage 'go'"):
        _restore(workdir, on_damage="go")


def test_where_nothing_is_whole_nothing_is_begun_again(workdir):
    for step in (1, 2, 3):
        (workdir / f"checkpoints/{step}/state/_METADATA").unlink()

    with pytest.raises(ValueError, match=r"step 3.*_METADATA.*No whole one"):
        _restore(workdir)

    assert {"1", "2", "3"} == {
        p.name for p in (workdir / "checkpoints").iterdir()
    }


def test_what_is_set_aside_twice_has_two_names(workdir):
    _flip(workdir / "checkpoints/3/config/metadata")
    _restore(workdir)
    shutil.copytree(
        workdir / "checkpoints/damaged-3", workdir / "checkpoints/3"
    )
    _restore(workdir)

    assert {"1", "2", "damaged-3", "damaged-3-2"} == {
        p.name for p in (workdir / "checkpoints").iterdir()
    }


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (PermissionError(13, "Permission denied"), True),
        (ValueError("UNAVAILABLE: Error reading: HTTP 503"), True),
        (ValueError("DATA_LOSS: checksum"), False),
        (FileNotFoundError(2, "No such file", "x"), False),
    ],
)
def test_a_machine_in_trouble_is_not_a_damaged_checkpoint(
    workdir, monkeypatch, error, passing
):
    def read_state(self, step, _):
        if step == 3:
            raise error
        return _state(step)

    monkeypatch.setattr(manager.Manager, "read_state", read_state)

    if passing:
        with pytest.raises(type(error), match=str(error.args[-1])):
            _restore(workdir)
        assert (workdir / "checkpoints/3").exists()
    else:
        assert _restore(workdir)[0] == 2


def test_what_is_said_is_one_line(tmp_path):
    error = ValueError(f"Error\nin {tmp_path}/state/d/1:\n" + "x" * 999)

    assert describe(error, tmp_path).startswith("Error in state/d/1: xxx")
    assert len(describe(error, tmp_path)) < 320


@pytest.mark.parametrize("file", ["state/manifest.ocdbt", "metrics/metrics"])
def test_no_other_net_is_loaded_for_the_best(workdir, file):
    _flip(workdir / "checkpoints/3" / file)

    with pytest.raises(ValueError, match=f"step 3.*{file}.*others \\(1, 2\\)"):
        load_variables(workdir)

    (workdir / "checkpoints/3").rename(workdir / "checkpoints/damaged-3")
    assert load_variables(workdir)[0] == 2


def test_damage_that_is_not_the_best_is_not_looked_at(workdir):
    (workdir / "checkpoints/1/state/_METADATA").unlink()

    step, variables, _ = load_variables(workdir)

    assert step == 3
    np.testing.assert_array_equal(
        variables["params"]["a"]["kernel"], _state(3)["params"]["a"]["kernel"]
    )


def _take_turns(checkpoints):
    """As the loop, which does not wait."""
    for _ in range(600):
        checkpoints.raise_if_failed()
        time.sleep(0.1)


def test_a_save_that_fails_is_said_at_the_next_turn(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manager, "write_file_list", fail)
    checkpoints = Checkpoints(tmp_path, rank)
    checkpoints.save(1, _state(1), CONFIG, None)
    with contextlib.closing(checkpoints):
        with pytest.raises(OSError, match=r"step 1 could not .* No space left"):
            _take_turns(checkpoints)
        checkpoints.raise_if_failed()


@pytest.mark.slow
def test_a_run_ends_as_if_nothing_had_been_damaged(tmp_path, capsys):
    """To the bit, with what else may be wrong in its directory."""
    config = digits.get_config()
    config.update_from_flattened_dict(
        {
            "model.block_layers": (1,),
            "model.growth_rate": 4,
            "batch_size": 480,
            "epochs": 1.0,
            "schedule.warmup_epochs": 0.0,
            "checkpoint.every_epochs": 0.3,
        }
    )
    loop.train_and_evaluate(config, tmp_path)
    experiment = build(config)

    def final_state():
        checkpoints = Checkpoints(
            tmp_path / "checkpoints", rank, read_only=True
        )
        with contextlib.closing(checkpoints):
            return checkpoints.restore(3, experiment.abstract_state)

    expected = final_state()
    _flip(_data_file(tmp_path / "checkpoints/3"))
    with (tmp_path / "metrics.jsonl").open("ab") as log:
        log.write(b'17\n"x"\n{"step": "y"}\n\xff\n')
    (tmp_path / "curves.png").unlink()
    (tmp_path / "curves.png").mkdir()

    loop.train_and_evaluate(config, tmp_path)

    jax.tree.map(np.testing.assert_array_equal, final_state(), expected)
    captured = capsys.readouterr()
    assert "Going back to step 2 costs 1 steps." in captured.out
    assert "curves.png was not drawn" in captured.err
    records = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(x)["step"], int) for x in records)
