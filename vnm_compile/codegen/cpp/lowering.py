"""Lowering of the vnm ops on CPUs: each function returns an Inductor node, or None for the reference."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from vnm_compile.codegen.cpp.template import SparseLinearTemplate
from vnm_compile.codegen.inductor import choose, cpu_threads, is_number, matrix_layout, readable, reshape
from vnm_compile.layout import Layout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(x: Any, arrays: list[Any], layout: Layout) -> Any:
    """`vnm::linear` as one C++ kernel; None for dtypes other than fp32, bf16 and fp16."""
    return _lower(x, arrays, layout, None)


def gated_linear(x: Any, arrays: list[Any], layout: Layout, activation: str) -> Any:
    """`vnm::gated_linear` as one C++ kernel; None for dtypes other than fp32, bf16 and fp16."""
    return _lower(x, arrays, layout, activation)


def lacking(layout: Layout, dtype: torch.dtype) -> str | None:
    """Why no kernel multiplies by weights of a layout and a dtype, whatever the activation; None if one does."""
    return None if dtype in _DTYPES else f"no kernel on CPUs takes {str(dtype).removeprefix('torch.')}"


def _lower(x: Any, arrays: list[Any], layout: Layout, activation: str | None) -> Any:
    same = layout.weight_dtype([array.get_dtype() for array in arrays]) == x.get_dtype()
    # Where each of several weights begins is written into the kernel.
    known = len(arrays) == len(layout.names) or all(is_number(array.get_size()[0]) for array in arrays)
    if not same or lacking(layout, x.get_dtype()) is not None or not known:
        return None
    *leading, _ = x.get_size()
    inputs = readable([reshape(x, [prod(leading), layout.in_features]), *arrays])
    result = matrix_layout(inputs[0], layout.out_features)
    template = SparseLinearTemplate(inputs, result, layout, cpu_threads(), activation)
    return reshape(choose(template, inputs, result), [*leading, layout.out_features])
