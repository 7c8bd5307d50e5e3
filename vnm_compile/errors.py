"""Every exception of the package."""

from __future__ import annotations

import sys
from functools import cache


class VNMError(ValueError):
    """What the user gave cannot be done.

    The message names the layer (where there is one), what was expected, what was found, and the way out.
    """


class UnknownName(VNMError, KeyError):
    """A report was asked for a name that it does not have. Also a KeyError, as a mapping raises it."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would show the repr


def at_layer(layer: str | None, message: str) -> VNMError:
    """Return a `VNMError` whose message starts with the layer it is about, if there is one."""
    return VNMError(f"{layer}: {message}" if layer else message)


def for_dynamo(error: VNMError) -> VNMError:
    """The same error in the one form that `torch.compile` hands to the user as it is, not wrapped in its own.

    To be raised by a backend: the traceback that the user sees begins where it is made.
    """
    handed_on = _dynamo_kind()(*error.args)
    handed_on.first_useful_frame = sys._getframe(1)  # type: ignore[attr-defined]
    return handed_on


@cache
def _dynamo_kind() -> type[VNMError]:
    from vnm_compile._torch import short_traceback

    return type("VNMError", (VNMError, short_traceback()), {"__module__": __name__, "__doc__": VNMError.__doc__})
