"""Graphs within the graph: what checkpointing, nested_compile_region, cond and the like run as ops of higher order.

Where no gradient is recorded, a checkpointed block or a nested region means the same without its wrapper, so it is
written out before anything else (`flatten`). What stays a graph of its own runs dense, and says why.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from vnm_compile._torch import HigherOrderOperator, tree_leaves
from vnm_compile.passes.effects import INLINED, attribute, subgraphs
from vnm_compile.passes.regions import modes

_OPERANDS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "tag_activation_checkpoint": lambda args: args[1:],
    "wrap": lambda args: args[1:],
    "wrap_activation_checkpoint": lambda args: args[1:],
    "invoke_subgraph": lambda args: args[2:],
    "autograd_function_apply": lambda args: args[2:],
    "cond": lambda args: args[3],
    "while_loop": lambda args: (args[2], args[3]),
    "map_impl": lambda args: (args[1], args[2]),
}
"""What of a higher-order op's arguments its graphs are given, by the op's name."""

_WRITTEN_OUT = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "invoke_subgraph")
_REASONS = {
    "tag_activation_checkpoint": "inside activation checkpointing, which with gradients on is a graph of its own",
    "invoke_subgraph": "inside nested_compile_region, which with gradients on is a graph of its own",
    "autograd_function_apply": "inside a torch.autograd.Function, whose backward is its own",
    "cond": "inside torch.cond, whose branches are graphs of their own",
    "while_loop": "inside while_loop, whose body is a graph of its own",
    "map_impl": "inside torch's map, whose body is a graph of its own",
}


@dataclass(frozen=True)
class Body:
    """A graph that a higher-order op runs.

    Attributes:
        module: the graph.
        operands: what its placeholders stand for, nodes of the outer graph; None where that is not known.
    """

    module: fx.GraphModule
    operands: list[fx.Node | None]


def bodies(node: fx.Node) -> Iterator[Body]:
    """The graphs that a node runs, if it is a higher-order op."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return
    take = _OPERANDS.get(_name(node))
    leaves = tree_leaves(take(node.args) if take else (), is_leaf=lambda each: isinstance(each, fx.Node))
    operands: list[fx.Node | None] = [leaf if isinstance(leaf, fx.Node) else None for leaf in leaves]
    for module in subgraphs(node):
        count = len(module.graph.find_nodes(op="placeholder"))
        yield Body(module, operands if len(operands) == count else [None] * count)


def why_not_rewritten(node: fx.Node) -> str:
    """Why what a higher-order op runs stays dense."""
    return _REASONS.get(_name(node), f"inside {_name(node)}, a graph of its own")


def flatten(gm: fx.GraphModule) -> fx.GraphModule:
    """Return `gm` with checkpointed blocks and nested regions written out where no gradient is recorded.

    `gm` itself is returned where there are none, and is never changed.
    """
    while any(_can_be_written_out(node, mode.grad) for node, mode in modes(gm.graph).items()):
        gm = _written_out(gm)
    return gm


def _can_be_written_out(node: fx.Node, grad: bool) -> bool:
    if grad or node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return False
    found = list(bodies(node))
    return _name(node) in _WRITTEN_OUT and len(found) == 1 and None not in found[0].operands


def _written_out(gm: fx.GraphModule) -> fx.GraphModule:
    mode = modes(gm.graph)
    graph = fx.Graph()
    attributes: dict[str, Any] = {}
    new: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if _can_be_written_out(node, mode[node].grad):
            (body,) = bodies(node)
            new[node] = _insert(graph, body, new, attributes)
        elif node.target is operator.getitem and isinstance(new.get(node.args[0]), tuple | list):
            new[node] = new[node.args[0]][node.args[1]]
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], new.__getitem__))
        elif node.op != "get_attr" or not all(_can_be_written_out(user, mode[user].grad) for user in node.users):
            new[node] = _copied(graph, node, new, gm, attributes)
    return with_graph(gm, graph, attributes)


def _insert(graph: fx.Graph, body: Body, new: dict[fx.Node, Any], attributes: dict[str, Any]) -> Any:
    """Copy the nodes of a body to the end of a graph; returns what it returns."""
    inner: dict[fx.Node, Any] = {}
    operands = iter(body.operands)
    for node in body.module.graph.nodes:
        if node.op == "placeholder":
            inner[node] = new[next(operands)]  # type: ignore[index]
        elif node.op == "output":
            return fx.map_arg(node.args[0], inner.__getitem__)
        else:
            inner[node] = _copied(graph, node, inner, body.module, attributes)
            inner[node].meta[INLINED] = True
    raise AssertionError("a graph ends in an output")


def _copied(
    graph: fx.Graph, node: fx.Node, new: dict[fx.Node, Any], owner: fx.GraphModule, attributes: dict[str, Any]
) -> fx.Node:
    copied = graph.node_copy(node, new.__getitem__)
    if hasattr(node, "_dynamo_source"):
        copied._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    if node.op == "get_attr":
        value = attribute(owner, str(node.target))
        name = str(node.target)
        while attributes.setdefault(name, value) is not value:
            name += "_"
        copied.target = name
    return copied


def with_graph(gm: fx.GraphModule, graph: fx.Graph, attributes: dict[str, Any] | None = None) -> fx.GraphModule:
    """A module like `gm` with another graph, whose attributes are those of `gm` unless they are given."""
    graph.lint()
    result = fx.GraphModule(gm if attributes is None else attributes, graph, class_name=gm.__class__.__name__)
    result.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        result._param_name_to_source = gm._param_name_to_source  # type: ignore[assignment]
    return result


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))
