"""What Triton kernels may take for granted of addresses and indices, and how they round."""

from __future__ import annotations

from typing import Any

import sympy
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V

from vnm_compile.codegen.inductor.nodes import round_up, with_these_strides


def rows_in_place(node: Any, alignment: int, padded: bool = False) -> Any:
    """The node with a buffer that begins at a multiple of `alignment` bytes and holds row after row without gaps, or,
    where `padded`, each row rounded up to `alignment`. What lies otherwise (a view of something larger) is copied:
    kernels read words wider than an element. A row is what lies behind the first dimension."""
    node = with_these_strides(node)
    itemsize = node.get_dtype().itemsize
    (rows, *size), (step, *stride) = node.get_size(), node.get_stride()
    known = V.graph.sizevars
    width = sympy_product(size)
    in_row = all(
        size[i] == 1 or known.statically_known_equals(each, sympy_product(size[i + 1 :]))
        for i, each in enumerate(stride)
    )
    steps = [width, round_up(width, alignment // itemsize)] if padded else [width]
    apart = rows == 1 or any(known.statically_known_equals(step, each) for each in steps)
    aligned = known.statically_known_multiple_of(node.get_layout().offset * itemsize, alignment)
    if in_row and apart and aligned and node.get_name() not in V.graph.unaligned_buffers:
        return node
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.copy_input(node))


def fits_32_bits(*sizes: Any) -> bool:
    """Whether all of `sizes` are below 2^31; where one is symbolic and its hint is, guards see to it."""
    return all(TritonScheduling.can_use_32bit_indexing(size, ()) for size in map(sympy.sympify, sizes))


def fuses_multiply_add() -> bool:
    """Whether generated Triton code may round a multiplication and an addition once: as in Inductor's own kernels."""
    return not inductor_config.emulate_precision_casts
