"""The command that plans for TPUs, and for this machine."""

import importlib.util
import json
import re

import jax
import pytest

from densenet_jax.planning import chips, compiling
from densenet_jax.tools import plan

TINY = (
    "--config=configs/digits.py",
    "--config.model.block_layers=(1,)",
    "--config.model.growth_rate=4",
)
CPU = (*TINY, "--platform=cpu")


@pytest.fixture
def run(capsys):
    """Runs the command: the lines it prints, and the object in the last."""

    def run(*arguments):
        assert plan.main(list(arguments)) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        return lines, json.loads(last)

    return run


@pytest.fixture
def fails(capsys):
    """Runs a command that fails, and returns its message."""

    def fails(*arguments):
        assert plan.main(list(arguments)) == 1
        return capsys.readouterr().err

    return fails


def test_a_plan_for_this_machine(run):
    lines, result = run(*CPU, "--policies=none,convs")
    assert result["target"]["devices"] == 8
    assert result["batch_size"] == 64
    # conv0 3x3x1x8, norms of 8, 16 and 12, 1x1x8x16, 3x3x16x4, linear 12 to 10.
    parameters = 72 + 2 * (8 + 16 + 12) + 128 + 576 + 130
    assert result["state_bytes"] == {
        "parameters": 4 * parameters,
        "batch statistics": 4 * 2 * (8 + 16 + 12),
        "optimizer": 4 * (parameters + 1),  # momentum, and the step
        "batch": 64 // 8 * (8 * 8 + 4),  # uint8, int32
    }
    assert list(result["policies"]) == ["none", "convs"]
    for policy in result["policies"].values():
        # Forward and twice that backward, but no gradient of the images.
        forward = 8 * 64 * (72 + 128 + 576)
        assert policy["flops"] > 2 * (3 * forward - 8 * 64 * 72)
        assert policy["temp_bytes"] > 0
        assert policy["cycles"] is None
        assert policy["fits"]
        # Gradients at the least are summed over the devices.
        assert policy["collective_bytes"]["all-reduce"] >= 4 * parameters
    table = [line.split()[0] for line in lines if line and line[0].isalpha()]
    assert {"remat", "none", "convs", "parameters"} <= set(table)
    assert result["versions"]["jax"] == jax.__version__


def test_each_policys_figures_are_told_as_they_come(capsys):
    assert plan.main([*CPU, "--policies=none"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"\d GB temp, \d+\.\d\d GB moved \(\d+ s\)", said)


def test_the_batch_size_overrides_the_config(run):
    _, small = run(*CPU, "--policies=none", "--batch_size=8")
    _, large = run(*CPU, "--policies=none", "--config.batch_size=128")
    assert (small["batch_size"], large["batch_size"]) == (8, 128)
    ratio = (
        large["policies"]["none"]["flops"] / small["policies"]["none"]["flops"]
    )
    assert 10 < ratio < 16


def test_search_goes_up_to_the_data_set(run):
    lines, result = run(*CPU, "--policies=none", "--batch_size=720", "--search")
    # 1,437 digits, and eight devices to share them.
    assert result["largest_batch"] == {"none": 1432}
    assert lines[-2].split() == ["none", "1,432", "179"]


def test_data_that_is_not_here_is_stood_in_for(run, tmp_path):
    lines, result = run(
        "--config=configs/cifar100.py:bc_100_12",
        "--config.model.block_layers=(1,)",
        f"--config.dataset.data_dir={tmp_path}",
        "--platform=cpu",
        "--policies=none",
        "--batch_size=8",
    )
    assert result["num_classes"] == 100
    assert result["image_shape"] == [32, 32, 3]
    assert "'cifar100' is not on this machine" in result["remark"]
    assert "'cifar100' is not on this machine" in " ".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TINY, "--topology=v5e:3x3"], "Known: v5e:1x1, v5e:2x2, v5e:2x4"),
        ([*TINY, "--topology=v7:2x2"], "Known: v4, v5e, v5p, v6e"),
        ([*CPU, "--batch_size=12"], "12 cannot be divided by .* 8 devices"),
        ([*CPU, "--batch_size=-8"], "batch_size is -8: must be positive"),
        ([*CPU, "--policies=conv"], "Did you mean convs"),
        ([*CPU, "--config.model.remat=conv"], "Did you mean convs"),
        ([*CPU, "--config.batch_sise=8"], "Did you mean"),
        ([*CPU, "--config.dataset.name=cifra10"], "Did you mean cifar10"),
        (["--config=nowhere.py", "--platform=cpu"], "nowhere.py"),
    ],
)
def test_mistakes_are_named_before_any_compilation(fails, arguments, message):
    error = fails(*arguments)
    assert "compiling" not in error
    assert re.search(message, error)


def test_without_its_compiler_the_command_says_how_to_get_it(
    fails, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "jax[tpu]"' in fails(*TINY, "--topology=v5e:2x4")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs libtpu (pip install "jax[tpu]"); it needs no TPU',
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", chips.CHIPS)
def test_every_topology_is_known_to_the_compiler(name):
    for topology in chips.topologies(name):
        target = compiling.find_target(topology)
        assert len(target.devices) == chips.num_chips(topology)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "topology", ["v4:2x2x1", "v5e:1x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4"]
)
def test_a_plan_for_a_tpu(run, topology):
    lines, result = run(*TINY, f"--topology={topology}", "--policies=none")
    program = result["policies"]["none"]
    assert program["cycles"] == sum(program["layer_cycles"].values()) > 0
    assert "denseblock1 conv1, forward" in program["layer_cycles"]
    assert program["alias_bytes"] > 0  # the state is donated
    assert program["least_seconds_by"] == "bytes"
    several = result["target"]["devices"] > 1
    assert ("all-reduce" in program["collective_bytes"]) == several
    assert max(map(len, lines)) <= 100


@pytest.mark.slow
@needs_libtpu
def test_chips_share_the_work_of_a_recomputing_step(run):
    policies, alone, shared = "--policies=convs", "v5e:1x1", "v5e:2x4"

    _, one = run(*TINY, f"--topology={alone}", policies, "--batch_size=1024")
    _, all_ = run(*TINY, f"--topology={shared}", policies, "--batch_size=8192")

    one, all_ = (result["policies"]["convs"] for result in (one, all_))
    # Collectives take a little; a block's array for all chips takes 25 MB.
    assert all_["temp_bytes"] < one["temp_bytes"] + 1e6
    assert all_["flops"] == pytest.approx(one["flops"], rel=0.1)


@pytest.mark.slow
@needs_libtpu
def test_a_step_that_is_too_large_for_a_tpu(run):
    lines, result = run(
        *TINY,
        "--topology=v5e:1x1",
        "--policies=layer",
        "--batch_size=4194304",
        "--config.epochs=10000",
    )
    assert not result["policies"]["layer"]["fits"]
    assert "exceeds available HBM" in result["policies"]["layer"]["problem"]
    assert any(line.startswith("remat=layer does not fit") for line in lines)
