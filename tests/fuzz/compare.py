"""Is a result what eager gives? Value against float64; dtype, shape, strides and storage as eager's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = 1.1  # promise 1: error against float64 over that of the dense kernel of the same dtype
ULPS = 8  # of the largest magnitude, allowed on top: another order of additions may be unlucky where dense is lucky
LUCK = 6  # times the dense error is not told apart from rounding either: few values, amplified by what follows


@dataclass(frozen=True)
class Difference:
    """What is wrong with one result: "value", "dtype", "shape", "strides", "storage" or "missing", and the figures."""

    where: str
    what: str
    text: str
    error: float = 0.0
    unit: float = 0.0
    dense_error: float = 0.0

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.text}"


def error_of(actual: Tensor, reference: Tensor) -> float:
    """Largest difference to the float64 reference; infinite where only one is finite."""
    one, other = actual.detach().double(), reference.detach().double()
    if not one.numel():
        return 0.0
    same = (one == other) | (one.isnan() & other.isnan())
    return float(torch.where(same, torch.zeros_like(one), (one - other).abs()).nan_to_num(torch.inf).max())


def difference(
    where: str, actual: Tensor | None, dense: Tensor | None, reference: Tensor | None, eps: float = 0.0
) -> Difference | None:
    """The first thing in which `actual` is not what eager in its dtype (`dense`) and in float64 (`reference`) say.

    `eps` is that of the coarsest dtype which the program computes in.
    """
    if actual is None or dense is None or reference is None:
        if actual is None and dense is None:
            return None
        return Difference(where, "missing", f"ours is {type(actual).__name__}, eager's {type(dense).__name__}")
    if actual.shape != dense.shape:
        return Difference(where, "shape", f"{list(actual.shape)}, eager's {list(dense.shape)}")
    if actual.dtype != dense.dtype:
        return Difference(where, "dtype", f"{actual.dtype}, eager's {dense.dtype}")
    if _strides(actual) != _strides(dense):
        return Difference(where, "strides", f"{actual.stride()}, eager's {dense.stride()} for {list(dense.shape)}")
    if not actual.is_floating_point():
        return None
    error, dense_error = error_of(actual, reference), error_of(dense, reference)
    magnitude = float(reference.detach().abs().nan_to_num(0).max()) if reference.numel() else 0.0
    unit = ULPS * max(eps, torch.finfo(actual.dtype).eps) * max(magnitude, 0.05)
    if error > max(SLACK * dense_error + unit, LUCK * dense_error):
        text = f"error {error:.3g}, eager's is {dense_error:.3g}, magnitude {magnitude:.3g}"
        return Difference(where, "value", text, error, unit, dense_error)
    mine, theirs = actual.untyped_storage().nbytes(), dense.untyped_storage().nbytes()
    if mine > 1.5 * theirs + 256:
        return Difference(where, "storage", f"a result keeps {mine} bytes alive, eager's keeps {theirs}")
    return None


def _strides(tensor: Tensor) -> list[int]:
    """Strides that matter: none of an empty tensor, and not those of dimensions of size one."""
    if not tensor.numel():
        return []
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
