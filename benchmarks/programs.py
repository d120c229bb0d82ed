"""The compiled programs that are measured: a training step, inference."""

import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax

from densenet_jax.training import steps
from densenet_jax.training.state import init_state

LEARNING_RATE = 0.01
MOMENTUM = 0.9
_OPTIMIZER = optax.sgd(LEARNING_RATE, MOMENTUM)


class Program(NamedTuple):
    """A compiled program and what compiling it took.

    Attributes:
      run: the program.
      compile_seconds: for tracing and compiling.
      temp_bytes: memory beside arguments and results, while it runs.
    """

    run: jax.stages.Compiled
    compile_seconds: float
    temp_bytes: int


def train_program(
    model: nn.Module, state: Any, batch: Any, **compiler_options: Any
) -> Program:
    """Forward, backward and SGD with momentum, as this project trains.

    Args:
      model: this project's, or one with the same signature.
      state: from `train_state`, or its shapes; the program overwrites it.
      batch: 'image', 'label'; or their shapes.
      **compiler_options: XLA's flags for this program.

    Returns:
      (state, batch) -> (state, the batch's mean loss).
    """

    def step(state, batch):
        state, sums = steps.train_step(
            state, batch, model=model, optimizer=_OPTIMIZER, seed=0
        )
        return state, sums["loss"] / len(batch["label"])

    step = jax.jit(step, donate_argnums=0)
    return _compile(step, (state, batch), compiler_options)


def train_state(model: nn.Module, image_size: int, variables: Any = None):
    """A fresh state; random variables where none are given."""
    return init_state(
        model,
        _OPTIMIZER,
        (image_size, image_size, 3),
        seed=0,
        use_ema=False,
        variables=variables,
    )


def infer_program(
    model: nn.Module, variables: Any, images: Any, **compiler_options: Any
) -> Program:
    """(variables, images) -> logits; options as for `train_program`."""
    apply = jax.jit(model.apply)
    return _compile(apply, (variables, images), compiler_options)


def _compile(function, arguments, compiler_options) -> Program:
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile(compiler_options)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Program(compiled, seconds, memory.temp_size_in_bytes)
