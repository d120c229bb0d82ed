import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from densenet_jax.training.optimizer import (
    OPTIMIZERS,
    is_kernel,
    make_optimizer,
    make_schedule,
)

SGD = {
    "name": "sgd",
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 0.1,
    "decay_norms_and_biases": True,
    "clip_norm": None,
}


def _schedule(name="step", **changes):
    options = {
        "learning_rate": 0.8,
        "total_steps": 100,
        "warmup_steps": 0,
        "boundaries": (0.5, 0.75),
        "factor": 0.1,
    }
    return make_schedule(name, **{**options, **changes})


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_step_schedule(warmup_steps):
    schedule = _schedule(warmup_steps=warmup_steps)
    expected = {
        10: 0.8,
        49: 0.8,
        50: 0.08,
        74: 0.08,
        75: 0.008,
        99: 0.008,
    }
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6)
    if warmup_steps:
        np.testing.assert_allclose(schedule(5), 0.4, rtol=1e-6)
        assert schedule(0) == 0


def test_boundaries_that_fall_on_one_step_both_count():
    schedule = _schedule(total_steps=3, boundaries=(0.6, 0.7))
    np.testing.assert_allclose(schedule(2), 0.008, rtol=1e-6)


def test_cosine_schedule():
    schedule = _schedule("cosine", warmup_steps=20)
    np.testing.assert_allclose(schedule(20), 0.8, rtol=1e-6)
    np.testing.assert_allclose(schedule(60), 0.4, rtol=1e-6)
    np.testing.assert_allclose(schedule(100), 0.0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "stepp"}, "Unknown schedule 'stepp'. Did you mean step?"),
        ({"warmup_steps": 100}, "warm-up of 100 steps does not fit"),
        ({"boundaries": (30, 60)}, "shares of the run"),
    ],
)
def test_bad_schedules(changes, message):
    with pytest.raises(ValueError, match=message):
        _schedule(**{"name": "step", **changes})


def _tree(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (1, 1, 3, 2))},
        "norm": {
            "scale": jax.random.normal(keys[1], (2,)),
            "bias": jax.random.normal(keys[2], (2,)),
        },
    }


def _update(gradients, params, **changes):
    options = {**SGD, **changes}
    optimizer = make_optimizer(
        options.pop("name"), optax.constant_schedule(0.5), **options
    )
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_sgd_is_the_papers():
    params, gradients = _tree(0), [_tree(1), _tree(2)]
    got = _update(gradients, params)
    p = jax.tree.map(np.asarray, params)
    velocity = jax.tree.map(np.zeros_like, p)
    for g in gradients:
        # Sutskever et al. 2013 in PyTorch's form.
        g = jax.tree.map(lambda g, p: g + 0.1 * p, g, p)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, g)
        p = jax.tree.map(
            lambda p, v, g: p - 0.5 * (g + 0.9 * v), p, velocity, g
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, p
    )


# optax's bias correction mixes integers and floats.
@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_spares_norms_and_biases_when_told(name):
    params, zero = _tree(0), jax.tree.map(jnp.zeros_like, _tree(0))
    everything = _update([zero], params, name=name)
    kernels = _update([zero], params, name=name, decay_norms_and_biases=False)
    assert is_kernel(params)["conv"]["kernel"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, kernels)
    assert changed == is_kernel(params)
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), params, everything)
    assert all(jax.tree.leaves(moved))


def test_clipping_bounds_the_global_norm():
    params, gradient = _tree(0), _tree(1)
    options = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    got = _update([gradient], params, clip_norm=0.01, **options)
    moved = jax.tree.map(jnp.subtract, got, params)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.5 * 0.01, rtol=1e-4)


def test_clipping_spares_the_decay():
    params, gradient = _tree(0), _tree(1)
    options = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.1}
    got = _update([gradient], params, clip_norm=0.01, **options)
    norm = np.sqrt(
        sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradient))
    )
    for new, p, g in zip(
        jax.tree.leaves(got), jax.tree.leaves(params), jax.tree.leaves(gradient)
    ):
        expected = p - 0.5 * (0.01 / norm * g + 0.1 * p)
        np.testing.assert_allclose(new, expected, rtol=1e-5)


def test_lars_is_the_papers():
    """You et al., 1708.03888, equation 6 and algorithm 1."""
    params, gradients = _tree(0), [_tree(1), _tree(2)]
    got = _update(gradients, params, name="lars", nesterov=False)
    p = np.asarray(params["conv"]["kernel"])
    velocity = np.zeros_like(p)
    for tree in gradients:
        step = np.asarray(tree["conv"]["kernel"]) + 0.1 * p
        trust = 0.001 * np.linalg.norm(p) / np.linalg.norm(step)
        velocity = 0.9 * velocity + 0.5 * trust * step
        p = p - velocity
    moved = got["conv"]["kernel"] - params["conv"]["kernel"]
    np.testing.assert_allclose(
        moved, p - params["conv"]["kernel"], rtol=1e-3, atol=1e-7
    )


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="Did you mean adamw"):
        _update([], _tree(0), name="adam")


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backbone_lr_scale", [0.1, 0.0])
def test_the_body_learns_at_its_own_rate(name, backbone_lr_scale):
    params = {
        "conv0": {"kernel": jnp.array([1.0, -2.0])},
        "classifier": {"kernel": jnp.array([3.0]), "bias": jnp.array([0.5])},
    }
    gradients = jax.tree.map(lambda x: x / 3, params)

    def updates(rate):
        optimizer = make_optimizer(
            schedule=_schedule(),
            **{
                **SGD,
                "name": name,
                "clip_norm": 0.5,
                "backbone_lr_scale": rate,
            },
        )
        state = optimizer.init(params)
        for _ in range(3):
            found, state = optimizer.update(gradients, state, params)
        return found

    whole, found = updates(1.0), updates(backbone_lr_scale)
    np.testing.assert_allclose(
        found["conv0"]["kernel"],
        backbone_lr_scale * whole["conv0"]["kernel"],
        rtol=1e-6,
    )
    jax.tree.map(
        np.testing.assert_array_equal, found["classifier"], whole["classifier"]
    )


def test_a_negative_rate():
    with pytest.raises(ValueError, match=r"backbone_lr_scale is -1\.0"):
        make_optimizer(
            schedule=_schedule(), **{**SGD, "backbone_lr_scale": -1.0}
        )
