"""predict, cam, evaluate and convert use what a run says of its net."""

import argparse
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from densenet_jax import load_pretrained, save_torch
from densenet_jax.models.densenet import DenseNet
from densenet_jax.runs import checkpoints
from densenet_jax.runs.description import Description
from densenet_jax.tools import cam as cam_tool
from densenet_jax.tools import images, preprocessing
from densenet_jax.weights.load import load_weights
from tests.random_variables import random_variables

MODEL = DenseNet(
    block_layers=(1,),
    growth_rate=4,
    stem="cifar",
    stem_norm=False,
    num_classes=3,
)
ATTRIBUTES = {
    "block_layers": [1],
    "growth_rate": 4,
    "stem": "cifar",
    "stem_norm": False,
}
MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
CONFIG = {
    "model": ATTRIBUTES,
    "optimizer": {},
    "preprocessing": {
        "mean": list(MEAN),
        "std": list(STD),
        "image_size": None,
        "resize_size": None,
        "flip": True,
    },
    "class_names": ["1", "10", "2"],
    "task": "classification",
    "image_shape": [16, 16, 3],
}


def _save_run(directory, **changes):
    config = {**CONFIG, **changes}
    config = {k: v for k, v in config.items() if v is not None}
    checkpoints.save_variables(directory, random_variables(MODEL), config)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Images as stored, 16x16, and three classes with names."""
    return _save_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The same weights in a file that says nothing else."""
    path = tmp_path_factory.mktemp("files") / "net.safetensors"
    save_torch(random_variables(MODEL), path)
    return path


@pytest.fixture
def command(capsys):
    """Runs a command; returns its status, and what it printed."""

    def command(name, *arguments):
        module = importlib.import_module(f"densenet_jax.tools.{name}")
        status = module.main([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return command


def _image(path, size=(16, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _logits(pixels, mean=MEAN, std=STD):
    image = (np.asarray(pixels, np.float32) - mean) / std
    image = image.astype(np.float32)[None]
    return jax.jit(MODEL.apply)(random_variables(MODEL), image)[0]


def _lines(probabilities, names):
    order = np.argsort(-np.asarray(probabilities))
    return [f"  {probabilities[i]:6.1%}  {names[i]}" for i in order]


NAMES = CONFIG["class_names"]


def test_predict_takes_a_runs_preprocessing_and_names(run, command, tmp_path):
    path = _image(tmp_path / "a.png")
    expected = _lines(jax.nn.softmax(_logits(Image.open(path))), NAMES)

    status, output, errors = command("predict", f"--weights={run}", path)

    assert (status, errors) == (0, "")
    assert output.splitlines()[-4:] == [str(path), *expected]
    assert "ssumed" not in output


def test_a_photo_is_resized_to_what_the_run_was_trained_on(
    run, command, tmp_path
):
    """Against Pillow: the shorter side to 16, and the central square."""
    path = _image(tmp_path / "a.png", (30, 40))
    resized = Image.open(path).resize((21, 16), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized)[:, 2:18]
    expected = _lines(jax.nn.softmax(_logits(pixels)), NAMES)

    _, output, _ = command("predict", f"--weights={run}", path)

    assert output.splitlines()[-3:] == expected


def test_each_option_overrides_the_run_by_itself(run, command, tmp_path):
    path = _image(tmp_path / "a.png")
    mean = tuple(255 * value for value in (0.1, 0.2, 0.3))
    logits = _logits(Image.open(path), mean)
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\nfish\n")
    expected = _lines(jax.nn.softmax(logits), ["cat", "dog", "fish"])

    _, output, _ = command(
        "predict",
        f"--weights={run}",
        "--mean=0.1,0.2,0.3",
        f"--classes={classes}",
        path,
    )

    assert output.splitlines()[-3:] == expected


def test_many_labels_have_a_sigmoid_each(run, file, command, tmp_path):
    path = _image(tmp_path / "a.png")
    labels = ["Edema", "", "Hernia"]
    many = _save_run(tmp_path / "many", task="multilabel", class_names=labels)
    sigmoids = jax.nn.sigmoid(_logits(Image.open(path)))
    expected = _lines(sigmoids, ["Edema", "class 1", "Hernia"])

    _, output, _ = command("predict", f"--weights={many}", path)
    assert output.splitlines()[-3:] == expected

    option = "--task=multilabel"
    _, output, _ = command("predict", f"--weights={run}", option, path)
    assert output.splitlines()[-3:] == _lines(sigmoids, NAMES)

    _, output, _ = command("predict", f"--weights={file}", path)
    assert "Assumed --task=classification (softmax)" in output
    assert "--task=multilabel (sigmoid)" in output
    _, output, _ = command("predict", f"--weights={file}", option, path)
    assert "--task" not in output


def test_a_map_is_named_by_the_run(run, command, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        cam_tool.cam,
        "plot_map",
        lambda pixels, maps, path, **titles: drawn.append((pixels, titles)),
    )
    path = _image(tmp_path / "a.png")
    probabilities = jax.nn.sigmoid(_logits(Image.open(path)))
    best = int(probabilities.argmax())

    status, output, _ = command(
        "cam",
        f"--weights={run}",
        f"--output={tmp_path}",
        "--task=multilabel",
        path,
    )

    assert status == 0
    ((pixels, titles),) = drawn
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(path)))
    said = f"{NAMES[best]}\npredicted, {probabilities[best]:.1%}"
    assert titles["image_title"] == said
    assert f"{path}: {probabilities[best]:.1%} {NAMES[best]}" in output


@pytest.mark.parametrize("name", ["predict", "cam"])
def test_a_bad_image_does_not_stop_the_others(
    run, command, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(cam_tool.cam, "plot_map", lambda *_, **__: None)
    paths = [_image(tmp_path / f"{i}.png") for i in range(3)]
    paths[0].write_text("no image")
    paths.append(tmp_path / "absent.png")
    options = [f"--output={tmp_path}"] * (name == "cam")

    status, output, errors = command(name, f"--weights={run}", *options, *paths)

    assert status == 1
    first, second, last = errors.splitlines()
    assert str(paths[0]) in first
    assert str(paths[3]) in second
    assert last == "2 of 4 images failed."
    for path in paths:
        assert (str(path) in output) == (path in paths[1:3])


def test_a_run_of_an_earlier_version(command, tmp_path):
    """Without names, task and shape, the shape is read from network.json."""
    old = _save_run(
        tmp_path / "old", class_names=None, task=None, image_shape=None
    )
    path = _image(tmp_path / "a.png", (32, 32))
    _, output, _ = command("predict", f"--weights={old}", path)
    expected = jax.nn.softmax(_logits(Image.open(path)))
    names = ["class 0", "class 1", "class 2"]
    assert output.splitlines()[-3:] == _lines(expected, names)
    assert "Assumed --image_size=32 (usual for CIFAR-10)" in output

    (old / "network.json").write_text(json.dumps({"image_shape": [16, 16, 3]}))
    _, output, _ = command("predict", f"--weights={old}", path)
    resized = Image.open(path).resize((16, 16), Image.Resampling.BILINEAR)
    expected = jax.nn.softmax(_logits(resized))
    assert output.splitlines()[-3:] == _lines(expected, names)


def test_images_that_were_no_squares_have_to_be_of_that_size(command, tmp_path):
    wide = _save_run(tmp_path / "wide", image_shape=[16, 24, 3])
    good = _image(tmp_path / "good.png", (16, 24))
    bad = _image(tmp_path / "bad.png")
    assert command("predict", f"--weights={wide}", good)[0] == 0
    status, _, errors = command("predict", f"--weights={wide}", bad)
    assert status == 1
    assert "bad.png is 16x16: the net was trained on 24x16." in errors


def test_a_directory_made_of_a_run_says_the_same(run, command, tmp_path):
    command("convert", run, tmp_path / "copy")
    description = load_weights(tmp_path / "copy").description
    assert description == load_weights(run).description
    assert description.preprocessing["mean"] == list(MEAN)
    assert description.class_names == tuple(NAMES)
    assert description.image_shape == (16, 16, 3)

    _, output, _ = command("convert", run, tmp_path / "net.safetensors")
    assert "net.safetensors does not hold what" in output


def test_a_published_run_classifies_as_the_run(run, command, tmp_path):
    path = _image(tmp_path / "a.png", (24, 24))
    assert command("publish", run, tmp_path / "net")[0] == 0
    _, expected, _ = command("predict", f"--weights={run}", path)
    _, output, _ = command("predict", f"--weights={tmp_path / 'net'}", path)
    assert output.splitlines()[-4:] == expected.splitlines()[-4:]
    assert "ssumed" not in output


def test_paths_may_begin_at_home(run, file, command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = _image(tmp_path / "a.png")
    (tmp_path / "net.safetensors").write_bytes(file.read_bytes())
    (tmp_path / "classes.txt").write_text("cat\ndog\nfish\n")
    for name in ("1", "10", "2"):
        _image(tmp_path / "data/val" / name / "1.png")
    weights = "--weights=~/net.safetensors"

    status, output, _ = command(
        "predict", weights, "--classes=~/classes.txt", "~/a.png"
    )
    assert status == 0
    assert "cat" in output
    assert str(path) in output
    assert command("cam", weights, "--output=~/maps", path)[0] == 0
    assert (tmp_path / "maps/a_cam.png").exists()
    data = "--dataset=folder", "--split=val", "--data_dir=~/data"
    status, output, _ = command("evaluate", weights, *data, "--batch_size=8")
    assert status == 0
    assert "(3 images)" in output
    assert load_pretrained("~/net.safetensors")[0] == MODEL


# What is assumed of a file that does not say


def _options(**given):
    names = ("mean", "std", "image_size", "resize_size")
    return argparse.Namespace(**{**dict.fromkeys(names), **given})


@pytest.mark.parametrize(
    ("stem", "channels", "said"),
    [
        (
            "imagenet",
            3,
            "Assumed --mean=0.485,0.456,0.406 --std=0.229,0.224,0.225 "
            "--image_size=224 --resize_size=256 (torchvision's for ImageNet)",
        ),
        (
            "cifar",
            3,
            "Assumed --mean=0.4914,0.4822,0.4465 --std=0.247,0.2435,0.2616 "
            "--image_size=32 (usual for CIFAR-10)",
        ),
        (
            "imagenet",
            1,
            "Assumed --mean=0.449 --std=0.226 --image_size=224 "
            "--resize_size=256 (torchvision's for ImageNet)",
        ),
    ],
)
def test_what_is_assumed_is_said_in_one_line(capsys, stem, channels, said):
    model = MODEL.clone(stem=stem)
    chosen = preprocessing.choose(_options(), model, channels, Description())
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert said in output
    assert chosen.image_size == (224 if stem == "imagenet" else 32)
    assert chosen.resize_size == (256 if stem == "imagenet" else None)
    assert len(chosen.mean) == channels


def test_only_what_is_assumed_is_said(capsys):
    model = MODEL.clone(stem="imagenet")
    stated = Description({"mean": (127.5,) * 3, "std": (25.5,) * 3})
    chosen = preprocessing.choose(_options(image_size=112), model, 3, stated)
    assert chosen.mean == pytest.approx((127.5,) * 3)
    assert (chosen.image_size, chosen.resize_size) == (112, 128)
    # Not the resize size, which follows from the option.
    assert capsys.readouterr().out == ""

    unknown = {"image_size": None, "resize_size": None}
    unknown = Description({**stated.preprocessing, **unknown})
    chosen = preprocessing.choose(_options(), model, 3, unknown)
    assert (chosen.image_size, chosen.resize_size) == (224, 256)
    said = "Assumed --image_size=224 --resize_size=256 ("
    assert said in capsys.readouterr().out

    chosen = preprocessing.choose(_options(), model, 3, stated, (50, 60))
    assert chosen.image_size is None  # all are of one size: as they are
    assert capsys.readouterr().out == ""


def test_ten_crops_are_for_evaluation():
    """As the run does, where the command can and the option does not say."""
    stated = Description(
        {"mean": [0.0], "std": [1.0], "image_size": 16, "ten_crop": True}
    )

    def ten_crop(**given):
        return preprocessing.choose(
            _options(**given), MODEL, 3, stated
        ).ten_crop

    assert not ten_crop()  # predict
    assert ten_crop(ten_crop=None)
    assert not ten_crop(ten_crop=False)


def test_imagenets_folders_are_those_of_tfds():
    """Against the list that TensorFlow Datasets numbers its labels by."""
    root = Path(tfds.__file__).parent / "datasets/imagenet2012"
    assert list(images.imagenet_synsets()) == (
        (root / "labels.txt").read_text().split()
    )
    assert images.imagenet_synsets()["n02099601"] == "golden retriever"


def test_folders_of_imagenet_are_named_in_words():
    description = Description(class_names=("n02099601", "n01440764", "x"))
    names = images.class_names(None, description, 3)
    assert names == ["golden retriever", "tench", "x"]
    description = Description(class_names=("a", "b"))
    with pytest.raises(ValueError, match="has 2 names: expected one for"):
        images.class_names(None, description, 3)
