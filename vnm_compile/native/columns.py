"""The search for the columns that blocks keep, on a CPU; what it is built from lies in `columns.cpp`."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from vnm_compile import native
from vnm_compile.errors import BadScores

Way = Literal["all", "sums", "try", "grow"]
"""How columns are found: all of them, those with the largest sums, trying every choice of 4, or growing a set."""
NAN = "the scores hold NaN, so there is no largest sum; look for NaN in the weight or activations."
_WAYS: tuple[Way, ...] = ("all", "sums", "try", "grow")


def project(scores: Tensor, v: int, width: int, n: int, m: int, way: Way) -> Tensor:
    """The mask of scores `[O, K]` in fp32 or fp64 that keeps, in every row, n of the `width` columns of each block.

    Raises:
        VNMError: there is a NaN among the scores.
    """
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if not _run(scores, v, width, n, m, way, None, mask):
        raise BadScores(NAN)
    return mask


def columns_of(blocks: Tensor, n: int, width: int, way: Way) -> Tensor:
    """The columns that blocks `[X, V, M]` keep: int64 `[X, width]`, increasing.

    Raises:
        VNMError: there is a NaN among the scores.
    """
    count, v, m = blocks.shape
    found = torch.empty(count, width, dtype=torch.int64, device=blocks.device)
    if not _run(blocks.reshape(count * v, m), v, width, n, m, way, found, None):
        raise BadScores(NAN)
    return found


def _run(
    scores: Tensor, v: int, width: int, n: int, m: int, way: Way, columns: Tensor | None, mask: Tensor | None
) -> bool:
    """Fill in what is asked for; False if there is a NaN."""
    scores = scores.detach().resolve_neg()  # read by address: what is negated when read has to be so
    scores = scores if scores.shape[1] <= 1 or scores.stride(1) == 1 else scores.contiguous()
    numbers = (*scores.shape, scores.stride(0), v, m, n, width, _WAYS.index(way), torch.get_num_threads())
    given = (ctypes.c_int64 * len(numbers))(*numbers)
    results = [each.data_ptr() if each is not None else None for each in (columns, mask)]
    return not _function()(scores.dtype == torch.float64, given, scores.data_ptr(), *results)


@cache
def build() -> ctypes.CDLL:
    """Compile, unless it was before."""
    return native.load(native.source("columns.cpp"))


@cache
def _function():  # type: ignore[no-untyped-def]
    function = build().vnm_project
    function.argtypes = (ctypes.c_int64, *[ctypes.c_void_p] * 4)
    function.restype = ctypes.c_int64
    return function
