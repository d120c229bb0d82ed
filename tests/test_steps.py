import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from densenet_jax import create_model
from densenet_jax.data.preprocessing import Preprocessing
from densenet_jax.tasks.classification import Classification, cross_entropy
from densenet_jax.training import sharding, steps
from densenet_jax.training.state import init_state

SEED = 3
LEARNING_RATE = 0.1
SGD = optax.sgd(LEARNING_RATE, 0.9, nesterov=True)


def _model(**attributes):
    return create_model(
        "densenet_bc_100_12",
        **{"block_layers": (1, 1), "growth_rate": 4, **attributes},
    )


def _batch(size=16):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "image": jax.random.normal(keys[0], (size, 8, 8, 3)),
        "label": jax.random.randint(keys[1], (size,), 0, 10),
    }


def _state(model, use_ema=False):
    return init_state(model, SGD, (8, 8, 3), seed=0, use_ema=use_ema)


def _assert_close(got, expected, **tolerance):
    def check(path, a, b):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, err_msg=name, **tolerance)

    jax.tree_util.tree_map_with_path(check, got, expected)


def _step(model, **options):
    return jax.jit(
        functools.partial(
            steps.train_step,
            model=model,
            optimizer=SGD,
            **{"seed": SEED, **options},
        )
    )


@pytest.mark.parametrize(
    ("accumulate", "remat"), [(1, "none"), (2, "none"), (1, "convs")]
)
def test_eight_devices_and_one_take_the_same_step(accumulate, remat):
    model = _model(dropout_rate=0.2, remat=remat)
    step = _step(model, accumulate=accumulate)
    state, batch = _state(model), _batch()
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    on_one = step(state, batch)
    on_eight = step(
        jax.device_put(state, sharding.replicated(mesh)),
        jax.device_put(batch, sharding.over_data(mesh)),
    )
    assert on_eight[0].params["conv0"]["kernel"].sharding.num_devices == 8
    _assert_close(on_eight, on_one, rtol=2e-5, atol=2e-6)


def test_step_descends_along_the_gradient_of_the_mean_loss():
    model, batch = _model(), _batch()
    state = _state(model)

    def loss(params):
        logits, _ = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, batch["label"], 0.1).mean()

    value, gradient = jax.value_and_grad(loss)(state.params)
    new, sums = _step(model, task=Classification(label_smoothing=0.1))(
        state, batch
    )
    # The first Nesterov step is 1 + momentum times the gradient.
    expected = jax.tree.map(
        lambda p, g: p - LEARNING_RATE * 1.9 * g, state.params, gradient
    )
    _assert_close(new.params, expected, rtol=1e-5, atol=1e-6)
    assert new.step == 1
    assert sums["count"] == 16
    np.testing.assert_allclose(sums["loss"] / 16, value, rtol=1e-6)
    np.testing.assert_allclose(
        sums["grad_norm"], optax.tree.norm(gradient), rtol=1e-5
    )


def test_accumulation_is_the_mean_over_parts():
    model, batch = _model(), _batch()
    state = _state(model)
    got, sums = _step(model, accumulate=2)(state, batch)
    # By hand: the parts are the even and the odd rows; batch_stats flow.
    stats, gradients = state.batch_stats, []
    for microbatch in (slice(0, None, 2), slice(1, None, 2)):

        def loss(params, stats=stats, microbatch=microbatch):
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats},
                batch["image"][microbatch],
                train=True,
                mutable=["batch_stats"],
            )
            each = cross_entropy(logits, batch["label"][microbatch])
            return each.mean(), updates["batch_stats"]

        gradient, stats = jax.grad(loss, has_aux=True)(state.params)
        gradients.append(gradient)
    expected = jax.tree.map(
        lambda p, a, b: p - LEARNING_RATE * 1.9 * (a + b) / 2,
        state.params,
        *gradients,
    )
    _assert_close(got.params, expected, rtol=1e-5, atol=1e-6)
    _assert_close(got.batch_stats, stats, rtol=1e-5, atol=1e-6)
    assert sums["count"] == 16


def test_ema_averages_parameters_and_statistics():
    model, batch = _model(), _batch()
    state = _state(model, use_ema=True)
    step = _step(model, ema_decay=0.15)
    after_one, _ = step(state, batch)
    after_two, _ = step(after_one, batch)
    # Early in the run the decay is (1 + step) / (10 + step) = 2/11 > 0.15.
    for before, after in ((state, after_one), (after_one, after_two)):
        expected = jax.tree.map(
            lambda average, new: 0.15 * average + 0.85 * new,
            before.ema,
            after.variables,
        )
        _assert_close(after.ema, expected, rtol=1e-5, atol=1e-6)
        assert after.eval_variables is after.ema
    young, _ = _step(model, ema_decay=0.999)(state, batch)
    expected = jax.tree.map(
        lambda average, new: (2 * average + 9 * new) / 11,
        state.ema,
        young.variables,
    )
    _assert_close(young.ema, expected, rtol=1e-5, atol=1e-6)


def test_dropout_differs_from_step_to_step_and_follows_the_seed():
    model, batch = _model(dropout_rate=0.5), _batch()
    state = _state(model)

    def loss(run, step):
        _, sums = run(state.replace(step=jnp.int32(step)), batch)
        return float(sums["loss"])

    run, other_run = _step(model), _step(model, seed=SEED + 1)
    assert loss(run, 0) == loss(run, 0)
    assert len({loss(run, 0), loss(run, 1), loss(other_run, 0)}) == 3


def test_eval_step_uses_running_statistics_and_the_mask():
    model, batch = _model(dropout_rate=0.5), _batch()
    variables = _state(model).variables
    mask = jnp.arange(16) < 11
    got = steps.eval_step(variables, {**batch, "mask": mask}, model=model)
    logits = model.apply(variables, batch["image"][:11])
    expected = cross_entropy(logits, batch["label"][:11])
    assert got["count"] == 11
    np.testing.assert_allclose(got["loss"], expected.sum(), rtol=1e-5)
    hits = (logits.argmax(-1) == batch["label"][:11]).sum()
    assert got["top1"] == hits


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mixed_images_have_the_loss_of_both_labels(accumulate):
    """The mean over microbatches of lam * CE(label) + (1 - lam) * CE(other)."""
    model, batch = _model(), _batch()
    batch["image"] = jnp.round(100 * jnp.abs(batch["image"])).astype(jnp.uint8)
    state = _state(model)
    preprocessing = Preprocessing(
        mean=(50.0,), std=(50.0,), mixup=0.4, random_erasing=0.5
    )
    run = _step(
        model,
        augment=preprocessing.augment,
        task=Classification(label_smoothing=0.1),
        accumulate=accumulate,
    )
    _, sums = run(state, batch)
    total, stats = 0.0, state.batch_stats
    for index in range(accumulate):
        microbatch = {name: x[index::accumulate] for name, x in batch.items()}
        _, key = steps.random_keys(SEED, 0, index)
        microbatch = jax.device_get(preprocessing.augment(key, microbatch))
        logits, updates = model.apply(
            {"params": state.params, "batch_stats": stats},
            microbatch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        stats = updates["batch_stats"]
        logits = np.asarray(logits, np.float64)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        one_hot = np.eye(10)
        lam = microbatch["lam"][:, None]
        targets = lam * one_hot[microbatch["label"]]
        targets = targets + (1 - lam) * one_hot[microbatch["other_label"]]
        targets = 0.9 * targets + 0.1 / 10
        total -= (targets * log_p).sum()
    np.testing.assert_allclose(sums["loss"], total, rtol=1e-5)


def test_augmentation_differs_from_step_to_step():
    model, batch = _model(), _batch()
    preprocessing = Preprocessing(mean=(0.0,), std=(1.0,), random_erasing=1.0)
    run, state = _step(model, augment=preprocessing.augment), _state(model)
    losses = [
        float(run(state.replace(step=jnp.int32(i)), batch)[1]["loss"])
        for i in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_crops_are_averaged_as_one_by_one():
    model, batch = _model(), _batch(20)
    variables = _state(model).variables
    crops = batch["image"].reshape(2, 10, 8, 8, 3)
    labels = batch["label"][:2]
    got = steps.eval_step(
        variables,
        {"image": crops, "label": labels, "mask": jnp.ones(2, bool)},
        model=model,
        normalize=lambda images: 2 * images,
    )
    logits = jnp.stack(
        [
            jnp.stack(
                [model.apply(variables, 2 * crop[None])[0] for crop in image]
            ).mean(axis=0)
            for image in crops
        ]
    )
    expected = cross_entropy(logits, labels).sum()
    np.testing.assert_allclose(got["loss"], expected, rtol=1e-5)
    assert got["count"] == 2
