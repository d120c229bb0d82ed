"""Checking a name that a person typed against the names there are."""

import difflib
from collections.abc import Iterable


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError, naming the nearest choices, unless value is one."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(
            f"Unknown {what} {value!r}.{did_you_mean(value, choices)} Known: "
            f"{', '.join(choices)}."
        )


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """' Did you mean a or b?' for the choices near to value, '' for none."""
    near = difflib.get_close_matches(str(value), list(choices), n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""
