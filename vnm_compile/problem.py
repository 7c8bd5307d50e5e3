"""A multiplication as far as its speed depends on it, and what was measured of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2
from typing import NamedTuple

import torch

from vnm_compile.layout import Layout


class Problem(NamedTuple):
    """One multiplication `[tokens, in_features] @ [out_features, in_features].T` with a weight stored as `layout`."""

    tokens: int
    layout: Layout
    dtype: torch.dtype
    device: torch.device

    def measured(self) -> Problem:
        """The problem that is timed for this one: the number of tokens is the nearest power of two (in its logarithm),
        so that a prompt of another length is decided without measuring again."""
        return self._replace(tokens=1 << round(log2(max(1, self.tokens))))


class Timing(NamedTuple):
    """Seconds that the fastest sparse and the dense kernel take for one problem."""

    sparse: float
    dense: float


class Failure(NamedTuple):
    """Why a problem could not be timed: the first line of the error."""

    reason: str


Measure = Callable[[Sequence[Problem]], list[Timing | Failure | None]]
"""Times problems on their devices; None where no sparse kernel exists for one."""
