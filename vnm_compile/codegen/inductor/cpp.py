"""What C++ templates are written with."""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.lowering  # first: the template modules import each other through it
from torch._inductor import ir
from torch._inductor.codegen.cpp_gemm_template import get_export_declaration
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel, parse_expr_with_index_symbols
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import ops as inner_ops

__all__ = [
    "CppTemplateKernel",
    "cpu_threads",
    "export_declaration",
    "fake_buffer",
    "local_buffer",
    "store_copy",
]


def cpu_threads() -> int:
    """Threads that a generated C++ kernel uses, as Inductor's own do."""
    return parallel_num_threads()


def export_declaration() -> str:
    """What makes a C++ function visible to Inductor's loader."""
    return get_export_declaration()


def fake_buffer(name: str, layout: Any) -> Any:
    """A buffer that exists only inside a template."""
    return ir.Buffer(name=name, layout=layout)


def local_buffer(kernel: CppTemplateKernel, name: str, sizes: list[Any], dtype: torch.dtype) -> Any:
    """A buffer that the template's code allocates under `name`; sizes may be names of its C++ variables."""
    layout = ir.FixedLayout(torch.device("cpu"), dtype, parse_expr_with_index_symbols(sizes))
    kernel.local_buffers[name] = ir.Buffer(name=name, layout=layout)
    return kernel.local_buffers[name]


def store_copy(name: str, source: Any) -> Any:
    """A computed buffer `name` that copies `source`, converted to its dtype."""
    load, dtype = source.make_loader(), source.get_dtype()
    data = ir.Pointwise(
        device=source.get_device(),
        dtype=dtype,
        inner_fn=lambda index: inner_ops.to_dtype(load(index), dtype),
        ranges=source.get_size(),
    )
    return ir.ComputedBuffer(name=name, layout=source.layout, data=data)
