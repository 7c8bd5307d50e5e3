"""The gradients of `vnm::linear` on a CPU, by kernels of their own: no weight is unpacked.

Importing this registers them for the ops; what they are built from lies in `units.h` and `gradients.cpp`. Operands in
bf16 are multiplied as they are where the CPU has dot products of bf16, else widened.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from vnm_compile import native
from vnm_compile.format import Packed, kept_values
from vnm_compile.layout import Layout

_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def input_grad(grad: Tensor, values: Tensor, structure: Sequence[Tensor], layout: Layout) -> Tensor:
    """`grad @ W`: `[..., out_features]` to `[..., in_features]`, contiguous."""
    if grad.dtype not in _KINDS:  # half precision: as single precision
        return input_grad(grad.float(), values.float(), structure, layout).to(grad.dtype)
    result = grad.new_empty((*grad.shape[:-1], layout.in_features))
    if not result.numel():
        return result
    grads = grad.reshape(-1, layout.out_features).contiguous()
    _run("vnm_input_grad", grads, _rows(values), structure, layout, result, layout.in_features, values.stride(0))
    return result


def values_grad(grad: Tensor, x: Tensor, structure: Sequence[Tensor], layout: Layout) -> Tensor:
    """`grad.T @ x` at the kept places, `[R, G*N]`; zero where the weight is padded."""
    if grad.dtype not in _KINDS:
        return values_grad(grad.float(), x.float(), structure, layout).to(grad.dtype)
    result = x.new_zeros(layout.shapes[0])
    if not grad.numel():
        return result
    grads, rows = grad.reshape(-1, layout.out_features).contiguous(), x.reshape(-1, layout.in_features).contiguous()
    _run("vnm_values_grad", grads, rows, structure, layout, result, layout.in_features, layout.kept)
    return result


def _run(
    name: str,
    grad: Tensor,
    operand: Tensor,
    structure: Sequence[Tensor],
    layout: Layout,
    result: Tensor,
    x_stride: int,
    values_stride: int,
) -> None:
    metadata, columns = _rows(structure[0]), structure[1].contiguous()
    spec = layout.spec
    numbers = (
        *(grad.shape[0], layout.out_features, layout.in_features),
        *(spec.v, spec.n, spec.m),
        *(layout.out_features, x_stride, values_stride, metadata.stride(0)),
        *(columns.element_size(), torch.get_num_threads()),
    )
    pointers = [each.data_ptr() for each in (grad, operand, metadata, columns, result)]
    given = (ctypes.c_int64 * len(numbers))(*numbers)
    _function(name)(_KINDS[grad.dtype], given, *pointers)


def _rows(matrix: Tensor) -> Tensor:
    """The matrix, with rows that are dense in themselves, however far apart."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def source() -> str:
    """All of the C++."""
    return native.source("units.h", "gradients.cpp")


@cache
def _function(name: str):  # type: ignore[no-untyped-def]
    function = getattr(native.load(source()), name)
    function.argtypes = (ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_void_p] * 5)
    function.restype = None
    return function


def _input_grad(grad: Tensor, values: Tensor, structure: Sequence[Tensor], layout: str) -> Tensor:
    parsed = Layout.parse(layout)
    return input_grad(grad, kept_values(Packed(values, *structure), parsed), structure, parsed)


def _values_grad(grad: Tensor, x: Tensor, structure: Sequence[Tensor], layout: str) -> Tensor:
    return values_grad(grad, x, structure, Layout.parse(layout))


_library = torch.library.Library("vnm", "IMPL")
_library.impl("linear_input_grad", _input_grad, "CPU")
_library.impl("linear_values_grad", _values_grad, "CPU")
