"""How the benchmarks read their flags."""

import argparse

from densenet_jax.choices import check_choice
from densenet_jax.models.densenet import REMAT_POLICIES


def parser(docstring: str) -> argparse.ArgumentParser:
    """A parser for the script with this docstring."""
    return argparse.ArgumentParser(
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """A positive number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def numbers(text: str) -> tuple[int, ...]:
    """Positive numbers, as '6,12'."""
    return tuple(positive(part) for part in text.split(","))


def policies(text: str) -> tuple[str, ...]:
    """Remat policies, as 'none,convs'."""
    names = tuple(text.split(","))
    for name in names:
        try:
            check_choice("remat policy", name, REMAT_POLICIES)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return names
