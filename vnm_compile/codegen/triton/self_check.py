"""Whether a device's sparse tensor cores compute what they should: asked once, before they are used there.

Where fragments lie is written into their kernel, past the compiler. If a version of Triton, or a device, has them
otherwise, the kernel is not used, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from vnm_compile._torch import without_function_modes, without_modes
from vnm_compile.format import Packed, unpack
from vnm_compile.layout import Layout
from vnm_compile.session import session

_TOKENS = 64
_BOUND = 2.0**-6
"""Of the error, relative to the product: three bits more than bf16 has are off."""

_known: dict[Hashable, bool] = session.keep("self-checks of kernels", {})


def passes(key: Hashable, layout: Layout, make: Callable[[], tuple[Tensor, Packed, Tensor]]) -> bool:
    """Whether a kernel is right; warns where it is not.

    Args:
        key: what it is asked once for, such as a device and a dtype.
        layout: of the weight.
        make: runs the kernel; returns activations `[tokens, in_features]`, the arrays of the weight, and the kernel's
            result `[tokens, rows or more]`.
    """
    if key not in _known:
        _known[key] = _passes(key, layout, make)
    return _known[key]


def _passes(key: Hashable, layout: Layout, make: Callable[[], tuple[Tensor, Packed, Tensor]]) -> bool:
    try:
        with without_function_modes(), without_modes(), torch.no_grad():
            error = _error(layout, *make())
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [""]
        found = f"{type(problem).__name__}: {lines[0]}"[:300]
    else:
        if error < _BOUND:  # which NaN is not
            return True
        found = f"the relative error is {error:.1e}"
    warnings.warn(f"sparse tensor cores are not used for {key}: {found}; dense ones multiply instead.", stacklevel=2)
    return False


def _error(layout: Layout, x: Tensor, packed: Packed, result: Tensor) -> float:
    """Of the first block of rows, for the first tokens."""
    block = layout.with_rows(min(layout.spec.v, layout.out_features))
    values, metadata, columns = packed
    weight = unpack(Packed(values[: block.rows], metadata[: block.rows], columns[:1]), block)
    exact = x[:_TOKENS].double() @ weight.double().T
    difference = result[:_TOKENS, : block.out_features].double() - exact
    return float(difference.norm() / exact.norm())
