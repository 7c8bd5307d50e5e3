"""Writes into views of compressed weights: they would be lost, so they are refused, as in eager mode.

A view of a compressed weight is made of a dense copy. In eager mode it is read-only (`vnm_compile.read_only`). In a
graph nothing is left of that but a note of the memory that tracing gave to the copy: what the graph writes to is
compared with it, and what lies in it and is returned becomes read-only again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from torch import fx

from vnm_compile.passes.effects import Effects
from vnm_compile.passes.find import op_name, weight_name
from vnm_compile.read_only import ReadOnly, is_traced_view, view_write_refused
from vnm_compile.tensor import VNMTensor


def refuse_lost_writes(graph: fx.Graph, inputs: Sequence[Any]) -> tuple[int, ...]:
    """Return the positions of those results of `graph` that are views of compressed weights.

    Raises:
        VNMError: the graph writes into such a view, its own or one that it is given.
    """
    placeholders = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=False))
    compressed = {node: value for node, value in placeholders.items() if isinstance(value, VNMTensor)}
    read_only = [node for node, value in placeholders.items() if isinstance(value, ReadOnly)]
    if not compressed and not read_only:
        return ()
    effects = Effects(graph, inputs)
    views = [node for node in graph.nodes if is_traced_view(node.meta.get("example_value"))]
    for writer, written in effects.writes:
        if any(effects.share(written, view) for view in views):
            weight = _weight_above(written, compressed)
            name = "" if weight is None else f"{weight_name(weight)}: "
            raise view_write_refused(f"{name}{op_name(writer)}")
        if any(effects.share(written, given) for given in read_only):
            raise view_write_refused(op_name(writer))
    (results,) = graph.output_node().args
    several = results if isinstance(results, tuple | list) else (results,)
    is_view = [isinstance(each, fx.Node) and any(effects.share(each, view) for view in views) for each in several]
    return tuple(i for i, view in enumerate(is_view) if view)


def _weight_above(node: fx.Node, compressed: Container[fx.Node]) -> fx.Node | None:
    """The first compressed weight that a node is made from."""
    while node not in compressed and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node if node in compressed else None


def read_only_results(call: Callable[..., Any], positions: Sequence[int]) -> Callable[..., Any]:
    """`call` with the results at these positions read-only."""
    if not positions:
        return call

    def run(*args: Any) -> Any:
        results = list(call(*args))
        for i in positions:
            results[i] = ReadOnly.keeping_grad(results[i])
        return tuple(results)

    return run
