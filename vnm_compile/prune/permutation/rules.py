"""What each operation of an exported graph does to channel axes.

A rule takes the layouts of an operation's operands, makes the axes that meet in it one, and gives the layout of the
result. An operation without a rule fixes the order of every axis that reaches it: an order is free only where all that
happens to it is understood.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vnm_compile._torch import tree_leaves
from vnm_compile.prune.permutation.orders import (
    Digit,
    Dim,
    Layout,
    fixed,
    is_open,
    pin,
    pin_incomplete,
    recut,
    resolve,
    size_of,
    unify,
)

aten = torch.ops.aten
Layouts = dict[fx.Node, Layout]
Rule = Callable[["Step"], Layout]


class Step:
    """One node of the graph, with the layouts known so far."""

    def __init__(self, node: fx.Node, layouts: Layouts) -> None:
        self.node = node
        self.layouts = layouts
        self.args = node.args

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return shape_of(self.node)

    @property
    def why(self) -> str:
        """What to say of an axis that this node pins."""
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        where = f" in {stack[-1][0]}" if stack and stack[-1][0] else ""
        return f"{getattr(self.node.target, '__name__', self.node.target)}{where} depends on it"

    def layout(self, index: int | str, default: Any = None) -> Layout:
        """The layout of a tensor argument."""
        return self.of(self.argument(index, default))

    def of(self, node: Any) -> Layout:
        """The layout of a node."""
        return self.layouts[node] if node in self.layouts else fixed(shape_of(node))

    def argument(self, index: int | str, default: Any = None) -> Any:
        """An argument by position, or by its name in the operation's schema."""
        schema = self.node.target._schema.arguments  # type: ignore[union-attr]
        names = [argument.name for argument in schema]
        if isinstance(index, str) and index not in names:
            return default
        position = names.index(index) if isinstance(index, str) else index
        if position < len(self.args):
            return self.args[position]
        return self.node.kwargs.get(names[position], default)

    def tensors(self) -> list[fx.Node]:
        """Every tensor among the arguments."""
        flat = tree_leaves((self.node.args, self.node.kwargs))
        return [x for x in flat if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor)]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value; () where it is no tensor."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def apply_rule(node: fx.Node, layouts: Layouts) -> None:
    """Enter the layout of a node's result; axes are joined or pinned on the way."""
    step = Step(node, layouts)
    value = node.meta.get("val")
    if value is None or node.target is operator.getitem:
        return  # an assertion, or one of several results, which are of fixed order
    rule = _rule_of(node.target)
    if rule is not None and isinstance(value, Tensor):
        layouts[node] = rule(step)
        assert tuple(map(size_of, layouts[node])) == step.shape, f"{node.target}: {layouts[node]} is not {step.shape}"
        return
    for operand in tree_leaves((node.args, node.kwargs)):
        if operand in layouts:
            pin(layouts[operand], step.why)


def _rule_of(target: Any) -> Rule | None:
    packet = getattr(target, "overloadpacket", None)
    if packet in RULES:
        return RULES[packet]
    return _pointwise if torch.Tag.pointwise in getattr(target, "tags", ()) else None


def _combine(shape: Sequence[int], operands: Sequence[Layout], why: str) -> Layout:
    """Operands that are broadcast against each other: their orders become one; the layout of the result."""
    padded = [fixed((1,) * (len(shape) - len(layout))) + layout for layout in operands]
    for i, one in enumerate(padded):
        for other in padded[i + 1 :]:
            unify(list(zip(one, other, strict=True)), why)
    # Operands that carry free orders come first: the result must keep every digit of what they carry.
    padded.sort(key=is_open, reverse=True)
    dims: list[Dim] = []
    for i, size in enumerate(shape):
        fitting = [resolve(layout[i]) for layout in padded if size_of(layout[i]) == size]
        named = [dim for dim in fitting if any(digit.axis is not None for digit in dim)]
        dims.append((named or fitting or [(Digit(size),)])[0])
    return tuple(dims)


def _pointwise(step: Step) -> Layout:
    return _combine(step.shape, [step.of(node) for node in step.tensors()], step.why)


def _same(step: Step) -> Layout:
    return step.layout(0)


def _softmax(step: Step) -> Layout:
    """Of any order, unless it is over blocks, and so compares channels of one place in each."""
    layout = step.layout(0)
    dim = step.argument("dim") % len(layout)
    pin_incomplete(layout[:dim] + layout[dim + 1 :], step.why)
    return layout


def _view(step: Step) -> Layout:
    return recut(step.layout(0), step.shape, step.why)


def _transpose(step: Step) -> Layout:
    dims = list(step.layout(0))
    if len(dims) > 1:
        i, j = step.argument(1, 0), step.argument(2, 1)
        dims[i], dims[j] = dims[j], dims[i]
    return tuple(dims)


def _permute(step: Step) -> Layout:
    layout = step.layout(0)
    return tuple(layout[i] for i in step.argument(1))


def _expand(step: Step) -> Layout:
    return _combine(step.shape, [step.layout(0)], step.why)


def _reduce(step: Step) -> Layout:
    layout = step.layout(0)
    dims = step.argument("dim")
    dims = range(len(layout)) if dims is None or dims == [] else dims
    reduced = {d % len(layout) for d in ([dims] if isinstance(dims, int) else dims)}
    if step.argument("keepdim", False):
        return tuple((Digit(1),) if i in reduced else dim for i, dim in enumerate(layout))
    return tuple(dim for i, dim in enumerate(layout) if i not in reduced)


def _take_part(step: Step) -> Layout:
    """Slices and the like: of a dimension of fixed order only."""
    layout = step.layout(0)
    changed = step.argument("dim", 0) % len(layout)
    if step.shape == shape_of(step.args[0]):  # type: ignore[arg-type]
        return layout  # x[:], and the whole of it in the same order
    pin((layout[changed],), step.why)
    kept = [dim for i, dim in enumerate(layout) if i != changed]
    if len(step.shape) == len(layout):
        kept.insert(changed, (Digit(step.shape[changed]),))
    return tuple(kept)


def _cat(step: Step) -> Layout:
    layouts = [step.of(node) for node in step.argument(0)]
    changed = step.argument("dim", 0) % len(step.shape)
    pin([layout[changed] for layout in layouts], step.why)
    others = [(*layout[:changed], (Digit(1),), *layout[changed + 1 :]) for layout in layouts]
    shape = [1 if i == changed else size for i, size in enumerate(step.shape)]
    combined = _combine(shape, others, step.why)
    return (*combined[:changed], (Digit(step.shape[changed]),), *combined[changed + 1 :])


def _linear(step: Step) -> Layout:
    x, weight, bias = step.layout(0), step.layout(1), step.argument(2)
    return _affine(step, x, weight[1], weight[0], bias)


def _addmm(step: Step) -> Layout:
    x, weight, bias = step.layout(1), step.layout(2), step.argument(0)
    return _affine(step, x, weight[0], weight[1], bias)


def _affine(step: Step, x: Layout, inner: Dim, outer: Dim, bias: fx.Node | None) -> Layout:
    unify([(x[-1], inner)], step.why)
    result = (*x[:-1], outer)
    return _combine(step.shape, [result] if bias is None else [result, step.of(bias)], step.why)


def _matmul(step: Step) -> Layout:
    a, b = step.layout(0), step.layout(1)
    if len(a) < 2 or len(b) < 2:
        pin(a + b, step.why)
        return fixed(step.shape)
    unify([(a[-1], b[-2]), *_batch_pairs(a, b)], step.why)
    batch = _combine(step.shape[:-2], [a[:-2], b[:-2]], step.why)
    # The batch dimensions of the operand whose free order goes on are those that must go with it.
    first = b if is_open(b[-1:]) else a
    own = fixed((1,) * (len(batch) - len(first[:-2]))) + first[:-2]
    batch = tuple(mine if size_of(mine) == size_of(dim) else dim for mine, dim in zip(own, batch, strict=True))
    return (*batch, a[-2], b[-1])


def _batch_pairs(a: Layout, b: Layout) -> list[tuple[Dim, Dim]]:
    return list(zip(a[-3::-1], b[-3::-1], strict=False))


def _attention(step: Step) -> Layout:
    q, k, v = step.layout(0), step.layout(1), step.layout(2)
    mask = step.argument("attn_mask")
    if mask is not None:
        pin(step.of(mask), step.why)
    pin((q[-2],), step.why)
    for summed in (q[:-1], k[:-1], k[:-2]):  # by the products, and by softmax
        pin_incomplete(summed, step.why)
    unify([(q[-1], k[-1]), *_batch_pairs(q, k)], step.why)
    unify([(k[-2], v[-2]), *_batch_pairs(k, v)], step.why)
    batch = []
    for size, dim in zip(step.shape[:-2], v[:-2], strict=True):
        repeated = size // size_of(dim)  # grouped queries: each value head serves `repeated` neighbours
        batch.append((*resolve(dim), Digit(repeated)) if repeated > 1 else dim)
    return (*batch, q[-2], v[-1])


def _norm(step: Step) -> Layout:
    x = step.layout(0)
    pin_incomplete(x[: -len(step.argument("normalized_shape"))], step.why)
    for name in ("weight", "bias"):
        parameter = step.argument(name)
        if parameter is not None:
            own = step.of(parameter)
            unify(list(zip(x[-len(own) :], own, strict=True)), step.why)
    return x


def _embedding(step: Step) -> Layout:
    weight, index = step.layout(0), step.layout(1)
    pin((weight[0], *index), step.why)
    return (*index, weight[1])


def _convolution(step: Step) -> Layout:
    x, weight, bias = step.layout(0), step.layout(1), step.argument("bias")
    pin((*x, *weight[1:]), step.why)
    if step.argument("groups", 1) != 1 or step.argument("transposed", False) or len(x) != len(weight):
        pin(weight, step.why)
        return fixed(step.shape)
    if bias is not None:
        unify([(weight[0], step.of(bias)[0])], step.why)
    result = list(fixed(step.shape))
    result[1] = weight[0]
    return tuple(result)


def _of(rule: Rule, *names: str) -> dict[Any, Rule]:
    """The rule for those of the named operations that this torch has."""
    return {getattr(aten, name): rule for name in names if hasattr(aten, name)}


RULES: dict[Any, Rule] = {
    **_of(_same, "clone", "contiguous", "detach", "alias", "dropout", "_to_copy", "to", "lift_fresh_copy", "type_as"),
    **_of(_softmax, "softmax", "_softmax", "log_softmax", "_log_softmax"),
    **_of(_view, "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
    **_of(_transpose, "transpose", "t", "swapaxes"),
    **_of(_permute, "permute"),
    **_of(_expand, "expand"),
    **_of(_reduce, "mean", "sum", "amax", "amin", "var", "std"),
    **_of(_take_part, "slice", "select", "narrow"),
    **_of(_cat, "cat", "concat"),
    **_of(_linear, "linear"),
    **_of(_addmm, "addmm"),
    **_of(_matmul, "matmul", "mm", "bmm"),
    **_of(_attention, "scaled_dot_product_attention"),
    **_of(_norm, "layer_norm", "rms_norm"),
    **_of(_embedding, "embedding"),
    **_of(_convolution, "conv1d", "conv2d", "conv3d", "convolution"),
}
