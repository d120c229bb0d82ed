"""Sums over examples, which merge exactly by addition."""

from collections.abc import Mapping
from typing import Any


def merge(total: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Adds two dicts of sums by name; either may be empty."""
    return {
        name: total.get(name, 0) + new.get(name, 0) for name in {**total, **new}
    }
