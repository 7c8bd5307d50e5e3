"""The search for the columns that blocks keep, on a CPU; what it is built from lies in `columns.cpp`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def best_columns(blocks: Tensor, n: int) -> Tensor:
    """As `vnm_compile.prune.columns.best_columns`, for n of 1 or 2: `[X, V, M]` to int64 `[X, 4]`."""
    return _run("vnm_best_columns", blocks, n, 4)


def grow_columns(blocks: Tensor, n: int, width: int) -> Tensor:
    """As `vnm_compile.prune.columns.grow_columns`: `[X, V, M]` to int64 `[X, width]`."""
    return _run("vnm_grow_columns", blocks, n, width)


def _run(name: str, blocks: Tensor, n: int, width: int) -> Tensor:
    blocks = blocks.detach().contiguous()
    result = torch.empty(blocks.shape[0], width, dtype=torch.int64)
    numbers = (*blocks.shape, n, width, torch.get_num_threads())
    given = (ctypes.c_int64 * len(numbers))(*numbers)
    _function(name)(blocks.dtype == torch.float64, given, blocks.data_ptr(), result.data_ptr())
    return result


@cache
def build() -> ctypes.CDLL:
    """Compile, unless it was before."""
    from vnm_compile.codegen.inductor import load_cpp  # Inductor takes seconds to import

    return load_cpp(Path(__file__).with_name("columns.cpp").read_text())


@cache
def _function(name: str):  # type: ignore[no-untyped-def]
    function = getattr(build(), name)
    function.argtypes = (ctypes.c_int64, *[ctypes.c_void_p] * 3)
    function.restype = None
    return function
