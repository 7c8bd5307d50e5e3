"""Every exception of the package."""

from __future__ import annotations

import sys
from functools import cache


class VNMError(ValueError):
    """What the user gave cannot be done.

    The message names the layer (where there is one), what was expected, what was found, and the way out. Programs can
    ask for the kind of mistake, a class below, and for those parts of the message that the attributes hold.

    Attributes:
        layer: the name of the layer that it is about, or None.
        expected, found: what was asked for and what there is, as text; None where the message alone says it.
        way_out: what to do about it, or None.
    """

    layer: str | None = None
    expected: str | None = None
    found: str | None = None
    way_out: str | None = None

    def __init__(self, *message: object, **facts: str | None) -> None:
        super().__init__(*message)
        unknown = set(facts) - set(VNMError.__annotations__)
        assert not unknown, unknown
        vars(self).update(facts)


class PatternViolation(VNMError):
    """A weight does not follow its V:N:M pattern: `expected` is the pattern, `found` the first block that breaks it."""


class UnsupportedWeight(VNMError):
    """A weight cannot be compressed or pruned: its dtype, layout or size, or it is shared, or has no usable values."""


class DamagedWeight(VNMError):
    """What claims to be a compressed weight is none: arrays are missing, do not fit together, or break the format."""


class RefusedWrite(VNMError):
    """Something writes into a compressed weight, or asks for memory that it could be written through."""


class BadModel(VNMError):
    """What was given as the model is none, or cannot be looked into as was asked for."""


class NothingSelected(VNMError):
    """No layer is left to work on: nothing fits `include`, or everything is left out, or no weight is large enough."""


class BadCalibration(VNMError):
    """Calibration data is no model input, reaches no layer, or holds NaN or infinity."""


class UnfinishedTraining(VNMError):
    """A training into a pattern is asked for what it has at its end only."""


class BadLoss(VNMError):
    """A loss is no finite number, does not depend on a weight, or cannot be made from what the model returns."""


class BadScores(VNMError):
    """Scores that a mask is to be chosen by are no matrix, or hold NaN."""


class BadPermutation(VNMError):
    """An order of channels is no permutation, or one that the model does not allow."""


class NoCandidate(VNMError):
    """No pattern among the candidates does what was asked for."""


class MissingPackage(VNMError):
    """A package that this needs is not installed; the message has the command."""


class BadOption(VNMError):
    """An option, mode, target or pattern has a name or value that does not exist."""


class BadFile(VNMError):
    """A file or directory is missing, damaged, foreign, or must not be written."""


class UnknownName(VNMError, KeyError):
    """A report was asked for a name that it does not have. Also a KeyError, as a mapping raises it."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would show the repr


def at_layer(layer: str | None, message: str, kind: type[VNMError] = VNMError, **facts: str | None) -> VNMError:
    """Return an error of a `kind` whose message starts with the layer it is about, if there is one."""
    return kind(f"{layer}: {message}" if layer else message, layer=layer, **facts)


def for_dynamo(error: VNMError) -> VNMError:
    """The same error in the one form that `torch.compile` hands to the user as it is, not wrapped in its own.

    To be raised by a backend: the traceback that the user sees begins where it is made.
    """
    facts = {name: getattr(error, name) for name in VNMError.__annotations__}
    handed_on = _dynamo_kind(type(error))(*error.args, **facts)  # type: ignore[arg-type]
    handed_on.first_useful_frame = sys._getframe(1)  # type: ignore[attr-defined]
    return handed_on


@cache
def _dynamo_kind(kind: type[VNMError]) -> type[VNMError]:
    from vnm_compile._torch import short_traceback

    return type(kind.__name__, (kind, short_traceback()), {"__module__": __name__, "__doc__": kind.__doc__})
