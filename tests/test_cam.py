"""Activation maps against what they must add up to, and the command."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from densenet_jax.analysis.cam import METHODS, activation_maps
from densenet_jax.models.densenet import DenseNet
from densenet_jax.tools import cam as tool
from tests.numpy_densenet import densenet
from tests.random_variables import random_variables

WEIGHTS = Path(__file__).parent / "data" / "weights" / "cifar.pth"


@pytest.fixture(scope="module")
def net():
    """A model, its variables, and images; maps have values of both signs."""
    model = DenseNet(
        block_layers=(1, 2),
        growth_rate=4,
        stem="cifar",
        stem_norm=False,
        num_classes=3,
    )
    variables = random_variables(model)
    rng = np.random.default_rng(1)
    head = variables["params"]["classifier"]
    images = rng.normal(size=(4, 8, 12, 3)).astype(np.float32)
    features, _, _ = densenet(model, variables, images, train=False)
    mean = features[-1].mean((0, 1, 2))
    kernel = rng.normal(size=head["kernel"].shape)
    kernel -= np.outer(mean, mean @ kernel) / (mean @ mean)
    head["kernel"] = kernel.astype(np.float32)
    return model, variables, images


@pytest.fixture(scope="module")
def expected(net):
    """The last feature map and the logits, by numpy."""
    features, logits, _ = densenet(*net, train=False)
    return features[-1], logits


def test_cam_averages_to_the_logit(net, expected):
    model, variables, images = net
    features, logits = expected
    classes = np.array([2, 0, 1, 0])

    found = activation_maps(model, variables, images, jnp.asarray(classes))

    assert found.maps.shape == (4, 4, 6)
    np.testing.assert_array_equal(found.classes, classes)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)
    head = variables["params"]["classifier"]
    np.testing.assert_allclose(
        found.maps.mean((1, 2)) + head["bias"][classes],
        logits[np.arange(4), classes],
        rtol=1e-4,
        atol=1e-5,
    )
    for i, c in enumerate(classes):
        for y, x in (0, 0), (3, 5), (1, 2):
            at_place = (head["kernel"][:, c] * features[i, y, x]).sum()
            assert found.maps[i, y, x] == pytest.approx(at_place, abs=1e-5)


def test_grad_cam_is_the_positive_part_of_cam_by_places(net):
    """The mean gradients are the classifier's weights / number of places."""
    cam, grad_cam = (activation_maps(*net, method=method) for method in METHODS)

    assert (cam.maps < 0).any()
    assert (cam.maps > 0).any()
    np.testing.assert_allclose(
        grad_cam.maps, np.maximum(cam.maps, 0) / (4 * 6), rtol=1e-5, atol=1e-7
    )


def test_the_likeliest_class_is_the_default(net, expected):
    model, variables, images = net
    likeliest = expected[1].argmax(1)

    found = activation_maps(model, variables, images)

    np.testing.assert_array_equal(found.classes, likeliest)
    same = activation_maps(model, variables, images, jnp.asarray(likeliest))
    np.testing.assert_array_equal(found.maps, same.maps)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_and_jit(net, method):
    model, variables, images = net
    model = model.clone(dtype=jnp.bfloat16)

    found = jax.jit(
        lambda x: activation_maps(model, variables, x, None, method)
    )(images)

    assert found.maps.dtype == found.logits.dtype == jnp.float32
    exact = activation_maps(*net, found.classes, method).maps
    np.testing.assert_allclose(found.maps, exact, atol=0.1 * exact.max())


def test_an_unknown_method(net):
    with pytest.raises(ValueError, match="Did you mean grad_cam"):
        activation_maps(*net, method="gradcam")


def _image(path, size=(40, 48)):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _run(*arguments):
    options = f"--weights={WEIGHTS}", "--image_size=32", "--resize_size=32"
    return tool.main([str(a) for a in (*options, *arguments)])


def test_command(tmp_path, capsys):
    images = [_image(tmp_path / f"{name}.png") for name in "ab"]
    output = tmp_path / "new" / "pictures"

    assert _run(*images, f"--output={output}") == 0

    printed = capsys.readouterr().out
    for image in images:
        assert f"{image}: " in printed
        picture = output / f"{image.stem}_cam.png"
        assert f"Wrote {picture}" in printed
        with Image.open(picture) as drawn:
            assert drawn.format == "PNG"


def test_command_draws_a_class_by_a_method(tmp_path, monkeypatch):
    """The map is that of the class, over the image as the net sees it."""
    drawn = []
    monkeypatch.setattr(
        tool.cam,
        "plot_map",
        lambda pixels, activation, path, **titles: drawn.append(
            (pixels, activation, path, titles)
        ),
    )
    image = _image(tmp_path / "a.png", (32, 32))
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\nfish\n")

    assert (
        _run(
            image,
            f"--output={tmp_path}",
            f"--classes={classes}",
            "--class=1",
            "--method=grad_cam",
        )
        == 0
    )

    ((pixels, activation, path, titles),) = drawn
    with Image.open(image) as file:
        np.testing.assert_array_equal(pixels, np.asarray(file))
    assert activation.ndim == 2
    assert path == tmp_path / "a_grad_cam.png"
    assert titles["method"] == "grad_cam"
    assert titles["map_title"].startswith("dog\nmapped, ")


def test_command_draws_grey_images(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    path = tmp_path / "grey.png"
    titles = {"image_title": "a", "map_title": "b"}
    tool.cam.plot_map(pixels, np.zeros((1, 1)), path, method="cam", **titles)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_command_refuses(tmp_path, capsys):
    def message(*arguments):
        assert _run(*arguments, f"--output={tmp_path}") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    image = _image(tmp_path / "a.png")
    for chosen in -1, 3:
        assert f"--class is {chosen}: must lie in 0 ... 2" in message(
            image, f"--class={chosen}"
        )
    assert "Cannot read" in message(tmp_path / "absent.png")
    assert "is a directory, not an image file" in message(tmp_path)
    (tmp_path / "other").mkdir()
    other = _image(tmp_path / "other" / "a.png")
    assert "2 images would be drawn to" in message(image, other)
    content = image.read_bytes()
    for broken in content[: len(content) // 2], content[:60], b"no image":
        image.write_bytes(broken)
        assert f"{image} holds no image" in message(image)
    assert not list(tmp_path.glob("*_cam.png"))
