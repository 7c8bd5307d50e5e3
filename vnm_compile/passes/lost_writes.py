"""Writes into views of compressed weights: they would be lost, so they are refused, as in eager mode.

A view of a compressed weight is made of a dense copy. In eager mode it is read-only (`vnm_compile.read_only`); in a
graph nothing of that is left, so the graph is looked at, and what it returns is made read-only again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from vnm_compile.passes.effects import Effects
from vnm_compile.passes.find import op_name, weight_name
from vnm_compile.read_only import ReadOnly, view_write_refused
from vnm_compile.tensor import VNMTensor, write_refused


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
    views = effects.views_of(compressed)
    for writer, written in effects.writes:
        if written in views:
            weight = views[written]
            raise write_refused(f"{weight_name(weight)}: {op_name(writer)}", compressed[weight])
        if any(effects.share(written, given) for given in read_only):
            raise view_write_refused(op_name(writer))
    (results,) = graph.output_node().args
    several = results if isinstance(results, tuple | list) else (results,)
    return tuple(i for i, result in enumerate(several) if result in views and result not in compressed)


def read_only_results(call: Callable[..., Any], positions: Sequence[int]) -> Callable[..., Any]:
    """`call` with the results at these positions read-only."""
    if not positions:
        return call

    def run(*args: Any) -> Any:
        results = list(call(*args))
        for i in positions:
            results[i] = ReadOnly.of(results[i])
        return tuple(results)

    return run
