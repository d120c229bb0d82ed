"""The same numbers as torchvision's DenseNet, from the same weights.

Golden values come from `tests/make_golden.py`, which runs torchvision itself on
a narrow net; where torchvision is installed, its four variants run here too.
"""

import functools
import pathlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax import create_model
from densenet_jax.models.densenet import REMAT_POLICIES
from densenet_jax.training.optimizer import make_optimizer, make_schedule
from densenet_jax.training.state import init_state
from densenet_jax.training.steps import train_step
from tests.torch_layout import to_variables

GOLDEN = pathlib.Path(__file__).parent / "data/torchvision_densenet.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def variables(golden):
    return to_variables(_named("state", golden))


@pytest.fixture(scope="module")
def images(golden):
    """Two batches [2, batch, height, width, channels]."""
    return golden["images"].transpose(0, 1, 3, 4, 2).astype(np.float32) / 4


@pytest.fixture(scope="module")
def net():
    return create_model(
        "densenet121",
        block_layers=(2, 3, 2, 2),
        growth_rate=4,
        num_classes=10,
    )


def _named(prefix, arrays):
    return {
        name.removeprefix(f"{prefix}/"): value
        for name, value in arrays.items()
        if name.startswith(f"{prefix}/")
    }


def _shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def _assert_close(found, expected, **tolerances):
    """Compares the leaves that expected has with those of found."""
    found = flax.traverse_util.flatten_dict(found, sep="/")
    expected = flax.traverse_util.flatten_dict(expected, sep="/")
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], value, err_msg=name, **tolerances
        )


def _train_pass(net, params, batch_stats, images):
    logits, updates = net.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    return logits, updates["batch_stats"]


def test_parameter_tree_has_torchvisions_names(net, variables, images):
    ours = jax.eval_shape(net.init, jax.random.key(0), images[0])

    assert _shapes(ours) == _shapes(variables)


def test_eval_logits(net, variables, images, golden):
    logits = jax.jit(net.apply)(variables, images[0])

    np.testing.assert_allclose(logits, golden["eval_logits"], atol=1e-5)


def test_train_logits_and_running_statistics(net, variables, images, golden):
    logits, batch_stats = jax.jit(_train_pass, static_argnums=0)(
        net, variables["params"], variables["batch_stats"], images[0]
    )

    np.testing.assert_allclose(logits, golden["train_logits"], atol=1e-5)
    updated = to_variables(_named("updated", golden))["batch_stats"]
    assert _shapes(batch_stats) == _shapes(updated)
    _assert_close(batch_stats, updated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "remat",
    [
        policy
        if policy in ("none", "convs", "nn_convs")
        else pytest.param(policy, marks=pytest.mark.slow)
        for policy in REMAT_POLICIES
    ],
)
def test_twelve_training_steps(remat, net, variables, images, golden):
    """Our step and optimizer, in float64 (`make_golden` says why)."""
    schedule = make_schedule(
        "step",
        learning_rate=1 / 8,
        total_steps=1000,
        warmup_steps=0,
        boundaries=(),
        factor=1.0,
    )
    optimizer = make_optimizer(
        "sgd",
        schedule,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        decay_norms_and_biases=True,
        clip_norm=None,
    )
    with jax.enable_x64(True):
        step = jax.jit(
            functools.partial(
                train_step,
                model=net.copy(dtype=jnp.float64, remat=remat),
                optimizer=optimizer,
                seed=0,
            )
        )
        state = init_state(
            net,
            optimizer,
            images.shape[2:],
            seed=0,
            use_ema=False,
            variables=jax.tree.map(lambda x: jnp.float64(x), variables),
        )
        losses = []
        for i in range(12):
            batch = {
                "image": jnp.float64(images[i % 2]),
                "label": jnp.int32(golden["labels"][i % 2]),
            }
            state, sums = step(state, batch)
            losses.append(sums["loss"].item() / len(batch["label"]))
        trained = jax.device_get(state.variables)

    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-10)
    _assert_close(
        trained,
        to_variables(_named("trained", golden)),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    "name",
    [
        "densenet121",
        pytest.param("densenet161", marks=pytest.mark.slow),
        pytest.param("densenet169", marks=pytest.mark.slow),
        pytest.param("densenet201", marks=pytest.mark.slow),
    ],
)
def test_variant_equals_installed_torchvision(name):
    reason = "torchvision, which this compares with, is not installed"
    torch = pytest.importorskip("torch", reason=reason)
    torchvision = pytest.importorskip("torchvision", reason=reason)
    from tests.make_golden import randomize

    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)()
    randomize(theirs)
    images = torch.randn(4, 3, 64, 64)
    variables = to_variables(
        {name: value.numpy() for name, value in theirs.state_dict().items()}
    )
    variables = jax.tree.map(jnp.array, variables)
    with torch.no_grad():
        eval_logits = theirs.eval()(images).numpy()
        train_logits = theirs.train()(images).numpy()
    updated = to_variables(
        {name: value.numpy() for name, value in theirs.state_dict().items()}
    )

    ours = create_model(name)
    images = images.numpy().transpose(0, 2, 3, 1)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), images)
    assert _shapes(shapes) == _shapes(variables)

    found = jax.jit(ours.apply)(variables, images)
    np.testing.assert_allclose(found, eval_logits, atol=3e-5)

    found, updates = jax.jit(
        lambda variables, images: ours.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
    )(variables, images)
    np.testing.assert_allclose(found, train_logits, atol=3e-5)
    _assert_close(
        updates["batch_stats"], updated["batch_stats"], rtol=1e-4, atol=1e-5
    )
