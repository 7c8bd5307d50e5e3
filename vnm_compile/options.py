"""What a user can set: the `vnm.` keys of `torch.compile(..., options={...})`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from vnm_compile.errors import BadOption

PREFIX = "vnm."
Policy = Literal["latency", "memory"]


@dataclass(frozen=True)
class Options:
    """The options of the backend.

    Attributes:
        policy: "latency" measures at compile time and keeps whichever of sparse and dense is faster; "memory" always
            compresses.
        detect: look for the pattern in weights that are not annotated.
        merge: compute linears that share an activation (q/k/v, gate/up) together.
    """

    policy: Policy = "latency"
    detect: bool = True
    merge: bool = True

    @property
    def key(self) -> str:
        """Text that differs where the generated code may: part of Inductor's cache keys."""
        return repr(sorted(asdict(self).items()))


OUR_OPTIONS = tuple(PREFIX + field.name for field in fields(Options))
"""The keys that are ours."""


def split_options(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Return our options and, unchanged, those that are Inductor's.

    Raises:
        VNMError: a `vnm.` key that does not exist, or a value that it does not take.
    """
    if options is not None and not isinstance(options, Mapping):
        raise BadOption(f"options={options!r:.100}; give a dict such as {{'vnm.policy': 'memory'}}.")
    given = dict(options or {})
    for key in given:
        if not isinstance(key, str):
            raise BadOption(f"option {key!r:.100}; the keys of options are text.")
    ours = {key.removeprefix(PREFIX): given.pop(key) for key in list(given) if key.startswith(PREFIX)}
    hints = get_type_hints(Options)
    for name, value in ours.items():
        if PREFIX + name not in OUR_OPTIONS:
            raise BadOption(f"unknown option {PREFIX}{name}; there are {', '.join(OUR_OPTIONS)}.")
        allowed = get_args(hints[name]) or (True, False)
        if value not in allowed or type(value) is not type(allowed[0]):
            raise BadOption(f"{PREFIX}{name}={value!r}; it takes one of {', '.join(map(repr, allowed))}.")
    return Options(**ours), given
