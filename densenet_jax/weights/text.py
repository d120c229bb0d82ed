"""Lists in messages."""

from collections.abc import Iterable


def listed(names: Iterable, limit: int = 10) -> str:
    """A few of the names, and how many more there are."""
    names = [str(name)[:80] or "the top" for name in names]
    more = len(names) - limit
    shown = ", ".join(names[:limit])
    return shown + (f" and {more} more" if more > 0 else "")
