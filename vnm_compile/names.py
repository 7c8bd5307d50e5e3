"""Names of layers as they are looked up and shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from vnm_compile.errors import UnknownName


def by_name(name: Any, records: Sequence[Any]) -> Any:
    """The one of `records` whose `.name` is `name`.

    Raises:
        UnknownName: there is none; the message has the names that come close, or some of those there are.
    """
    for record in records:
        if record.name == name:
            return record
    names = [record.name for record in records]
    close = get_close_matches(str(name), names, 3, 0.5)
    if close:
        hint = f"did you mean {' or '.join(map(printable, close))}?"
    elif names:
        hint = f"there are {', '.join(map(printable, names[:5]))}{', ...' if len(names) > 5 else ''}."
    else:
        hint = "the report is empty."
    raise UnknownName(f"no layer is called {name!r}; {hint}")


def some_of(names: Iterable[str], most: int = 3) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def printable(name: str) -> str:
    """A name with its control characters spelled out: it must not move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in name)
