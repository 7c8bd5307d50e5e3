"""A multiplication as far as its speed depends on it, and what was measured of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from vnm_compile.spec import Spec


class Problem(NamedTuple):
    """One multiplication `[tokens, in_features] @ [out_features, in_features].T` with a weight that follows `spec`."""

    tokens: int
    out_features: int
    in_features: int
    spec: Spec
    dtype: torch.dtype
    device: torch.device


class Timing(NamedTuple):
    """Seconds that the fastest sparse and the dense kernel take for one problem."""

    sparse: float
    dense: float


Measure = Callable[[Problem], Timing | None]
"""Times a problem on its device; None where no sparse kernel exists for it."""
