"""The table of methods: a new one is a file beside this one, and a line here."""

from __future__ import annotations

from typing import Any

from vnm_compile.errors import BadOption
from vnm_compile.prune.methods.fisher import Fisher
from vnm_compile.prune.methods.magnitude import Magnitude
from vnm_compile.prune.methods.method import Method
from vnm_compile.prune.methods.second_order import SecondOrder
from vnm_compile.prune.methods.wanda import Wanda

METHODS: dict[str, type[Method]] = {method.name: method for method in (Magnitude, Wanda, SecondOrder, Fisher)}
"""The methods of `vnm.sparsify` by name; each is a class whose options have defaults, with a `summary`."""


def find_method(method: Any) -> Method:
    """Return the method that is meant: itself, or the one of that name with its default options.

    Raises:
        VNMError: there is none of that name, or it is something else.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    classes = ", ".join(f"vnm.prune.{each.__name__}(...)" for each in METHODS.values())
    raise BadOption(f"unknown method {method!r}; there are {', '.join(METHODS)}, and with options {classes}.")
