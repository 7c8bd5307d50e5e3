"""The table of instructions: opcodes, as patterns, and the functions that carry them out.

A pattern says which modifiers a function knows; an opcode that fits none is not modelled.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

from tests.ptx.errors import NotModelled

_FILES = ("arithmetic", "conversions", "transfers", "matrices", "warp_groups")
_table: list[tuple[re.Pattern[str], Callable[..., None]]] = []
_Function = TypeVar("_Function", bound=Callable[..., None])


def instruction(pattern: str) -> Callable[[_Function], _Function]:
    """Decorate a function of a machine and operands; what the pattern's groups match are its keywords."""

    def register(function: _Function) -> _Function:
        _table.append((re.compile(pattern), function))
        return function

    return register


@functools.cache
def find(opcode: str) -> tuple[Callable[..., None], dict[str, Any]]:
    """The function for an opcode, and its keywords. Raises NotModelled where there is none."""
    for file in _FILES:
        importlib.import_module(f"tests.ptx.{file}")
    found = [(function, match.groupdict()) for pattern, function in _table if (match := pattern.fullmatch(opcode))]
    if not found:
        raise NotModelled(f"instruction {opcode}")
    assert len(found) == 1, f"{opcode} is in the table {len(found)} times"
    return found[0]
