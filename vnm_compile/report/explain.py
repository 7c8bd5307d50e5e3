"""`vnm.explain`: run the passes as the backend would, and say layer by layer what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from vnm_compile.annotate import Layer, annotation_of, linear_layers
from vnm_compile.backend import Prepared, prepare
from vnm_compile.options import split_options
from vnm_compile.passes import Decision
from vnm_compile.report.cost import CostModel
from vnm_compile.report.explanation import Explanation, LayerReport
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor
from vnm_compile.weights import detected_spec


def explain(model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Return, for every linear of `model`, whether `backend="vnm"` runs it sparse, why, and what that is worth.

    With inputs the model is traced and called once (in eager mode, gradients off), and the decisions are those that
    compiling it with the same inputs would take, measurements included. Without inputs the weights alone are looked at.

    Args:
        model: the model; a compiled one is explained by what it was compiled from.
        args, kwargs: its inputs.
        options: as for `torch.compile`.

    Raises:
        VNMError: an annotated weight breaks its pattern, or an unknown `vnm.` option.
    """
    model = getattr(model, "_orig_mod", model)
    ours, _ = split_options(options)
    graphs: list[Prepared] = []
    names = layer_names(model)

    def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(prepare(gm, inputs, ours, names))
        return gm.forward

    if args or kwargs:
        trace(model, args, kwargs, record)
    return describe_graphs(model, graphs)


def layer_names(model: nn.Module) -> dict[int, str]:
    """Names of a model's linears by the id of their weight; a graph after a graph break knows only a part of them."""
    return {id(layer.module.weight): layer.name for layer in linear_layers(model)}


def describe_graphs(model: nn.Module, graphs: Sequence[Prepared]) -> Explanation:
    """The explanation of a model whose graphs have been through the passes; without any, by its weights alone."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    reports: dict[str, LayerReport] = {}
    for graph in graphs:
        for report in _graph_reports(graph, device):
            # A layer that runs several times is sparse if it is once.
            if report.name not in reports or report.decision == "sparse":
                reports[report.name] = report
    for layer in linear_layers(model):
        if layer.name not in reports:
            reports[layer.name] = _unreached(layer, device, reached=not graphs)
    return Explanation(reports.values(), len(graphs), device)


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    backend: Callable[[fx.GraphModule, Sequence[Any]], Any],
    dynamic: bool | None = None,
) -> None:
    """Call the model under Dynamo, gradients off; `backend` gets its graphs and returns what runs them."""
    # Dynamo caches by code object: with one of our own, neither does an earlier compilation answer for this one, nor
    # does this one count against the recompile limit of the model.
    call = FunctionType(_call.__code__.replace(), globals())
    with torch.no_grad():
        torch.compile(call, backend=backend, dynamic=dynamic)(model, args, kwargs)


def _call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return model(*args, **kwargs)


def _graph_reports(graph: Prepared, device: str) -> list[LayerReport]:
    companions: dict[int, tuple[str, ...]] = {}
    for unit in graph.units:
        for member in unit.members:
            companions[id(member)] = tuple(other.name for other in unit.members if other is not member)
    return [_decided(decision, companions.get(id(decision), ()), device) for decision in graph.decisions]


def _decided(decision: Decision, joined: tuple[str, ...], device: str) -> LayerReport:
    facts = _weight_facts(decision.shape, decision.dtype, decision.spec, decision.tokens, device)
    return LayerReport(
        name=decision.name,
        decision="sparse" if decision.sparse else "dense",
        reason=decision.reason,
        joined=joined,
        tokens=decision.tokens,
        sparse_seconds=decision.timing.sparse if decision.timing else None,
        dense_seconds=decision.timing.dense if decision.timing else None,
        **facts,
    )


def _unreached(layer: Layer, device: str, reached: bool) -> LayerReport:
    """The report of a layer of which no graph is known: from its weight alone."""
    weight, annotation = layer.module.weight, annotation_of(layer.module)
    if isinstance(weight, VNMTensor):
        spec, reason = weight.spec, "stored compressed"
    elif annotation is not None:
        spec, reason = annotation.spec, "annotated"
    else:
        spec = detected_spec(weight, layer.transposed)  # type: ignore[arg-type, assignment]
        reason = f"found {spec} in the weight" if spec else "no V:N:M pattern in its weight"
    if not reached:
        decision, reason = "not run", "the given inputs did not reach it"
    elif spec is None:
        decision = "dense"
    else:
        decision, reason = "sparse", f"{reason}; with inputs, vnm.explain says what is decided for them"
    facts = _weight_facts(tuple(layer.weight.shape), layer.weight.dtype, spec, None, device)
    return LayerReport(name=layer.name, decision=decision, reason=reason, **facts)


def _weight_facts(
    shape: tuple[int, ...] | None, dtype: torch.dtype | None, spec: Spec | None, tokens: int | None, device: str
) -> dict[str, Any]:
    """Size, pattern and limits of a weight."""
    known = shape is not None and dtype is not None
    dense = shape[0] * shape[1] * dtype.itemsize if known else None  # type: ignore[index, union-attr]
    facts = {"shape": shape, "density": 1.0, "spec": None, "dense_bytes": dense, "stored_bytes": dense}
    if known and spec is not None:
        out_features, in_features = shape  # type: ignore[misc]
        limit, crossover = _limits(device, out_features, in_features, spec, dtype, tokens or 1)  # type: ignore[arg-type]
        facts |= {"spec": str(spec), "density": spec.density, "limit": limit, "crossover": crossover}
        facts["stored_bytes"] = spec.nbytes(out_features, in_features, dtype)  # type: ignore[arg-type]
    return facts


@lru_cache(maxsize=1024)
def _limits(
    device: str, out_features: int, in_features: int, spec: Spec, dtype: torch.dtype, tokens: int
) -> tuple[float, float | None]:
    """The speed-up limit at `tokens`, and from how many tokens arithmetic bounds the sparse kernel."""
    model = CostModel.on(device, out_features, in_features, spec, dtype)
    return model.speedup_at(tokens), model.compute_bound_from(sparse=True)
