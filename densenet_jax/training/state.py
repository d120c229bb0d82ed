"""Everything that a training step changes."""

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn


@flax.struct.dataclass
class TrainState:
    """The state of training after `step` steps.

    Attributes:
      step: int32 scalar; also the position in the training data, in batches.
      params, batch_stats: of the model.
      opt_state: of the optimizer.
      ema: moving averages {'params', 'batch_stats'}, or None.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is trained with."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What the model is evaluated with: the averages where there are."""
        return self.variables if self.ema is None else self.ema


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    use_ema: bool,
    variables: Mapping[str, Any] | None = None,
) -> TrainState:
    """A fresh state for images [height, width, channels] of image_shape.

    It begins with `variables` {'params', 'batch_stats'} where they are given,
    and with random ones where not.
    """
    if variables is None:
        images = jnp.zeros((1, *image_shape), jnp.float32)
        variables = model.init(jax.random.key(seed), images)
    # Other norms than batch normalisation have no statistics.
    variables = {"batch_stats": {}, **variables}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        ema=variables if use_ema else None,
    )
