"""The same numbers as torchvision's DenseNet, from the same weights.

Golden values come from `tests/make_golden.py`, which runs torchvision itself on
a narrow net; where torchvision is installed, its four variants run here too.
"""

import pathlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from densenet_jax import create_model
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


def test_ten_training_steps(net, variables, images, golden):
    """In float64: `tests/make_golden.py` says why."""
    optimizer = optax.chain(
        optax.add_decayed_weights(1e-4),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    )
    net = net.copy(dtype=jnp.float64)

    def loss_and_statistics(params, batch_stats, images, labels):
        logits, batch_stats = _train_pass(net, params, batch_stats, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss.mean(), batch_stats

    @jax.jit
    def step(params, batch_stats, opt_state, images, labels):
        (loss, batch_stats), grads = jax.value_and_grad(
            loss_and_statistics, has_aux=True
        )(params, batch_stats, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (
            optax.apply_updates(params, updates),
            batch_stats,
            opt_state,
            loss,
        )

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        params, batch_stats = wide["params"], wide["batch_stats"]
        images = images.astype(np.float64)
        opt_state = optimizer.init(params)
        losses = []
        for i in range(10):
            params, batch_stats, opt_state, loss = step(
                params,
                batch_stats,
                opt_state,
                images[i % 2],
                golden["labels"][i % 2],
            )
            losses.append(loss)

    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-11)
    # The file holds these in float32.
    _assert_close(
        {"params": params, "batch_stats": batch_stats},
        to_variables(_named("trained", golden)),
        rtol=1e-7,
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
