import jax
import numpy as np
import pytest

from configs import digits
from densenet_jax.data.examples import Source
from densenet_jax.training import experiment, sharding


def _build(**changes):
    config = digits.get_config()
    config.update_from_flattened_dict(changes)
    return experiment.build(config)


def test_durations_and_rates_are_resolved_once():
    built = _build(batch_size=128, epochs=10.0, **{"schedule.name": "step"})
    assert built.total_steps == round(10 * 1437 / 128)
    # base_batch_size 64: twice the batch, twice the rate, after the warm-up.
    np.testing.assert_allclose(built.schedule(30), 0.2, rtol=1e-6)


def test_classes_come_from_the_data():
    assert _build().model.num_classes == 10
    assert _build(**{"model.num_classes": 12}).model.num_classes == 12
    with pytest.raises(ValueError, match=r"num_classes is 9 .* 10 classes"):
        _build(**{"model.num_classes": 9})


@pytest.mark.parametrize("step", ["train_step", "eval_step"])
def test_steps_are_compiled_with_options(monkeypatch, step):
    monkeypatch.setattr(
        experiment, "compiler_options", lambda platform: {platform: "on"}
    )
    built = _build(**{"model.block_layers": (1,)})
    mask = jax.ShapeDtypeStruct((64,), bool)
    variables = {
        "params": built.abstract_state.params,
        "batch_stats": built.abstract_state.batch_stats,
    }
    arguments = {
        "train_step": (built.abstract_state, built.batch),
        "eval_step": (variables, {**built.batch, "mask": mask}),
    }

    lowered = getattr(built, step).lower(*arguments[step])

    with pytest.raises(jax.errors.JaxRuntimeError, match="option: 'cpu'"):
        lowered.compile()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 100}, "100 cannot be divided by .* 8 devices: use 96"),
        ({"model.name": "densnet121"}, "Did you mean densenet121"),
        ({"model.remat": "conv"}, "remat policy 'conv'. Did you mean convs?"),
        ({"model.compression": 1.5}, r"compression is 1.5: must be in \(0, 1"),
        ({"model.dtype": "float16"}, "dtype 'float16'. Did you mean bfloat16"),
        ({"preprocessing.mean": (1.0, 2.0, 3.0)}, "mean has 3 values for .* 1"),
        (
            {"model.block_layers": (1,) * 5},
            r"Images of shape \(1, 8, 8, 1\).* 16 or more",
        ),
        ({"batch_size": 0}, "batch_size is 0: must be positive"),
        ({"accumulate": 0}, "accumulate is 0: must be positive"),
        ({"epochs": 0.01}, "epochs is 0.01: of 22.5 steps each"),
        ({"seed": -1}, "seed is -1"),
        ({"label_smoothing": 1.0}, r"must be in \[0, 1\)"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5"),
        ({"optimizer.base_batch_size": 0}, "base_batch_size is 0"),
        ({"optimizer.clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"log_every_steps": 0}, "log_every_steps is 0"),
        ({"eval_every_epochs": 0.0}, "eval_every_epochs is 0.0"),
        ({"checkpoint.every_epochs": 0.0}, r"checkpoint\.every_epochs is 0.0"),
        ({"preprocessing.std": (0.0,)}, "std is .* must be positive"),
        ({"optimizer.name": "sdg"}, "Did you mean sgd"),
        ({"dataset.name": "cifra10"}, "Did you mean cifar10"),
    ],
)
def test_bad_configs_fail_before_any_compilation(changes, message):
    with pytest.raises(ValueError, match=message):
        _build(**changes)


def test_images_of_many_sizes_need_an_image_size(monkeypatch):
    examples = [{"image": np.zeros((5, 6, 1), np.uint8), "label": 0}] * 64
    source = Source(examples, num_classes=2, image_shape=(None, None, 1))
    monkeypatch.setattr(experiment, "open_source", lambda *_: source)
    with pytest.raises(ValueError, match=r"set preprocessing\.image_size"):
        _build()
    built = _build(**{"preprocessing.image_size": 12})
    assert built.batch["image"].shape == (64, 12, 12, 1)


def test_state_is_on_every_device_and_batches_are_split():
    built = _build()
    state = built.init()
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, built.abstract_state
    )
    assert state.step.sharding.is_fully_replicated
    assert built.batch["image"].sharding.shard_shape((64, 8, 8, 1))[0] == 8


def test_the_devices_and_the_data_can_be_others():
    source = Source(range(32), num_classes=3, image_shape=(9, 9, 1))
    config = digits.get_config()
    config.batch_size = 6
    built = experiment.build(
        config,
        mesh=sharding.make_mesh(jax.devices()[:2]),
        sources=(source, source),
    )
    image = built.batch["image"]
    assert image.sharding.shard_shape(image.shape) == (3, 9, 9, 1)
    assert built.abstract_state.step.sharding.mesh.size == 2
    assert built.model.num_classes == 3
    assert built.total_steps == 30 * 32 / 6
