"""Which class of a net each class of a data set is, in tools.evaluate."""

import importlib

import numpy as np
import pytest
from PIL import Image

from densenet_jax.data.examples import Source
from densenet_jax.models.densenet import DenseNet
from densenet_jax.runs import checkpoints
from densenet_jax.runs.description import Description
from densenet_jax.tools.images import imagenet_classes, imagenet_synsets
from densenet_jax.tools.labels import Relabelled, class_indices
from tests.random_variables import random_variables

UNNAMED = Description()


def _source(*names, count=None):
    return Source(
        (), count or len(names), (None, None, 3), names if names else None
    )


def _named(*names):
    return Description(class_names=names)


def test_classes_are_found_by_their_names(capsys):
    trained = _named("cat", "dog", "fish")
    found = class_indices(None, _source("fish", "cat"), trained, 3)
    assert found == [2, 0]
    assert "2 classes of the data set were found by name among the net's 3" in (
        capsys.readouterr().out
    )
    assert class_indices(None, _source("cat", "dog"), trained, 3) == [0, 1]
    assert capsys.readouterr().out == ""


def test_names_that_differ_in_case_alone_are_told_apart():
    trained = _named("a", "A", "b c")
    assert class_indices(None, _source("A", "a"), trained, 3) == [1, 0]
    assert class_indices(None, _source("B_C"), trained, 3) == [2]


@pytest.mark.parametrize(
    "names",
    [
        ("n02099601", "n01440764"),
        ("golden retriever", "tench"),
        ("Golden_Retriever", "Tench"),
    ],
)
def test_ten_folders_of_imagenet(names):
    source = _source(*names)
    for description in (
        UNNAMED,
        _named(*imagenet_synsets()),
        _named(*imagenet_classes()),
    ):
        assert class_indices(None, source, description, 1000) == [207, 0]


def test_other_classes_are_refused():
    trained = _named("1", "10", "2")
    message = (
        r"1 of the data set's 3 classes are none of the net's: 0\. The net's "
        r"3 are 1, 10, 2\. --class_indices=FILE"
    )
    with pytest.raises(ValueError, match=message):
        class_indices(None, _source("0", "1", "10"), trained, 3)


def test_another_number_of_classes_is_refused():
    pets = _source("cat", "dog")
    message = (
        r"tells 1,000 classes apart and the data set has 2 \(cat, dog\), not "
        r"the net's names\. --class_indices=FILE"
    )
    with pytest.raises(ValueError, match=message):
        class_indices(None, pets, UNNAMED, 1000)
    with pytest.raises(ValueError, match=r"10 classes apart and .* has 12"):
        class_indices(None, _source(count=12), UNNAMED, 10)
    with pytest.raises(ValueError, match=r"3 classes apart and .* has 2\."):
        class_indices(None, _source(count=2), _named("a", "b", "c"), 3)


def test_an_order_that_is_assumed_is_said(capsys):
    assert class_indices(None, _source("10", "9"), UNNAMED, 2) == [0, 1]
    said = capsys.readouterr().out
    assert "Assumed the order of the data set's 2 (10, 9);" in said
    assert class_indices(None, _source("a", "b"), UNNAMED, 3) == [0, 1]
    said = capsys.readouterr().out
    assert "does not name its 3 classes. Assumed the order of the data " in said
    many = _source(*map(str, range(1000)))
    assert class_indices(None, many, UNNAMED, 1000) == list(range(1000))
    assert "set's 1,000 (0, 1, 2, 3, 4, ...);" in capsys.readouterr().out
    # Neither has names.
    assert class_indices(None, _source(count=2), UNNAMED, 2) == [0, 1]
    assert capsys.readouterr().out == ""


def test_indices_are_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pets = _source("cat", "dog")
    assert class_indices("281,207", pets, UNNAMED, 1000) == [281, 207]
    (tmp_path / "indices.txt").write_text("281\n207\n")
    assert class_indices("~/indices.txt", pets, UNNAMED, 1000) == [281, 207]
    for wrong in ("281", "281,1000", "1,2,3"):
        with pytest.raises(ValueError, match=r"expected 2 .* 0 \.\.\. 999"):
            class_indices(wrong, pets, UNNAMED, 1000)
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        class_indices("absent.txt", pets, UNNAMED, 1000)


def test_relabelled_examples_keep_the_rest():
    examples = Relabelled([{"image": "a", "label": 1}], [5, 7])
    assert len(examples) == 1
    assert examples[0] == {"image": "a", "label": 7}


MODEL = DenseNet(
    block_layers=(1,),
    growth_rate=4,
    stem="cifar",
    stem_norm=False,
    num_classes=3,
)


def _evaluate(capsys, *arguments):
    module = importlib.import_module("densenet_jax.tools.evaluate")
    status = module.main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def test_folders_in_another_order_score_as_before(tmp_path, capsys):
    """Renamed so that they sort otherwise, each with the name the net knows."""
    variables = random_variables(MODEL)
    names = {"one": ["a", "b", "c"], "two": ["c", "b", "a"]}
    for run, classes in names.items():
        config = {
            "model": {
                "block_layers": [1],
                "growth_rate": 4,
                "stem": "cifar",
                "stem_norm": False,
            },
            "preprocessing": {
                "mean": [127.5],
                "std": [60.0],
                "image_size": 16,
                "resize_size": 16,
            },
            "class_names": classes,
            "task": "classification",
        }
        checkpoints.save_variables(tmp_path / run, variables, config)
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        # The class that `one` calls a, b or c; `two` calls it c, b or a.
        for data, classes in names.items():
            path = tmp_path / f"{data}-data/val/{classes[i % 3]}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)

    def result(run, data):
        status, output, errors = _evaluate(
            capsys,
            f"--weights={tmp_path / run}",
            "--dataset=folder",
            f"--data_dir={tmp_path / data}",
            "--split=val",
            "--batch_size=8",
        )
        assert (status, errors) == (0, "")
        return output.splitlines()[-1]

    expected = result("one", "one-data")
    assert result("two", "two-data") == expected
    assert result("one", "two-data") != expected


def test_a_net_of_many_labels_has_no_accuracy(tmp_path, capsys):
    config = {
        "model": {
            "block_layers": [1],
            "growth_rate": 4,
            "stem": "cifar",
            "stem_norm": False,
        },
        "task": "multilabel",
    }
    variables = random_variables(MODEL.clone(num_classes=10), 1)
    checkpoints.save_variables(tmp_path / "run", variables, config)
    status, _, errors = _evaluate(
        capsys, f"--weights={tmp_path / 'run'}", "--dataset=digits"
    )
    assert status == 1
    assert "many labels an image, and digits has one" in errors
