import json

from densenet_jax.runs.description import (
    Description,
    name_difference,
    of_config,
    settings,
    to_config,
)

WHOLE = Description(
    preprocessing={"mean": [1.0], "std": [2.0], "image_size": None},
    class_names=("a", "b"),
    task="multilabel",
    image_shape=(8, 8, 1),
)


def test_a_description_survives_a_config():
    assert of_config(json.loads(json.dumps(to_config(WHOLE)))) == WHOLE
    assert to_config(Description()) == {}
    assert of_config({}) == Description()


def test_the_size_of_the_input():
    assert WHOLE.input_size == 8  # images as stored
    assert Description().input_size is None
    assert (
        Description({"image_size": 24}, image_shape=(8, 8, 1)).input_size == 24
    )
    assert Description(image_shape=(8, 9, 1)).input_size is None


def test_a_run_before_there_were_tasks_learned_one_class_an_image():
    assert of_config({"optimizer": {"name": "sgd"}}).task == "classification"


def test_training_options_are_no_part_of_a_description():
    config = {"preprocessing": {"mean": [1.0], "flip": True, "ten_crop": True}}
    found = of_config(config).preprocessing
    assert found == {"mean": [1.0], "ten_crop": True}


def test_settings_are_what_a_user_sets():
    config = {"seed": 0, "preprocessing": {"mean": [1.0]}}
    assert settings({**to_config(WHOLE), **config}) == config


def test_the_first_difference_of_names():
    assert name_difference(None, ["a"]) is None
    assert name_difference(["a"], None) is None
    assert name_difference(("a", "b"), ["a", "b"]) is None
    assert name_difference(["a", "b"], ["a", "c"]) == (
        "class 1 was 'b', is 'c'"
    )
    assert name_difference(["a", "b"], ["b"]) == (
        "2 classes then, 1 now; class 0 was 'a', is 'b'"
    )
    assert name_difference(["a"], ["a", "b"]) == (
        "1 classes then, 2 now; the first 1 agree"
    )
