"""A pruning method from the command line: its name, and options as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from vnm_compile.errors import BadOption
from vnm_compile.prune import Method
from vnm_compile.prune.methods import find_method

_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False}


def method_with_options(name: str, options: Iterable[str]) -> Method:
    """Return a method with some options set, each `NAME=VALUE`; the others keep their defaults.

    Numbers, text and true or false can be given; functions (a loss, retraining) are for Python.

    Raises:
        VNMError: an unknown method or option, or a value that the option does not take.
    """
    method = find_method(name)
    known = {key: value for key, value in method.options().items() if isinstance(value, bool | int | float | str)}
    changes: dict[str, Any] = {}
    for each in options:
        key, _, text = each.partition("=")
        if key not in known:
            raise BadOption(f"--option {each}: {name} has the options {', '.join(known)}; give NAME=VALUE.")
        try:
            default = known[key]
            changes[key] = _BOOLEANS[text.lower()] if isinstance(default, bool) else type(default)(text)
        except (ValueError, KeyError) as error:
            raise BadOption(f"--option {each}: {key} is such as {known[key]}.") from error
    return replace(method, **changes)  # type: ignore[type-var]
