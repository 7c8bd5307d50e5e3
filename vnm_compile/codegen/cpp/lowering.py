"""Lowering of the vnm ops on CPUs: each function returns an Inductor node, or None for the reference."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from vnm_compile.codegen.cpp.template import SparseLinearTemplate
from vnm_compile.codegen.inductor import choose, cpu_threads, matrix_layout, readable, reshape
from vnm_compile.spec import Spec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(
    x: Any, values: Any, metadata: Any, columns: Any, v: int, n: int, m: int, in_features: int, out_features: int
) -> Any:
    """`vnm::linear` as one C++ kernel; None for dtypes other than fp32, bf16 and fp16."""
    return _lower(x, (values, metadata, columns), Spec(v, n, m), in_features, out_features, None)


def gated_linear(
    x: Any,
    values: Any,
    metadata: Any,
    columns: Any,
    v: int,
    n: int,
    m: int,
    in_features: int,
    out_features: int,
    activation: str,
) -> Any:
    """`vnm::gated_linear` as one C++ kernel; None for dtypes other than fp32, bf16 and fp16."""
    return _lower(x, (values, metadata, columns), Spec(v, n, m), in_features, out_features, activation)


def _lower(
    x: Any, arrays: tuple[Any, ...], spec: Spec, in_features: int, out_features: int, activation: str | None
) -> Any:
    if x.get_dtype() not in _DTYPES or arrays[0].get_dtype() != x.get_dtype():
        return None
    *leading, _ = x.get_size()
    inputs = readable([reshape(x, [prod(leading), in_features]), *arrays])
    layout = matrix_layout(inputs[0], out_features)
    template = SparseLinearTemplate(inputs, layout, spec, in_features, out_features, cpu_threads(), activation)
    return reshape(choose(template, inputs, layout), [*leading, out_features])
