"""Lowering of `vnm::sections`: views of the joined output, but tensors of their own for what a caller sees."""

from __future__ import annotations

import operator

import torch
from sympy import Expr, Integer
from torch._inductor import lowering
from torch._inductor.virtualized import V

from vnm_compile import ops  # noqa: F401  (defines the op)

_PASSING_ON = {
    torch.ops.aten._unsafe_view,
    torch.ops.aten.reshape,
    torch.ops.aten.clone,
    torch.ops.aten._to_copy,
    torch.ops.prims.convert_element_type,
    torch.ops.aten.constant_pad_nd,
    torch.ops.aten.repeat,
    torch.ops.aten.cat,
}
"""Ops whose schema promises a new tensor, but which Inductor may answer with their input, or a view of it."""


@lowering.register_lowering(torch.ops.vnm.sections.default, type_promotion_kind=None)
def _lower_sections(y, widths, strides):  # type: ignore[no-untyped-def]
    """The kernel that makes y writes every section in place: inside the graph nobody minds that it is strided. What is
    added to a product is added there: the readers of the sections, several, would each add it to rounded products.

    A caller would: he may count on the strides that eager gives, and would keep all of y alive with one section. So
    would a backward in dynamic shapes: AOTAutograd tells it strides of what is saved for it in the numbers of one call.
    """
    y.realize()
    dynamic = any(isinstance(size, Expr) and not isinstance(size, Integer) for size in y.get_size())
    cut, last = lowering.lowerings[torch.ops.aten.slice.Tensor], len(y.get_size()) - 1
    copy = lowering.lowerings[torch.ops.aten.clone.default]
    readers = {user.args[1]: user for user in V.graph.current_node.users if user.target is operator.getitem}
    sections, start = [], 0
    for i, (width, stride) in enumerate(zip(widths, strides, strict=True)):
        section = cut(y, last, start, start + width)
        seen = i in readers and _is_seen(readers[i], dynamic)
        sections.append(copy(section, memory_format=torch.contiguous_format) if seen else section)
        start += stride
    return sections


def _is_seen(node: torch.fx.Node, dynamic: bool) -> bool:
    """Whether the memory of a node may be an output that a caller sees, or is read by its strides (`as_strided`). In
    dynamic shapes what is saved for a backward counts, too."""
    (output,) = V.graph.graph.find_nodes(op="output")
    visible = None if dynamic else output.meta.get("user_visible_output_idxs")
    results = output.args[0] if isinstance(output.args[0], list | tuple) else output.args
    outputs = {result for i, result in enumerate(results) if visible is None or i in visible}
    queue, met = [node], {node}
    while queue:
        current = queue.pop()
        if current in outputs or "as_strided" in str(current.target):
            return True
        users = [user for user in current.users if user not in met and _passes_on(user)]
        queue += users
        met |= set(users)
    return False


def _passes_on(node: torch.fx.Node) -> bool:
    """Whether the result of a node may share memory with what it reads."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    aliases = any(argument.alias_info is not None for argument in node.target._schema.arguments)
    return aliases or node.target.overloadpacket in _PASSING_ON
