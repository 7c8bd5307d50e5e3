"""Every exception of the package."""

from __future__ import annotations


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
