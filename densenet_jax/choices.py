"""Checking a name that a person typed against the names there are."""

import difflib
from collections.abc import Iterable


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError, naming the nearest choices, unless value is one."""
    choices = list(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"Unknown {what} {value!r}.{hint} Known: {', '.join(choices)}."
    )
