"""What a built run does with each key of its config, against direct calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import cifar10, densenet121, digits, svhn
from densenet_jax.data import batch_transforms
from densenet_jax.models.densenet import DenseNet
from densenet_jax.runs.checkpoints import Checkpoints, save_variables
from densenet_jax.tasks.classification import CLASSIFICATION, cross_entropy
from densenet_jax.training import loop, resume
from densenet_jax.training.experiment import build
from densenet_jax.training.steps import random_keys

BATCH = 16
NET = dict(
    block_layers=(1,),
    growth_rate=2,
    stem="cifar",
    stem_norm=False,
    num_classes=10,
    dropout_rate=0.2,
)
# Each unlike its default.
CHANGES = {
    "seed": 7,
    "batch_size": BATCH,
    "accumulate": 2,
    "label_smoothing": 0.2,
    "ema_decay": 0.05,  # below the cap of the first steps
    "model.block_layers": (1,),
    "model.growth_rate": 2,
    "model.dropout_rate": 0.2,
    "preprocessing.mean": (50.0,),
    "preprocessing.std": (60.0,),
    "preprocessing.shift": 2,
    "optimizer.learning_rate": 0.5,
    "optimizer.base_batch_size": 128,
    "optimizer.momentum": 0.8,
    # So large, and so small, that a step at the warm-up's rate shows them.
    "optimizer.weight_decay": 3.0,
    "optimizer.clip_norm": 0.1,
    "schedule.name": "step",
    "schedule.boundaries": (0.757,),
    "schedule.factor": 0.5,
    "schedule.warmup_epochs": 2.0,
    "epochs": 4.0,
}


def make_config(**changes):
    config = digits.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({**CHANGES, **changes})
    return config


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (BATCH, 8, 8, 1), dtype=np.uint8),
        "label": rng.integers(0, 10, BATCH, dtype=np.int32),
    }


@pytest.fixture(scope="module")
def built():
    return build(make_config())


def test_the_learning_rate_of_each_step(built):
    # 1,437 images in batches of 16: 89.8125 steps an epoch, 359 in all.
    highest = 0.5 * 16 / 128
    expected = {
        0: 0.0,
        90: highest / 2,
        180: highest,
        271: highest,
        272: highest / 2,  # 0.757 of 359 steps is 271.8
        358: highest / 2,
    }
    assert built.total_steps == 359
    for step, rate in expected.items():
        np.testing.assert_allclose(built.schedule(step), rate, rtol=1e-6)


def test_a_built_step_takes_the_configs_values(built):
    """Two steps: the first has a rate of 0, the second the warm-up's first."""
    state = jax.device_get(built.init())
    batch = make_batch()
    model = DenseNet(**NET)

    def direct_gradient(params, batch_stats, step):
        gradients, losses = [], []
        for index in range(2):
            # Rows at a stride: every device has some of each microbatch.
            part = {name: x[index::2] for name, x in batch.items()}
            dropout_key, augment_key = random_keys(7, step, index)
            shift_key = jax.random.split(augment_key, 6)[2]
            images = (part["image"].astype(np.float32) - 50) / 60
            images = batch_transforms.random_shift(
                shift_key, jnp.array(images), 2
            )

            def loss(
                params,
                stats=batch_stats,
                images=images,
                part=part,
                key=dropout_key,
            ):
                logits, updates = model.apply(
                    {"params": params, "batch_stats": stats},
                    images,
                    train=True,
                    mutable=["batch_stats"],
                    rngs={"dropout": key},
                )
                losses = cross_entropy(logits, part["label"], 0.2)
                return losses.mean(), updates["batch_stats"]

            (value, batch_stats), gradient = jax.value_and_grad(
                loss, has_aux=True
            )(params)
            gradients.append(gradient)
            losses.append(value)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
        return mean, batch_stats, sum(losses) / 2

    # Clipped before the decay is added.
    highest = 0.5 * 16 / 128
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.add_decayed_weights(3.0),
        optax.sgd(
            lambda step: jnp.float32(step) * (highest / 180), 0.8, nesterov=True
        ),
    )
    params, stats = state.params, state.batch_stats
    ema = {"params": params, "batch_stats": stats}
    opt_state = optimizer.init(params)
    gradient = jax.jit(direct_gradient)
    for step in range(2):
        state, sums = built.train_step(
            jax.device_put(state), jax.tree.map(jnp.array, batch)
        )
        mean, stats, loss = gradient(params, stats, step)
        assert optax.tree.norm(mean) > 0.2  # or clipping does nothing
        updates, opt_state = optimizer.update(mean, opt_state, params)
        params = optax.apply_updates(params, updates)
        now = {"params": params, "batch_stats": stats}
        ema = jax.tree.map(lambda a, b: 0.05 * a + 0.95 * b, ema, now)
        np.testing.assert_allclose(sums["loss"] / BATCH, loss, rtol=1e-4)
        np.testing.assert_allclose(
            sums["grad_norm"], optax.tree.norm(mean), rtol=1e-4
        )

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, state.variables, now)
    jax.tree.map(close, state.ema, ema)


def test_the_first_weights_are_those_of_the_seed(built):
    expected = DenseNet(**NET).init(
        jax.random.key(7), jnp.zeros((1, 8, 8, 1), jnp.float32)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        built.init().params,
        expected["params"],
    )


def test_a_run_reads_and_keeps_what_its_config_says(monkeypatch, tmp_path):
    """Stopped where each is handed on."""
    config = make_config(
        **{"checkpoint.keep_best": 3, "dataset.num_workers": 5}
    )
    given = {}

    class StopError(Exception):
        pass

    def train_batches(*_, **options):
        given.update(options)
        raise StopError

    def checkpoints(directory, rank, **options):
        given.update(options)
        return Checkpoints(directory, rank, **options)

    monkeypatch.setattr(loop.pipeline, "train_batches", train_batches)
    monkeypatch.setattr(loop, "Checkpoints", checkpoints)
    monkeypatch.setattr(loop, "compile_step", lambda _: None)
    with pytest.raises(StopError):
        loop.train_and_evaluate(config, tmp_path)

    expected = {
        "seed": 7,
        "batch_size": BATCH,
        "position": 0,
        "num_workers": 5,
        "on_error": "raise",
        "keep_newest": 2,
        "keep_best": 3,
    }
    assert {key: given[key] for key in expected} == expected


def test_evaluation_normalises_and_smooths_nothing(built):
    variables = jax.device_get(built.init()).variables
    batch = {**make_batch(), "mask": np.arange(BATCH) < 11}

    sums = built.eval_step(variables, batch)

    images = (batch["image"].astype(np.float32) - 50) / 60
    logits = DenseNet(**NET).apply(variables, images)
    losses = cross_entropy(logits, batch["label"])
    np.testing.assert_allclose(sums["loss"], losses[:11].sum(), rtol=1e-5)
    assert sums["count"] == 11


def test_random_keys_are_drawn_for_each_purpose():
    keys = {
        tuple(jax.random.key_data(key).tolist())
        for seed in (0, 1)
        for step in (0, 1)
        for microbatch in (0, 1)
        for key in random_keys(seed, step, microbatch)
    }
    assert len(keys) == 16


def test_recipes_have_the_papers_constants():
    """Huang et al., section 4.2, and the authors' code."""
    for config in (
        densenet121.get_config(),
        cifar10.get_config("bc_100_12"),
        svhn.get_config("bc_100_12"),
    ):
        optimizer, schedule = config.optimizer, config.schedule
        assert optimizer.name == "sgd"
        assert (optimizer.momentum, optimizer.nesterov) == (0.9, True)
        assert optimizer.weight_decay == 1e-4
        assert optimizer.decay_norms_and_biases
        assert optimizer.learning_rate == 0.1
        assert (schedule.name, schedule.factor) == ("step", 0.1)
        assert schedule.warmup_epochs == 0
        assert config.label_smoothing == 0
    cifar = cifar10.get_config("bc_100_12").preprocessing
    assert cifar.mean == (125.3, 123.0, 113.9)
    assert cifar.std == (63.0, 62.1, 66.7)
    imagenet = densenet121.get_config().preprocessing
    np.testing.assert_allclose(
        imagenet.mean, np.multiply((0.485, 0.456, 0.406), 255)
    )
    np.testing.assert_allclose(
        imagenet.std, np.multiply((0.229, 0.224, 0.225), 255)
    )


@pytest.fixture(scope="module")
def worse_at_the_end(tmp_path_factory):
    """A run of two evaluations, the second on labels that are all wrong."""
    workdir = tmp_path_factory.mktemp("run")
    config = digits.get_config()
    config.update_from_flattened_dict(
        {
            "model.block_layers": (1,),
            "model.growth_rate": 4,
            "batch_size": 240,
            "epochs": 2.0,
            "ema_decay": 0.5,
            "checkpoint.every_epochs": 1.0,
            "checkpoint.keep_newest": 1,
            "schedule.warmup_epochs": 0.0,
        }
    )
    accuracies = iter((0.9, 0.1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop,
            "_evaluate",
            lambda *_: {"loss": 1.0, "top1": next(accuracies), "top5": 1.0},
        )
        loop.train_and_evaluate(config, workdir)
    return config, workdir


def test_the_best_is_evaluated_not_the_newest_and_its_averages(
    worse_at_the_end, monkeypatch
):
    config, workdir = worse_at_the_end
    checkpoints = Checkpoints(
        workdir / "checkpoints", CLASSIFICATION.rank, read_only=True
    )
    assert (checkpoints.best, checkpoints.newest) == (6, 12)
    best = checkpoints.restore(6, build(config).abstract_state)
    checkpoints.close()
    given = {}

    def evaluate(step, variables, *_, **__):
        given.update(variables)
        return {"loss": 1.0, "top1": 0.5, "top5": 1.0}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    loop.evaluate_best(config, workdir)

    jax.tree.map(np.testing.assert_array_equal, given, best.ema)
    assert not np.array_equal(
        given["params"]["conv0"]["kernel"], best.params["conv0"]["kernel"]
    )


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch_size": 120},
        {"dataset.name": "folder"},
        {"dataset.train_split": "test"},
    ],
    ids=str,
)
def test_another_place_in_the_data_is_refused(worse_at_the_end, change):
    config, workdir = worse_at_the_end
    changed = config.copy_and_resolve_references()
    changed.epochs = 3.0
    (key,) = change
    changed.update_from_flattened_dict(change)
    checkpoints = Checkpoints(
        workdir / "checkpoints", CLASSIFICATION.rank, read_only=True
    )
    saved = checkpoints.config(12)
    checkpoints.close()

    with pytest.raises(ValueError, match=f"{key} was"):
        resume.check_position(saved, changed.to_dict(), 12)


def test_without_batch_norm_there_are_no_statistics(tmp_path):
    config = digits.get_config()
    config.update_from_flattened_dict(
        {
            "model.block_layers": (1,),
            "model.growth_rate": 4,
            "model.norm": "group",
            "batch_size": 480,
            "epochs": 1.0,
            "ema_decay": 0.5,
            "schedule.warmup_epochs": 0.0,
        }
    )

    result = loop.train_and_evaluate(config, tmp_path)

    again = loop.evaluate_best(config, tmp_path)
    assert again == result


@pytest.mark.parametrize(
    "change",
    [{"model.activation": "silu"}, {"model.norm_epsilon": 1e-3}],
    ids=str,
)
def test_another_network_of_the_same_shapes_is_not_evaluated(
    worse_at_the_end, change
):
    config, workdir = worse_at_the_end
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(change)
    (key,) = change

    with pytest.raises(ValueError, match=f"another network: {key} was"):
        loop.evaluate_best(changed, workdir)


def test_weights_of_other_groups_are_not_started_from(tmp_path):
    changes = {
        "model.block_layers": (1,),
        "model.growth_rate": 4,
        "model.norm": "group",
        "model.norm_groups": 2,
        "batch_size": 480,
        "epochs": 1.0,
        "schedule.warmup_epochs": 0.0,
    }
    config = digits.get_config()
    config.update_from_flattened_dict(changes)
    variables = build(config).init().variables
    save_variables(
        tmp_path / "run", variables, {"model": config.model.to_dict()}
    )
    config.pretrained = str(tmp_path / "run")
    config.model.norm_groups = 4

    with pytest.raises(ValueError, match=r"another arch.*norm_groups=2"):
        loop.train_and_evaluate(config, tmp_path / "tuned")
