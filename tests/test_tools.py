"""The commands: what they print, write and refuse."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from safetensors.numpy import load_file

from densenet_jax import create_model, load_pretrained, save_torch
from densenet_jax.data.sources import open_source
from densenet_jax.models import layers
from densenet_jax.models.densenet import DenseNet
from densenet_jax.runs import checkpoints
from densenet_jax.tools.images import imagenet_classes
from densenet_jax.weights import load
from tests.random_variables import random_variables
from tests.tiny_tfds import write_tiny_tfds

GOLDEN = Path(__file__).parent / "data" / "weights"


def _main(name, arguments):
    module = importlib.import_module(f"densenet_jax.tools.{name}")
    return module.main([str(a) for a in arguments])


@pytest.fixture
def run(capsys):
    """Runs a command and returns what it printed."""

    def run(name, *arguments):
        assert _main(name, arguments) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    """Runs a command that fails, and returns its message."""

    def fails(name, *arguments):
        assert _main(name, arguments) == 1
        return capsys.readouterr().err

    return fails


def same(path, other):
    (model, variables), (model2, variables2) = map(
        load_pretrained, (path, other)
    )
    jax.tree.map(np.testing.assert_array_equal, variables, variables2)
    return model == model2


# convert


def test_convert_to_safetensors(run, tmp_path):
    source, target = GOLDEN / "chexnet.pth", tmp_path / "new/net.safetensors"
    output = run("convert", source, target)
    assert same(source, target)
    assert "features.norm0.running_var" in load_file(target)
    for line in (
        "The weights are under the key 'state_dict'.",
        "The names are those of torchvision and timm.",
        "Prefixes left out: module.densenet121.",
        "block_layers=(2, 1), growth_rate=4",
        "Parameters: 2,607",
        f"Wrote {target}",
    ):
        assert line in output


def test_convert_to_a_checkpoint_and_back(run, tmp_path):
    """A checkpoint keeps all, a PyTorch file all but the norms' epsilon."""
    source = GOLDEN / "keras.h5"
    run("convert", source, tmp_path / "run")
    assert same(source, tmp_path / "run")

    output = run("convert", tmp_path / "run", tmp_path / "net.safetensors")
    assert "step 0" in output
    assert "does not hold norm_epsilon=1.001e-05" in output
    assert not same(source, tmp_path / "net.safetensors")


def test_a_directory_keeps_what_its_tensors_do_not_tell(tmp_path, run):
    model = DenseNet(
        block_layers=(2, 1),
        growth_rate=4,
        num_classes=3,
        norm_epsilon=1e-3,
        norm_momentum=0.8,
        kernel_init="fan_in",
        dropout_rate=0.25,
    )
    variables = random_variables(model)
    config = {
        "model": {
            "block_layers": [2, 1],
            "growth_rate": 4,
            "num_classes": 7,  # the classifier's tensors have 3
            "norm_epsilon": 1e-3,
            "norm_momentum": 0.8,
            "kernel_init": "fan_in",
            "dropout_rate": 0.25,
            "stem_features": None,
            "remat": "half",  # of no interest: not looked up
        }
    }
    checkpoints.save_variables(tmp_path / "run", variables, config)
    assert load_pretrained(tmp_path / "run")[0] == model
    run("convert", tmp_path / "run", tmp_path / "copy")
    assert load_pretrained(tmp_path / "copy")[0] == model

    config["model"] = {"name": "densenet_40_12", "norm_epsilon": 1e-3}
    named = create_model("densenet_40_12", num_classes=3)
    checkpoints.save_variables(
        tmp_path / "named", random_variables(named), config
    )
    model, _ = load_pretrained(tmp_path / "named")
    assert model == named.clone(norm_epsilon=1e-3)


def test_convert_with_a_mapping(run, tmp_path):
    source, target = tmp_path / "net.safetensors", tmp_path / "new.safetensors"
    output = run("convert", GOLDEN / "cifar.pth", source)
    mapping = tmp_path / "names.toml"
    mapping.write_text(
        "[rules]\n"
        r"'features\.(?P<name>\w+)' = '{name}'" + "\n"
        r"'features\.(?P<a>\w+)\.(?P<b>\w+)' = '{a}/{b}'" + "\n"
        r"'features\.(?P<a>\w+)\.(?P<b>\w+)\.(?P<c>\w+)' = '{a}/{b}/{c}'" + "\n"
        "'classifier' = 'classifier'\n"
    )
    output = run("convert", source, target, f"--mapping={mapping}")
    assert f"The names are mapped by {mapping}." in output
    assert same(source, target)


def test_convert_refuses(fails, tmp_path, monkeypatch):
    source, target = GOLDEN / "cifar.pth", tmp_path / "net.safetensors"
    assert "No such file" in fails("convert", tmp_path / "absent.pth", target)
    assert "ends in .onnx" in fails("convert", source, tmp_path / "net.onnx")
    assert "no checkpoints/" in fails("convert", tmp_path, target)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    message = fails("convert", tmp_path / "empty", target)
    assert "holds no finished checkpoint" in message
    target.touch()
    assert "exists: choose another" in fails("convert", source, target)

    for module in ("torch", "torchvision"):
        monkeypatch.setitem(sys.modules, module, None)
    target = tmp_path / "net.pth"
    assert "pip install torch" in fails("convert", source, target)
    message = fails("convert", source, target, "--verify")
    assert "leave it out, or install torch" in message
    assert not target.exists()


def _needs_torchvision():
    for name in ("torch", "torchvision"):
        pytest.importorskip(
            name, reason=f"{name}, which this compares with, is not installed"
        )


@pytest.mark.parametrize("name", ["monai.pth", "cifar.pth", "keras.h5"])
def test_convert_verifies(run, tmp_path, name):
    _needs_torchvision()
    target = tmp_path / "net.pth"
    output = run("convert", GOLDEN / name, target, "--verify")
    assert "Verified for 4 random images: logits are within" in output
    assert "places are not verified" in output
    assert same(GOLDEN / name, target) == (name != "keras.h5")


@pytest.mark.parametrize("name", ["torchvision_legacy.pth", "timm.safetensors"])
def test_convert_verifies_what_torch_reads(
    run, fails, tmp_path, monkeypatch, name
):
    _needs_torchvision()
    target = tmp_path / "net.safetensors"
    output = run("convert", GOLDEN / name, target, "--verify")
    assert "which loaded the file by itself" in output

    read = load.read

    def swap(*args):
        flat = read(*args)
        flat["norm5/scale"], flat["norm5/bias"] = (
            flat["norm5/bias"],
            flat["norm5/scale"],
        )
        return flat

    monkeypatch.setattr(load, "read", swap)
    other = tmp_path / "other.safetensors"
    message = fails("convert", GOLDEN / name, other, "--verify")
    assert "The logits differ: nothing was written" in message
    assert not other.exists()


def test_convert_finds_a_difference(fails, tmp_path, monkeypatch):
    """Without ReLU our logits are not torchvision's."""
    _needs_torchvision()
    monkeypatch.setitem(layers.ACTIVATIONS, "relu", lambda x: x)
    target = tmp_path / "net.pth"
    message = fails("convert", GOLDEN / "monai.pth", target, "--verify")
    assert "The logits differ: nothing was written" in message
    assert not target.exists()


def test_convert_cannot_verify_a_plain_net(fails, tmp_path):
    _needs_torchvision()
    source = _save_random(
        DenseNet(block_layers=(1, 1), growth_rate=4, bottleneck_width=0),
        3,
        tmp_path / "plain.safetensors",
    )
    message = fails("convert", source, tmp_path / "net.pth", "--verify")
    assert "--verify cannot compare" in message


def _save_random(model, in_channels, path):
    save_torch(random_variables(model, in_channels), path)
    return path


# predict


def test_imagenet_classes():
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    assert names[0] == "tench"
    assert names[207] == "golden retriever"
    assert names[999] == "toilet tissue"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_predict(run, tmp_path, mode):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    path = tmp_path / "image.tiff"
    Image.fromarray(pixels).convert(mode).save(path)
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\nfish\n")

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = ((pixels / 255 - mean) / std).astype(np.float32)[None]
    model, variables = load_pretrained(GOLDEN / "monai.pth")
    expected = jax.nn.softmax(jax.jit(model.apply)(variables, images)[0])
    order = np.argsort(-expected)

    sizes = "--image_size=32", "--resize_size=32"
    weights = f"--weights={GOLDEN / 'monai.pth'}"
    output = run("predict", weights, *sizes, f"--classes={classes}", path)
    lines = output.splitlines()[-4:]
    assert lines[0] == str(path)
    for line, index in zip(lines[1:], order, strict=True):
        assert line.split() == [
            f"{expected[index]:.1%}",
            ("cat", "dog", "fish")[index],
        ]
    assert f"class {order[0]}" in run("predict", weights, *sizes, path)


def test_predict_names_imagenets_classes(run, tmp_path):
    weights = _save_random(
        DenseNet(block_layers=(1,), growth_rate=4),
        1,
        tmp_path / "grey.safetensors",
    )
    path = tmp_path / "image.png"
    Image.fromarray(np.full((40, 60), 90, np.uint8)).save(path)
    mean_and_std = "--mean=0.5", "--std=0.5"
    output = run("predict", f"--weights={weights}", path, *mean_and_std)
    guesses = [line.split("%  ")[1] for line in output.splitlines()[-5:]]
    assert set(guesses) <= set(imagenet_classes())


def test_predict_refuses(fails, tmp_path):
    weights = f"--weights={GOLDEN / 'monai.pth'}"
    assert "absent.png" in fails("predict", weights, tmp_path / "absent.png")
    path = tmp_path / "image.png"
    path.write_text("no image")
    assert "cannot identify image" in fails("predict", weights, path)
    message = fails("predict", weights, path, f"--classes={path}")
    assert "has 1 names: expected one for each of the net's 3" in message
    message = fails("predict", weights, path, "--mean=0.5,0.5")
    assert "--mean=0.5,0.5 has 2 values: the net reads 3" in message
    message = fails("predict", weights, path, "--resize_size=200")
    assert "--image_size is 224: must lie in 1 ... --resize_size" in message
    message = fails("predict", weights, path, "--image_size=4")
    assert "height and width of 5 or more" in message
    assert "must be positive" in fails("predict", weights, path, "--std=0")


def test_normalization_in_other_units(run, capsys):
    weights = f"--weights={GOLDEN / 'monai.pth'}"
    with pytest.raises(SystemExit):
        run("predict", weights, "image.png", "--mean=125.3,123.0,113.9")
    assert "divide by 255" in capsys.readouterr().err


# evaluate


def test_evaluate(run, tmp_path):
    """Every digit once, the last, partial batch included."""
    weights = _save_random(
        DenseNet(
            block_layers=(1, 1),
            growth_rate=4,
            stem="cifar",
            stem_norm=False,
            num_classes=10,
        ),
        1,
        tmp_path / "net.safetensors",
    )
    examples = open_source("digits", "test").examples
    images = np.stack([example["image"] for example in examples])
    images = ((images / 255 - 0.25) / 0.5).astype(np.float32)
    labels = np.array([example["label"] for example in examples])
    model, variables = load_pretrained(weights)
    logits = np.asarray(jax.jit(model.apply)(variables, images))
    top1 = (logits.argmax(1) == labels).mean()
    ranks = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(1)
    logits = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -logits[np.arange(len(labels)), labels].mean()

    assert len(labels) % 64
    output = run(
        "evaluate",
        f"--weights={weights}",
        "--dataset=digits",
        "--batch_size=64",
        "--mean=0.25",
        "--std=0.5",
    )
    assert (
        f"top-1 {top1:.2%}, top-5 {(ranks < 5).mean():.2%}, loss {loss:.4f} "
        f"({len(labels)} images)" in output
    )


def test_evaluate_averages_the_logits_of_ten_crops(run, tmp_path):
    """Against Pillow, and the net on one crop after the other."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"test/{i % 3}/{i}.png" for i in range(9)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (5, 7, 3), np.uint8)
        Image.fromarray(pixels).resize((60, 45)).save(path)
    model, variables = load_pretrained(GOLDEN / "monai.pth")
    apply = jax.jit(model.apply)
    losses = []
    for path in paths:
        resized = Image.open(path).resize((53, 40), Image.Resampling.BILINEAR)
        pixels = (np.asarray(resized, np.float32) / 255 - 0.4) / 0.3
        places = [(0, 0), (0, 21), (8, 0), (8, 21), (4, 10)]
        crops = [pixels[y : y + 32, x : x + 32] for y, x in places]
        crops += [crop[:, ::-1] for crop in crops]
        logits = np.mean(
            [apply(variables, crop[None])[0] for crop in crops], axis=0
        )
        label = int(path.parent.name)
        losses.append(np.log(np.exp(logits).sum()) - logits[label])

    def loss(*flags):
        output = run(
            "evaluate",
            f"--weights={GOLDEN / 'monai.pth'}",
            "--dataset=folder",
            f"--data_dir={tmp_path}",
            "--batch_size=8",
            "--mean=0.4",
            "--std=0.3",
            "--image_size=32",
            "--resize_size=40",
            *flags,
        )
        return float(output.split("loss ")[1].split()[0])

    expected = pytest.approx(np.mean(losses), abs=2e-4)  # printed to 1e-4
    assert loss("--ten_crop") == expected
    assert loss() != expected


def test_evaluate_refuses(fails, tmp_path):
    write_tiny_tfds(tmp_path)
    units = "--mean=0.5", "--std=0.5"
    cifar = "--dataset=cifar10", f"--data_dir={tmp_path}"
    weights = f"--weights={GOLDEN / 'cifar.pth'}"
    message = fails("evaluate", weights, *cifar, *units)
    assert "tells 3 classes apart and the data set has 10" in message
    message = fails("evaluate", weights, "--dataset=digits", *units)
    assert "reads 3 channels and the images of digits have 1" in message
    message = fails("evaluate", weights, *cifar, *units, "--batch_size=12")
    assert "batch_size 12 cannot be divided" in message
    message = fails("evaluate", weights, *cifar, *units, "--split=dev")
    assert "no split 'dev'" in message
    message = fails("evaluate", "--weights=absent.pth", *cifar, *units)
    assert "absent.pth" in message


# preview


@pytest.fixture
def titles(monkeypatch):
    """The titles of all axes drawn."""
    drawn = []
    set_title = Axes.set_title

    def record(axes, label, **kwargs):
        drawn.append(label)
        return set_title(axes, label, **kwargs)

    monkeypatch.setattr(Axes, "set_title", record)
    return drawn


@pytest.fixture
def two_colours(tmp_path):
    """Arguments for a folder of red and blue images, 32x32 at the net."""
    for split, name, colour in (
        ("train", "red", (200, 0, 0)),
        ("train", "blue_" + 30 * "x", (0, 0, 200)),
        ("test", "red", (200, 0, 0)),
        ("test", "blue_" + 30 * "x", (0, 0, 200)),
    ):
        path = tmp_path / "images" / split / name / "1.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (50, 40), colour).save(path)
    return (
        "--config=configs/densenet121.py",
        "--config.dataset.name=folder",
        f"--config.dataset.data_dir={tmp_path / 'images'}",
        "--config.dataset.test_split=test",
        "--config.batch_size=2",
        "--config.preprocessing.image_size=32",
        "--config.preprocessing.resize_size=32",
        "--config.preprocessing.color_jitter=0.0",
        "--config.preprocessing.lighting=0.0",
    )


def _share_of(pixels, colour):
    return (pixels == colour).all(axis=-1).mean()


def test_preview_draws_test_images_under_their_labels(
    run, tmp_path, two_colours, titles
):
    path = tmp_path / "preview.png"
    assert f"Wrote {path}" in run(
        "preview", *two_colours, f"--output={path}", "--split=test"
    )
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert titles == ["blue_" + 18 * "x" + "\N{HORIZONTAL ELLIPSIS}", "red"]
    # The first two of eight columns.
    first, second = np.split(pixels, [pixels.shape[1] // 8], axis=1)
    assert _share_of(first, (0, 0, 200)) > 0.4
    assert _share_of(second, (200, 0, 0)) > 0.4 / 7
    assert _share_of(second, (0, 0, 200)) == 0


def test_preview_draws_what_is_mixed_and_erased(
    run, tmp_path, two_colours, titles
):
    path = tmp_path / "preview.png"
    run(
        "preview",
        *two_colours,
        f"--output={path}",
        "--config.preprocessing.cutmix=1.0",
        "--config.preprocessing.random_erasing=1.0",
    )
    names = {title.split()[0] for title in titles}
    assert names == {"blue_" + 18 * "x" + "\N{HORIZONTAL ELLIPSIS}", "red"}
    for title in titles:
        first, second = (line.split()[1] for line in title.splitlines())
        assert int(first[:-1]) + int(second[:-1]) == 100
    pixels = np.asarray(Image.open(path).convert("RGB"))
    # Red and blue in both, and the mean of ImageNet where zeros are.
    one, two = np.split(pixels[:, : pixels.shape[1] // 4], 2, axis=1)
    for image in (one, two):
        for colour in ((200, 0, 0), (0, 0, 200), (124, 116, 104)):
            assert _share_of(image, colour) > 0.002


def test_preview_refuses(fails, tmp_path, two_colours):
    assert "--count is 0" in fails("preview", *two_colours, "--count=0")
    message = fails("preview", *two_colours, f"--output={tmp_path}/no/a.png")
    assert "No such file" in message
    message = fails("preview", *two_colours, "--config.preprocessing.std=(0,)")
    assert "must be positive" in message
    message = fails("preview", *two_colours, "--config.preprocesing.std=(1,)")
    assert 'Did you mean "preprocessing"' in message
    message = fails("preview", *two_colours, "--config.preprocessing.stdd=(1,)")
    assert 'Did you mean "std"' in message
