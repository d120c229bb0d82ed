"""The benchmarks compare like with like, and report what they measure."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import arguments, contenders, memory, step, tpu
from benchmarks.plain import plain_port
from densenet_jax import create_model
from densenet_jax.models.densenet import DenseNet
from densenet_jax.planning import compiling
from densenet_jax.planning.compiled import Program
from densenet_jax.planning.plans import Compilation, Target
from tests.random_variables import random_variables

ROOT = Path(__file__).parent.parent
TINY = dict(growth_rate=4, num_classes=5, norm_epsilon=1e-3)
NETS = {
    "imagenet": DenseNet((2, 1), compression=0.7, **TINY),
    "cifar": DenseNet((1, 2), stem="cifar", stem_norm=False, **TINY),
    "plain": DenseNet((2, 1), bottleneck_width=0, stem="cifar", **TINY),
}


@pytest.fixture(autouse=True)
def _promotion_as_by_default():
    """The baseline is flax's own modules, which promote silently."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def run_step(capsys, *flags):
    """What step.py prints and its JSON object."""
    small = ["--block_layers=1", "--image_size=32", "--batch_size=2"]
    assert step.main([*small, "--rounds=1", *flags]) == 0
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("kind", NETS)
def test_the_plain_port_computes_what_ours_does(kind):
    """From the same variables, with running and with batch statistics."""
    model = NETS[kind]
    plain = plain_port(model)
    variables = random_variables(model)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, 17, 20, 3)).astype(np.float32)

    def forward(net):
        trained, _ = net.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        return net.apply(variables, images), trained

    ours, theirs = (
        jax.jit(forward, static_argnums=0)(n) for n in (model, plain)
    )

    for found, expected in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    fresh = jax.eval_shape(plain.init, jax.random.key(0), images)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fresh) == (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables)
    )


def test_lists_are_read():
    assert arguments.policies("none,layer") == ("none", "layer")
    assert arguments.numbers("6,12") == (6, 12)


def test_the_exponent_is_that_of_a_power_law():
    depths = (40, 100, 190, 400)

    assert memory.exponent(depths, [3e6 * d**1.7 for d in depths]) == (
        pytest.approx(1.7, rel=1e-12)
    )


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--mode=train", "--policies=layer"], ["ours_layer"]),
        (["--mode=infer"], ["ours", "ours_folded"]),
    ],
)
def test_steps_are_measured(capsys, monkeypatch, flags, names):
    monkeypatch.setattr(
        contenders, "torchvision_absent", lambda _: "not wanted"
    )
    monkeypatch.setattr(os, "getloadavg", lambda: (6.81, 0, 0))

    printed, result = run_step(capsys, *flags)

    assert "Without torchvision: not wanted." in printed
    assert "Others use this machine (load 6.8)" in printed
    assert result["load"] == 6.81
    names = ["plain", "plain_options", *names]
    assert list(result["results"]) == names
    for name, values in result["results"].items():
        assert f"| {name} " in printed
        assert values["images_per_second"] > 0
        assert values["compile_seconds"] > 0
        assert values["temp_bytes"] > 0
        assert values["ratio_to_plain"] > 0
        assert values["ratio_to_torchvision"] is None
        assert values["difference"] < 1e-4
    assert result["results"]["plain"]["ratio_to_plain"] == 1
    assert result["versions"]["jax"] == jax.__version__
    assert result["machine"]["cores"] > 0


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_steps_are_measured_against_torchvision(capsys, mode):
    """Two steps of torchvision's net: equal losses, or an error."""
    for package in ("torch", "torchvision"):
        pytest.importorskip(package, reason=f"{package} is not installed")

    printed, result = run_step(capsys, f"--mode={mode}")

    assert "Without torchvision" not in printed
    ratios = [
        result["results"][name]["ratio_to_torchvision"]
        for name in contenders.TORCHVISION
    ]
    assert max(ratios) == 1
    assert {"torch", "torchvision"} <= set(result["versions"])


def test_nets_that_the_plain_port_cannot_be_are_named():
    with pytest.raises(ValueError, match="the model's blur_pool, stem: take"):
        plain_port(create_model("densenetblur121d"))


def test_why_torchvision_is_absent_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    absent = contenders.torchvision_absent

    assert absent(create_model("densenet264")) is None
    assert "stem" in absent(create_model("densenet_bc_100_12"))
    assert "compression" in absent(create_model("densenet121", compression=1))
    assert "bottleneck" in absent(
        create_model("densenet121", bottleneck_width=0)
    )
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: name if name == "torch" else None,
    )
    assert absent(create_model("densenet121")) == "torchvision is not installed"


def test_outputs_are_compared_step_by_step():
    plain = [np.float32(2), np.float32(1)]
    near = {"plain": plain, "ours": [np.float32(2), np.float32(1.001)]}

    assert step.compare(near) == pytest.approx({"plain": 0, "ours": 5e-4}, 1e-3)
    for second in (1.1, np.nan):
        wrong = {"plain": plain, "ours": [np.float32(2), np.float32(second)]}
        with pytest.raises(ValueError, match=r"ours computes something else"):
            step.compare(wrong)


TINY_RECIPE = (
    "--config=configs/digits.py",
    "--config.model.block_layers=(1,)",
    "--config.model.growth_rate=4",
)


def test_a_plain_port_takes_the_models_place_for_a_tpu(capsys, monkeypatch):
    models = []

    def trace(step, built, target):
        model = step.__wrapped__.keywords["model"]
        models.append((type(model).__name__, getattr(model, "remat", None)))
        step.trace(built.abstract_state, built.batch)
        if len(models) == 3:
            return Compilation(None, "full", 2.0)
        return Compilation(Program(*[1e9] * 8, {}, {}, {}), None, 2.0)

    monkeypatch.setattr(compiling, "compile_step", trace)
    monkeypatch.setattr(
        compiling,
        "find_target",
        lambda name: Target(name, jax.devices(), 1, None),
    )

    assert tpu.main([*TINY_RECIPE, "--policies=none,layer"]) == 0

    printed = capsys.readouterr().out
    *_, fitting, failing, _, last = printed.splitlines()
    assert re.findall(r"[^ |]+", fitting)[:3] == ["none", "1000.0", "1.00"]
    assert re.findall(r"[^ |]+", failing) == ["layer", *"----", "2"]
    results = json.loads(last)["results"]
    assert list(results) == ["plain", "none", "layer"]
    assert results["layer"]["problem"] == "full"
    assert models == [
        ("PlainDenseNet", None),
        ("DenseNet", "none"),
        ("DenseNet", "layer"),
    ]


def test_a_plain_port_does_not_stand_in_for_dropout(capsys, monkeypatch):
    monkeypatch.setattr(
        compiling,
        "find_target",
        lambda name: Target(name, jax.devices(), 1, None),
    )

    assert tpu.main([*TINY_RECIPE, "--config.model.dropout_rate=0.2"]) == 1

    assert "dropout_rate is 0.2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plain_port_and_ours_are_compiled_for_a_tpu(capsys):
    pytest.importorskip("libtpu", reason="libtpu is not installed")

    assert tpu.main([*TINY_RECIPE, "--policies=none", "--batch_size=64"]) == 0

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "libtpu" in result["versions"]
    plain, ours = (result["results"][name] for name in ("plain", "none"))
    assert 0 < ours["flops"] <= plain["flops"]
    assert 0 < ours["bytes_accessed"] < plain["bytes_accessed"]
    for result in plain, ours:
        assert result["cycles"] > 0


def test_memory_of_a_step_is_that_of_its_activations():
    model = DenseNet((1,), stem="cifar", **TINY)

    few, many = (
        memory.step_memory(model, batch_size) for batch_size in (8, 16)
    )

    # Bottleneck and 3x3 conv's input at least, and not ten times as much.
    each = 2 * 32 * 32 * 16 * 4
    assert 8 * each < many - few < 8 * 10 * each


def test_memory_is_tabled_and_drawn(capsys, monkeypatch, tmp_path):
    def grow(model, batch_size):
        # 1.5 for the plain port, 1 for ours.
        depth = 6 * model.block_layers[0] + 4
        ours = isinstance(model, DenseNet)
        return depth * (1e6 if ours else 1e6 * depth**0.5)

    monkeypatch.setattr(memory, "step_memory", grow)
    picture = tmp_path / "memory.png"
    flags = ["--depths=400,40", "--policies=none,layer"]

    assert memory.main([*flags, f"--plot={picture}"]) == 0

    printed = capsys.readouterr().out
    assert "| ours_layer |  40 |   400 |     1.00 |" in printed
    result = json.loads(printed.splitlines()[-1])
    assert result["depths"] == [40, 400]
    exponents = {
        name: values["exponent"] for name, values in result["results"].items()
    }
    expected = {"plain": 1.5, "ours_none": 1, "ours_layer": 1}
    assert exponents == pytest.approx(expected)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (step.main, ["--model=densenet12"], "Did you mean densenet121"),
        (step.main, ["--mode=infer", "--policies=none"], "leave it out"),
        (step.main, ["--policies=conv"], "Did you mean convs"),
        (step.main, ["--rounds=0"], "0 is not positive"),
        (memory.main, ["--depths=40,101"], r"6 n \+ 4 does, as 100"),
        (memory.main, ["--depths=40"], "two depths or more"),
        (tpu.main, [*TINY_RECIPE, "--policies=conv"], "Did you mean convs"),
        (tpu.main, [*TINY_RECIPE, "--topology=v5"], "v5"),
    ],
)
def test_errors(capsys, main, flags, message):
    try:
        status = main(flags)
    except SystemExit as error:  # argparse's
        status = error.code
    assert status
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("script", ["step", "memory", "tpu"])
def test_scripts_run_from_anywhere(tmp_path, script):
    command = [sys.executable, str(ROOT / f"benchmarks/{script}.py"), "-h"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)


def _measure_input(directory):
    command = [sys.executable, "-m", "benchmarks.input", str(directory)]
    command += ["--rounds=1", "--batches=1"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_input_is_measured(tmp_path):
    for i in range(50):
        image = Image.new("RGB", (60 + i, 40), (5 * i, 0, 0))
        image.save(tmp_path / f"{i}.jpg")
    found = _measure_input(tmp_path)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["images_per_second"]["ours"] > 0
    assert "grain" in result["versions"]

    (tmp_path / "0.jpg").unlink()
    assert "fewer than 50 JPEGs" in _measure_input(tmp_path).stderr
