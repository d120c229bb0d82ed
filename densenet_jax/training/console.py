"""What a run prints, on the first host alone."""

import jax


def is_first_process() -> bool:
    return jax.process_index() == 0


def say(message: str) -> None:
    if is_first_process():
        print(message, flush=True)
