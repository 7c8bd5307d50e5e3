"""Which computations a C++ template of ours may take in, and how they join its tiles.

A template computes its result `[T, O]` tile by tile, and what is fused into it runs on a tile before that is written.
Every node that is fused is then stored at the place of the tile, and reads what the kernel has computed so far (the
result, or an earlier node) from there, *whatever its index says*. So each of them has to read these at the very
address that it writes to. Inductor checks this for the result only; the rest is checked here, for our templates alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch._inductor.lowering  # noqa: F401  (first: the template modules import each other through it)
from torch._inductor import ir
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.dependencies import MemoryDep

from vnm_compile.codegen.inductor.nodes import known_equal


class FusingTemplate(CppTemplate):
    """A C++ template whose epilogues are checked by `fits`."""


def fits(result: Any, nodes: Sequence[Any]) -> bool:
    """Whether scheduler nodes may be the epilogue of the template buffer `result`, all of them together."""
    computed = {result.get_name(), *(node.node.get_name() for node in nodes if node.node is not None)}
    return all(_fits(result, node, computed) for node in nodes)


def _fits(result: Any, scheduled: Any, computed: set[str]) -> bool:
    """Whether one node writes a dense tensor of the result's size, and reads what was `computed` where it writes.

    Not a node that writes elsewhere than into a buffer of its own: into an input, which other tiles have yet to read,
    or a part of a concatenation. Nor one with a masked part (of a padding, or of a write to a slice): it is generated
    apart, and would look for the result in memory.
    """
    node = scheduled.node
    if not isinstance(node, ir.ComputedBuffer) or not isinstance(node.data, ir.Pointwise):
        return False
    if isinstance(node.data, ir.Scatter) or not isinstance(node.layout, ir.FixedLayout) or node.get_mutation_names():
        return False
    if _order(node) is None or not known_equal(node.get_numel(), result.get_numel()):
        return False
    if getattr(scheduled._body, "subblocks", None):
        return False
    accesses = node.get_read_writes()
    writes = list(accesses.writes)
    if len(writes) != 1 or not isinstance(writes[0], MemoryDep):
        return False
    reads = [read for read in accesses.reads if read.name in computed]
    return all(isinstance(read, MemoryDep) and read.index == writes[0].index for read in reads)


def _order(node: Any) -> list[int] | None:
    """The dimensions by decreasing stride, if these are the strides of a dense tensor at the start of its buffer."""
    size, stride = node.get_size(), node.get_stride()
    if not size or not known_equal(node.get_layout().offset, 0):
        return None
    # Dimensions of size 1 may have any stride; in front they are in nobody's way.
    order = [i for i in range(len(size)) if known_equal(size[i], 1)]
    rest, expected = [i for i in range(len(size)) if i not in order], 1
    inner: list[int] = []
    while rest:
        i = next((i for i in reversed(rest) if known_equal(stride[i], expected)), None)
        if i is None:
            return None
        rest.remove(i)
        inner.insert(0, i)
        expected *= size[i]
    return order + inner


def view_in_2d(target: Any, result: Any) -> Any:
    """A dense buffer of any shape, which the kernel writes in the end, seen as the 2-D result of the template."""
    if list(target.get_size()) == list(result.get_size()) and list(target.get_stride()) == list(result.get_stride()):
        return target
    return ir.ReinterpretView(data=ir.StorageBox(target), layout=result.get_layout())


def reindexer(node: Any, result: Any) -> Callable[[Sequence[Any]], list[Any]] | None:
    """How the indices of an epilogue node follow from those of the 2-D result; None where they are the same."""
    if view_in_2d(node, result) is node:
        return None
    order = _order(node)
    assert order is not None, f"{node.get_name()} is no dense tensor"
    reshape: Any = ir.View.dynamic_reshape_indexer([node.get_size()[i] for i in order], list(result.get_size()))

    def reindex(index: Sequence[Any]) -> list[Any]:
        ordered = reshape(index)
        return [ordered[order.index(i)] for i in range(len(order))]

    return reindex


def _check_epilogues() -> None:
    """Have Inductor's C++ scheduling ask `fits` before it fuses anything into a template of ours."""
    original = CppScheduling.can_fuse_vertical

    @functools.wraps(original)
    def can_fuse_vertical(self: Any, node1: Any, node2: Any) -> bool:
        if not original(self, node1, node2):
            return False
        result = node1.get_template_node() if node1.is_template() else None
        if not isinstance(getattr(result, "template", None), FusingTemplate):
            return True
        return fits(result, [node for node in (*node1.get_nodes(), *node2.get_nodes()) if node.node is not result])

    CppScheduling.can_fuse_vertical = can_fuse_vertical  # type: ignore[method-assign]


_check_epilogues()
