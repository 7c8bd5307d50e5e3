"""What lowerings are written with: layouts, copies, views and choices of Inductor's nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch._inductor import config as inductor_config
from torch._inductor import ir, lowering
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.select_algorithm import TritonTemplate, autotune_select_algorithm
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.functions import FloorDiv

__all__ = [
    "TritonTemplate",
    "V",
    "apply",
    "apply_function",
    "choose",
    "choose_fastest",
    "contiguous_copy",
    "copy_strided",
    "graph_has",
    "ir",
    "is_number",
    "known_equal",
    "layout_of",
    "matrix_layout",
    "readable",
    "realized",
    "reshape",
    "round_up",
    "run_choice",
    "size_hint",
    "tunes_exhaustively",
    "with_these_strides",
]


def readable(nodes: Sequence[Any]) -> list[Any]:
    """Each node as a buffer, or a view of one, that a kernel may read through a pointer to its first element.

    The first is a matrix: its rows are dense, and as far apart as its stride says. The others are contiguous. What lies
    otherwise is copied, and so is a view in another dtype, and the second view of one buffer: a kernel knows its inputs
    by the names of their buffers. A view may start anywhere in its buffer.
    """
    results: list[Any] = []
    for node in nodes:
        node = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node))
        size, stride = node.get_size(), node.get_stride()
        dims = range(len(size) if results else 1, 0, -1)
        expected = ir.FlexibleLayout.contiguous_strides(size)
        dense = all(known_equal(size[-i], 1) or known_equal(stride[-i], expected[-i]) for i in dims)
        taken = any(node.get_name() == other.get_name() for other in results)
        if not dense or taken or V.graph.get_dtype(node.get_name()) != node.get_dtype():
            node = contiguous_copy(node)
        results.append(node)
    return results


def known_equal(one: Any, other: Any) -> bool:
    """Whether two sizes or strides are equal whatever the symbols in them stand for; never adds a guard."""
    return V.graph.sizevars.statically_known_equals(one, other)


def matrix_layout(matrix: Any, columns: int) -> Any:
    """The layout of a contiguous result with the rows, dtype and device of `matrix`."""
    return ir.FixedLayout(matrix.get_device(), matrix.get_dtype(), [matrix.get_size()[0], columns])


def reshape(node: Any, size: Sequence[Any]) -> Any:
    """A view of an IR node in another size."""
    return apply(torch.ops.aten.view.default, node, list(size))


def choose(template: Any, inputs: list[Any], layout: Any) -> Any:
    """The node of a template that needs no choice between configurations."""
    choices: list[Any] = []
    with _hints_for_all_sizes():
        error = template.maybe_append_choice(choices)
    if error is not None:
        raise error
    return choose_fastest(template.name, choices, inputs, layout)


@contextmanager
def _hints_for_all_sizes() -> Iterator[None]:
    """torch before 2.13 asks a C++ template for hints even of sizes that only a call tells, and fails without; they are
    for timing it, which is not done."""
    sizes = V.graph.sizevars
    if not hasattr(sizes, "size_hints"):
        yield
        return
    sizes.size_hints = functools.partial(sizes.size_hints, fallback=inductor_config.unbacked_symint_fallback)
    try:
        yield
    finally:
        del sizes.size_hints


def choose_fastest(
    name: str,
    choices: list[Any],
    inputs: list[Any],
    layout: Any,
    make_inputs: dict[int, Callable[[Any], Any]] | None = None,
) -> Any:
    """The node of whichever choice Inductor measures to be fastest, on random inputs or what `make_inputs` makes."""
    with _own_origins():
        result = autotune_select_algorithm(name, choices, inputs, layout, input_gen_fns=make_inputs)
    return result[0] if isinstance(result, tuple) else result  # a pair from torch 2.13 on


def _own_origins() -> Any:
    """Have new nodes name the op being lowered only: what computes its inputs may not have a buffer yet, and would be
    named too, but is no part of them."""
    return patch.object(ir.IRNode, "_current_origins", OrderedSet([V.graph.current_node]))


def is_number(size: Any) -> bool:
    """Whether a size is no symbol."""
    return isinstance(size, int | sympy.Integer)


def size_hint(size: Any) -> int:
    """A size as a number; of a symbolic one the value it was traced with, without a guard."""
    if is_number(size):
        return int(size)
    return int(V.graph.sizevars.optimization_hint(size))


def round_up(size: Any, step: int) -> Any:
    """The next multiple of `step`, in integers also where the size is symbolic."""
    return FloorDiv(size + step - 1, step) * step


def layout_of(like: Any, size: Sequence[Any], dtype: torch.dtype | None = None) -> Any:
    """A contiguous layout on the device of `like`."""
    return ir.FixedLayout(like.get_device(), dtype or like.get_dtype(), list(size))


def copy_strided(node: Any, stride: Sequence[Any], allocated: Sequence[Any]) -> Any:
    """A copy of a matrix with given strides, in memory for a matrix of the size `allocated`.

    It is an ordinary pointwise kernel, so Inductor fuses it with what computes the matrix where it can.
    """
    layout = ir.FixedLayout(node.get_device(), node.get_dtype(), node.get_size(), list(stride))
    data = ir.Pointwise(
        device=node.get_device(), dtype=node.get_dtype(), inner_fn=node.make_loader(), ranges=node.get_size()
    )
    buffer = ir.ComputedBuffer(name=None, layout=layout, data=data)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
    V.graph.buffer_to_padded_size[buffer.name] = list(allocated)
    return ir.TensorBox(ir.StorageBox(buffer))


def realized(node: Any) -> Any:
    """The node with a buffer of its own, in the layout that it happens to have."""
    return ir.ExternKernel.realize_input(node)


def with_these_strides(node: Any) -> Any:
    """The node with a buffer of its own, whose strides stay what they are: Inductor pads those of what it computes,
    from rows of 1024 elements on, after lowering it, and a kernel has been told of them by then."""
    node = realized(node)
    buffer = node
    while isinstance(buffer, ir.MutableBox):
        buffer = buffer.data
    if isinstance(buffer, ir.Buffer) and isinstance(buffer.get_layout(), ir.FlexibleLayout):
        buffer.freeze_layout_with_exact_strides(buffer.get_stride())
    return node


def contiguous_copy(node: Any) -> Any:
    """A copy without gaps."""
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.copy_input(node))


def graph_has(*packets: Any) -> bool:
    """Whether any of some ops, in whatever overload, is in the graph that is being lowered."""
    return any(getattr(node.target, "overloadpacket", None) in packets for node in V.graph.graph.nodes)


def run_choice(choice: Any, inputs: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Run a choice on tensors, as it is run to be measured."""
    choice.benchmark(*inputs, out=out)


def tunes_exhaustively() -> bool:
    """Whether the user asked for the slow search (mode="max-autotune")."""
    return bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)


def apply(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Lower an aten op: what a lowering makes of its own results (sums, casts, activations) and Inductor fuses."""
    with _own_origins():
        return lowering.lowerings[op](*args, **kwargs)


def apply_function(function: Callable[[torch.Tensor], torch.Tensor], x: Any) -> Any:
    """Lower an eager function of one tensor, element by element: the ops that it consists of, as Inductor sees them."""
    values: dict[torch.fx.Node, Any] = {}
    graph = _elementwise_graph(function)
    for node in graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        if node.op == "output":
            return args[0]
        values[node] = x if node.op == "placeholder" else apply(node.target, *args, **kwargs)
    raise AssertionError("a graph has an output")


@functools.cache
def _elementwise_graph(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.fx.Graph:
    with _disable_current_modes(), torch.no_grad():
        trace = make_fx(lambda x: function(x), decomposition_table=select_decomp_table())  # with no other arguments
        return trace(torch.zeros(2, 2)).graph
